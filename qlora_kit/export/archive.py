"""Put a run's results into one zip file, and download it with the browser."""

from __future__ import annotations

import importlib
import json
import logging
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.experiment import Experiment, data_spec
from ..errors import KitError, either
from ..system.arguments import FLAG, a_path, takes
from ..system.files import PARTIAL, as_json, saving
from ..system.host import COLAB, host, on_drive
from ..system.parsing import read_json

logger = logging.getLogger(__name__)

# Folders that are not zipped: one is large, and one has the rows of the user's data.
NOT_ZIPPED = ("checkpoints", "data")
# What shows texts of rows, and what holds them: a page, a notebook; a table of rows or of predictions.
PAGES = (".html", ".ipynb")
TABLES = (".csv", ".tsv", ".jsonl", ".parquet", ".xlsx")
# Kinds of files that a run writes without a text of a row in them, and folders whose files all are of that kind.
OWN = (".yaml", ".safetensors", ".png", ".md", ".db", ".lock", ".wandb")
OWN_FOLDERS = frozenset(("adapter", "tokenizer", "wandb", "tensorboard"))


# --- one file of everything -------------------------------------------------------------------------------------


@takes(out=a_path("runs/latest"), to=a_path("results.zip"), texts=FLAG)
def zip_results(out: str | Path, to: str | Path | None = None, *, texts: bool = False) -> Path:
    """Put a folder's results into one zip, to download before the machine is gone (Colab's).

    Args:
        out: A folder with notebooks, records and run folders, such as `runs/latest`, or one run folder.
        to: The zip; by default `OUT.zip` beside the folder. An existing one is replaced.
        texts: Include what quotes texts of your rows. If False and there are experiments on other data than Banking77,
            the example texts in each `evaluation.json`, what notebooks show below their cells, pages (`.html`) and
            tables (`.csv` and the like) are left out, and a warning says so. What a notebook shows is left out, too, if
            no record says what data it was run on.

    Returns:
        The zip, whose runs load and predict. Checkpoints, the user's data rows and symbolic links are left out in any
        case. From W&B's folder, only what `wandb sync` uploads of offline runs is included; it quotes validation rows
        where `tracking.log_texts` was set.

    Raises:
        KitError: When there is no such folder or nothing in it; when `to` does not end in .zip.
    """
    folder = Path(out)
    if not folder.is_dir():
        raise KitError(f"there is no folder {str(folder)!r} to zip")
    target = Path(to) if to is not None else folder.resolve().with_name(f"{folder.resolve().name}.zip")
    if target.suffix.lower() != ".zip" or target.is_dir():
        what = " is a folder" if target.is_dir() else " does not end in .zip"
        raise KitError(f"{either('to', '--to')} is {str(target)!r}, which{what}: name the zip, as results.zip")
    files = [
        file
        for file in sorted(folder.rglob("*"))
        # A symlink may point to a file that the user does not want to share.
        if file.is_file()
        and not file.is_symlink()
        and _zipped(file.relative_to(folder).parts)
        and file.resolve() != target.resolve()
    ]
    if not files:
        raise KitError(f"there is nothing in {str(folder)!r} to zip")
    private = set() if texts else _quoting(files)
    aside = target.with_name(f".{target.name}{PARTIAL}")
    with saving(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
                for file in files:
                    name = Path(folder.resolve().name) / file.relative_to(folder)
                    if file not in private:
                        archive.write(file, name)
                    elif (kept := _without_texts(file)) is not None:
                        archive.writestr(name.as_posix(), kept, zipfile.ZIP_DEFLATED)
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
    if private:
        logger.warning(
            "What may quote your texts is left out of %s, in these files or with them: %s. %s includes it.",
            target,
            ", ".join(dict.fromkeys(file.name for file in sorted(private))),
            either("texts=True", "--texts"),
        )
    return target


def _zipped(parts: tuple[str, ...]) -> bool:
    """Return whether a file goes into the zip, given the parts of its path below the folder."""
    if any(part in NOT_ZIPPED or part.startswith(".") for part in parts):
        return False
    # An older zip of the same folder, perhaps with texts: nobody looks into it here.
    if parts[-1].endswith(".zip"):
        return False
    if "wandb" not in parts:
        return True
    # Online runs are on W&B's server. Offline runs need only their log and files, not W&B's own logs and tmp.
    run, *inside = parts[parts.index("wandb") + 1 :]
    return run.startswith("offline-run-") and (inside[0] == "files" or inside[0].endswith(".wandb"))


# --- the user's texts -------------------------------------------------------------------------------------------


def _quoting(files: Sequence[Path]) -> set[Path]:
    """Return the files that may quote texts of rows that are not public."""
    experiments = [found for found in map(_experiment_of, files) if found]
    if not all(map(_is_public, experiments)):
        return {file for file in files if file.name == "evaluation.json" or not _quotes_nothing(file)}
    # A notebook that failed has shown rows already, and no record says yet whose they are.
    here = set(files)
    unknown = {file for file in files if file.suffix == ".ipynb" and file.with_suffix(".json") not in here}
    # The page of all results shows what the notebooks show.
    pages = {file for file in files if file.suffix == ".html"} if unknown else set()
    tests = {file for file in files if file.name == "evaluation.json" and file.with_name("experiment.yaml") not in here}
    return unknown | pages | tests


def _quotes_nothing(file: Path) -> bool:
    """Return whether a file is one that the kit writes, or its libraries, and that holds no text of a row."""
    if file.suffix in (*PAGES, *TABLES):
        return False
    if file.suffix in OWN or file.name in ("environment.json", "begun.json") or not OWN_FOLDERS.isdisjoint(file.parts):
        return True
    try:  # somebody's own .json, .txt or whatever it is
        content = read_json(file) if file.suffix == ".json" else None
    except KitError:
        return False
    return isinstance(content, dict) and not content.keys().isdisjoint(("schema", "experiment"))


def _experiment_of(file: Path) -> Mapping[str, Any] | None:
    """Return the experiment that a run folder's file or a record has; None for other files and an empty one."""
    if file.name == "experiment.yaml":
        try:
            return Experiment.from_yaml(file).to_dict()
        except KitError:
            return {"data": None}  # nobody knows whose rows they are
    if file.suffix != ".json":
        return None
    try:
        content = read_json(file)
    except KitError:
        return None
    experiment = content.get("experiment") if isinstance(content, dict) else None
    return experiment if isinstance(experiment, dict) and experiment else None


def _is_public(experiment: Mapping[str, Any]) -> bool:
    try:
        return data_spec(experiment.get("data", {})).is_public
    except KitError:
        return False


def _without_texts(file: Path) -> str | None:
    """Return a file's content without what quotes texts of rows; None if nothing of it can be kept."""
    if file.name != "evaluation.json" and file.suffix != ".ipynb":
        return None
    try:
        content = read_json(file)
        if file.suffix == ".ipynb":
            for cell in content["cells"]:
                if cell["cell_type"] == "code":
                    cell["outputs"] = []
            return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        for pair in content["confusions"]:
            pair["examples"] = []
        return as_json(content)
    except (KitError, KeyError, TypeError, AttributeError):
        return None  # damaged: nobody knows what is in it


# --- to the browser ---------------------------------------------------------------------------------------------


@takes(out=a_path("runs/latest"), texts=FLAG)
def download_results(out: str | Path, notebook: str | None = None, *, texts: bool = False) -> Path | None:
    """Download a folder's results with the browser in Colab, whose disk is temporary; elsewhere print where they are.

    Args:
        out: As `zip_results` takes it.
        notebook: Name of the download: the notebook's name, such as `02_finetune`, so that those of several notebooks
            can be told apart. None for the folder's name.
        texts: As `zip_results` takes it.

    Returns:
        The downloaded zip. None if none is made: outside Colab, and on a mounted Drive, where results stay.

    Raises:
        KitError: As `zip_results`, in Colab.
    """
    if on_drive(out):
        print(f"Everything is in {out}, on your Drive. Colab uploads it in the background: leave it a minute.")
        return None
    if host() is not COLAB:
        print(f"Everything is in {out}. As one file: qk.zip_results({str(out)!r})")
        return None
    made = zip_results(out, Path(out).resolve().with_name(f"{notebook}.zip") if notebook else None, texts=texts)
    importlib.import_module("google.colab.files").download(str(made))
    return made
