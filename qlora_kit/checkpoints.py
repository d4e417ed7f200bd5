"""Checkpoints: whole or not there at all, checked before they are trusted, and never unpickled.

A folder `checkpoint-STEP` holds the trained weights (safetensors), what torch alone can hold (optimizer,
schedule, loss scale, random states: torch files, read with `weights_only=True`), the Trainer's state (JSON) and a
manifest with every file's SHA-256. It is written aside, synced and renamed.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import records
from .errors import KitError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def path_of(folder: Path, step: int) -> Path:
    """Return where a folder's checkpoint of a step is, or would be."""
    return folder / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name, or -1 where the name is none of a checkpoint."""
    head, _, step = checkpoint.name.partition("-")
    return int(step) if head == "checkpoint" and step.isdigit() else -1


def listed(folder: Path) -> list[Path]:
    """Return a folder's checkpoints, the newest first."""
    found = [item for item in folder.glob("checkpoint-*") if item.is_dir() and step_of(item) >= 0]
    return sorted(found, key=step_of, reverse=True)


def write(folder: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Write a checkpoint aside and rename it into place.

    Args:
        folder: Where checkpoints are kept.
        step: Optimizer steps done.
        fill: Writes the checkpoint's files into the folder that it is given.

    Returns:
        The checkpoint's folder.

    Raises:
        KitError: When there is no room on the disk; earlier checkpoints stay as they are.
    """
    target = path_of(folder, step)
    with records.saving(target):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".aside-", ignore_cleanup_errors=True) as aside:
            made = Path(aside) / target.name
            made.mkdir()
            fill(made)
            records.write_json(made / MANIFEST, {"schema": records.SCHEMA, "sha256": _checksums(made)})
            if target.exists():
                # A damaged one that was passed over when the run went on from the one before.
                records.move_aside(target)
            records.move_into_place(made, target)
    return target


def problem(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint, or return None where every file is what it was when written."""
    try:
        wanted = records.read_json(checkpoint / MANIFEST)["sha256"]
        found = _checksums(checkpoint)
    except (KitError, KeyError, TypeError, OSError) as error:
        return f"its manifest cannot be read ({error})"
    if not isinstance(wanted, dict):
        return "its manifest cannot be read"
    for name in sorted({*wanted, *found}):
        if name not in found:
            return f"{name} is missing"
        if name not in wanted:
            return f"{name} does not belong to it"
        if wanted[name] != found[name]:
            return f"{name} is damaged"
    return None


def newest_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint that is whole, saying which were passed over and why."""
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
            # Out of the way by one rename first: a kill must not leave half a checkpoint under a checkpoint's name.
            checkpoint.rename(folder / f".aside-{checkpoint.name}")
    # That, and what a killed process left half written.
    for aside in folder.glob(".aside-*"):
        shutil.rmtree(aside, ignore_errors=True)


def _checksums(checkpoint: Path) -> dict[str, str]:
    from .models import sha256

    return {
        item.relative_to(checkpoint).as_posix(): sha256(item)
        for item in sorted(checkpoint.rglob("*"))
        if item.is_file() and item.name != MANIFEST
    }
