"""Where an export may be written."""

from __future__ import annotations

from pathlib import Path

from ..errors import KitError
from ..runs.folder import RunFolder


def new_place(run: RunFolder, to: str | Path) -> Path:
    """Return the folder that an export is written to.

    Args:
        run: The run that is exported.
        to: A folder that does not exist, or is empty.

    Raises:
        KitError: When something is there already, or the place is in the run's folder: a run's zip and its manifest
            hold what belongs to the run, and not the files of a whole model.
    """
    target, home = Path(to), run.path.resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise KitError(f"{target} is there already; nothing is overwritten: name a folder that does not exist yet")
    if home in target.resolve().parents:
        raise KitError(f"{target} is in the run's own folder {run.path}: name a folder outside of it")
    return target
