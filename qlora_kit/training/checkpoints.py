"""Write, check and delete checkpoints: each is complete or absent, is checked before use, and is never unpickled.

A folder `checkpoint-STEP` holds the trained weights (safetensors), what only torch can store (optimizer, schedule, loss
scale, random states: torch files, read with `weights_only=True`), the Trainer's state (JSON) and a manifest with every
file's SHA-256. It is written to a temporary folder, synced and renamed.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from .. import schemas
from ..errors import KitError
from ..system import manifest
from ..system.files import move_aside, move_into_place, saving, write_json
from ..system.manifest import NAME, of

logger = logging.getLogger(__name__)

MANIFEST = NAME


def path_of(folder: Path, step: int) -> Path:
    """Return the path of a step's checkpoint, whether or not it exists."""
    return folder / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name, or -1 for any other name."""
    head, _, step = checkpoint.name.partition("-")
    return int(step) if head == "checkpoint" and step.isdigit() else -1


def listed(folder: Path) -> list[Path]:
    """Return a folder's checkpoints, the newest first."""
    found = [item for item in folder.glob("checkpoint-*") if item.is_dir() and step_of(item) >= 0]
    return sorted(found, key=step_of, reverse=True)


def write(folder: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Write a checkpoint to a temporary folder and rename it into place.

    Args:
        folder: Where checkpoints are kept.
        step: Optimizer steps done.
        fill: Writes the checkpoint's files into the folder that it is given.

    Returns:
        The checkpoint's folder.

    Raises:
        KitError: When the disk is full; earlier checkpoints stay as they are.
    """
    target = path_of(folder, step)
    with saving(target):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".aside-", ignore_cleanup_errors=True) as aside:
            made = Path(aside) / target.name
            made.mkdir()
            fill(made)
            write_json(made / MANIFEST, of(made))
            if target.exists():
                # A damaged checkpoint, which was skipped when the run resumed from an earlier one.
                move_aside(target)
            move_into_place(made, target)
    return target


def problem(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None if no file has changed since it was written."""
    try:
        wrong, file = manifest.problem(checkpoint), checkpoint / "trainer_state.json"
        if wrong is None and file.exists():
            # transformers does not check this file. Its log may hold NaN, which a too high fp16 loss scale leaves.
            state = schemas.read(file, "trainer_state.json", finite=False)
            if state["global_step"] != step_of(checkpoint):
                wrong = f"trainer_state.json is of step {state['global_step']}"
    except KitError as error:
        wrong = str(error)
    return wrong


def newest_whole(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint, or None; log which were skipped and why."""
    for checkpoint in listed(folder):
        wrong = problem(checkpoint)
        if wrong is None:
            return checkpoint
        logger.warning("Passed over %s: %s. Going on with the one before.", checkpoint, wrong)
    return None


def rotate(folder: Path, keep: int, best: Path | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one."""
    spared = {checkpoint.name for checkpoint in listed(folder)[:keep]}
    if best is not None:
        spared.add(best.name)
    for checkpoint in listed(folder):
        if checkpoint.name not in spared:
            # Rename before deleting: a kill must not leave half a checkpoint under a checkpoint's name.
            checkpoint.rename(folder / f".aside-{checkpoint.name}")
    # Delete those, and what a killed process left half written.
    for aside in folder.glob(".aside-*"):
        shutil.rmtree(aside, ignore_errors=True)
