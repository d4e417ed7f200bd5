"""Read a run folder: its records, and whether anything in it was changed."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import schemas
from ..config.experiment import Experiment
from ..errors import KitError, nearest
from ..system.arguments import RUN_FOLDER, takes
from ..system.manifest import NAME, problem_of_run
from ..system.parsing import read_json
from ..system.versions import VERSION

if TYPE_CHECKING:
    from ..metrics.verdict import Report

logger = logging.getLogger(__name__)

PARTS = ("experiment.yaml", "training.json", "adapter", "tokenizer")
"""What every run folder holds, whatever else is in it."""


class RunFolder:
    """The folder of a finished run.

    Opening it reads its records and checks that no file that must stay the same has changed since the run was finished.

    Args:
        path: The folder.

    Raises:
        KitError: When the folder is missing or holds no finished run; when a file of it is damaged, was changed, is
            missing or was added; when a newer version of the kit made it.
    """

    @takes(path=RUN_FOLDER)
    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "experiment.yaml").exists() and not (self.path / "training.json").exists():
            raise _no_run_folder(self.path)
        for name in PARTS:
            if not (self.path / name).exists():
                raise KitError(
                    f"{self.path} is no finished run: {name} is missing. Call finetune with the same experiment "
                    "and folder again: it goes on where it stopped"
                )
        self.experiment = self._read_experiment()
        self._check_contents()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def _read_experiment(self) -> Experiment:
        try:
            return Experiment.from_yaml(self.path / "experiment.yaml")
        except KitError as error:
            # The fields may be from a newer version: saying so helps more than the nearest name.
            made_with = None
            with contextlib.suppress(KitError):
                made_with = self.environment["versions"].get("qlora_kit")
            if made_with is None or _version(made_with) <= _version(VERSION):
                raise
            raise KitError(
                f"{self.path} was made by a newer version of qlora_kit ({made_with}, this is {VERSION}): bring "
                f"qlora_kit up to date. What this one does not know: {error}"
            ) from error

    def _check_contents(self) -> None:
        """Refuse a folder that was changed since the run was finished."""
        labels = self.label_names  # read first, so that a newer version's file is reported as such
        if (self.path / NAME).exists():
            problem = problem_of_run(self.path)
            if problem is not None:
                raise KitError(
                    f"{self.path} is not the run that was finished: {problem}. Bring the folder back as it was, or "
                    "train again"
                )
        else:
            logger.warning(
                "%s has no %s, so whether files in it were changed cannot be said: it is older than manifests, or "
                "somebody has deleted it.",
                *(self.path, NAME),
            )
        if (self.path / "data").is_dir() and read_json(self.path / "data" / "labels.json") != labels:
            raise KitError(f"the labels in {self.path / 'training.json'} are not those of {self.path / 'data'}")

    @functools.cached_property
    def training(self) -> dict[str, Any]:
        """What `training.json` holds: validation metrics by epoch, timing, memory."""
        values: dict[str, Any] = schemas.read(self.path / "training.json", "training.json")
        return values

    @property
    def evaluation(self) -> Report | None:
        """What `evaluation.json` holds, or None before `qlora_kit.evaluate`."""
        from ..metrics.verdict import Report

        file = self.path / "evaluation.json"
        return Report(schemas.read(file, "evaluation.json")) if file.exists() else None

    @functools.cached_property
    def environment(self) -> dict[str, Any]:
        """What `environment.json` holds: device, versions, checksums."""
        values: dict[str, Any] = schemas.read(self.path / "environment.json", "environment.json")
        return values

    @property
    def label_names(self) -> list[str]:
        """Names of the classes, in the order of their ids."""
        return [str(name) for name in self.training["labels"]]


def _no_run_folder(path: Path) -> KitError:
    """Return the error for a path that holds no run: what a run folder is, and the nearest one."""
    if path.is_dir():
        wrong = f"{str(path)!r} is no run folder."
    else:
        wrong = f"{str(path)!r} is a file." if path.is_file() else f"there is no run folder {str(path)!r}."
    known = {str(folder): folder for root in (path, path.parent, Path("runs")) for folder in _runs_below(root)}
    guess = nearest(str(path), known, cutoff=0.7)
    if guess is not None:
        hint = f" Did you mean {guess!r}?"
    elif known:
        hint = f" The newest one near it: {max(known, key=lambda name: _made(known[name]))!r}."
    else:
        hint = ""
    return KitError(f"{wrong}{hint} A run folder is made by finetune and holds {', '.join(PARTS)}.")


def _runs_below(root: Path) -> list[Path]:
    """Return the finished runs in a folder of runs, or of notebooks' results; others are not looked for."""
    places = ("*", "runs/*", "*/runs/*")
    return [file.parent for place in places for file in root.glob(f"{place}/training.json")]


def _made(folder: Path) -> float:
    with contextlib.suppress(OSError):
        return (folder / "training.json").stat().st_mtime
    return 0.0


def _version(text: str) -> tuple[int, ...]:
    """Return a version's numbers, for comparison."""
    return tuple(int(number) for number in re.findall(r"\d+", text.partition("+")[0])[:3])
