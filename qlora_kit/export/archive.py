"""Put a run's results into one zip file, and download it with the browser."""

from __future__ import annotations

import importlib
import os
import zipfile
from pathlib import Path

from ..errors import KitError
from ..system.arguments import a_path, takes
from ..system.files import PARTIAL, saving
from ..system.host import COLAB, host, on_drive

# Folders that are not zipped: one is large, and one has the rows of the user's data.
NOT_ZIPPED = ("checkpoints", "data")


# --- one file of everything -------------------------------------------------------------------------------------


@takes(out=a_path("runs/latest"), to=a_path("results.zip"))
def zip_results(out: str | Path, to: str | Path | None = None) -> Path:
    """Put a folder's results into one zip, to download before the machine is gone (Colab's).

    Args:
        out: A folder with notebooks, records and run folders, such as `runs/latest`, or one run folder.
        to: The zip; by default `OUT.zip` beside the folder. An existing one is replaced.

    Returns:
        The zip. Checkpoints, the user's data rows and symbolic links are left out. From W&B's folder, only what
        `wandb sync` uploads of offline runs is included; their tables quote some validation rows.

    Raises:
        KitError: When there is no such folder or nothing in it.
    """
    folder = Path(out)
    if not folder.is_dir():
        raise KitError(f"there is no folder {str(folder)!r} to zip")
    target = Path(to) if to is not None else folder.resolve().with_name(f"{folder.resolve().name}.zip")
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
    aside = target.with_name(f".{target.name}{PARTIAL}")
    with saving(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
                for file in files:
                    archive.write(file, Path(folder.resolve().name) / file.relative_to(folder))
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
    return target


def _zipped(parts: tuple[str, ...]) -> bool:
    """Return whether a file goes into the zip, given the parts of its path below the folder."""
    if any(part in NOT_ZIPPED or part.startswith(".") for part in parts):
        return False
    if "wandb" not in parts:
        return True
    # Online runs are on W&B's server. Offline runs need only their log and files, not W&B's own logs and tmp.
    run, *inside = parts[parts.index("wandb") + 1 :]
    return run.startswith("offline-run-") and (inside[0] == "files" or inside[0].endswith(".wandb"))


@takes(out=a_path("runs/latest"))
def download_results(out: str | Path, notebook: str | None = None) -> Path | None:
    """Download a folder's results with the browser in Colab, whose disk is temporary; elsewhere print where they are.

    Args:
        out: As `zip_results` takes it.
        notebook: Name of the download: the notebook's name, such as `02_finetune`, so that those of several notebooks
            can be told apart. None for the folder's name.

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
    made = zip_results(out, Path(out).resolve().with_name(f"{notebook}.zip") if notebook else None)
    importlib.import_module("google.colab.files").download(str(made))
    return made
