"""Find the notebooks, in a clone or an installed package, and choose those that are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import KitError, unknown
from ..system.arguments import TEXTS_OR_NONE, a_path, takes

PACKAGE = Path(__file__).resolve().parents[1]
NOTEBOOK_NAME = re.compile(r"\d\d_\w+")


def notebook_folder() -> Path:
    """Return the folder of the notebooks: the packaged copy of an installed package, or the clone's `notebooks`.

    Raises:
        KitError: When there is neither.
    """
    for folder in (PACKAGE / "_notebooks", PACKAGE.parent / "notebooks"):
        if folder.is_dir():
            return folder
    raise KitError("the notebooks are not installed with this package; run from a clone, or name their folder")


@takes(folder=a_path("notebooks"))
def list_notebooks(folder: str | Path | None = None) -> dict[str, Path]:
    """Return the notebooks of a folder by name, e.g. `02_finetune`, in the order in which they run.

    Raises:
        KitError: When the folder holds none.
    """
    folder = Path(folder) if folder is not None else notebook_folder()
    found = {path.stem: path for path in sorted(folder.glob("*.ipynb")) if NOTEBOOK_NAME.fullmatch(path.stem)}
    if not found:
        raise KitError(f"there is no notebook in {str(folder)!r}: their names are like 02_finetune.ipynb")
    return found


@takes(wanted=TEXTS_OR_NONE)
def choose(wanted: str | Iterable[str] | None, available: Mapping[str, Path]) -> dict[str, Path]:
    """Pick notebooks by name or number.

    Args:
        wanted: Names (`02_finetune`) or numbers (`02`), as a list or in one text; empty or None for all.
        available: What `list_notebooks` returned.

    Returns:
        The picked notebooks, in the order in which they run.

    Raises:
        KitError: For a notebook that does not exist; the message names the nearest one.
    """
    names = wanted.replace(",", " ").split() if isinstance(wanted, str) else list(wanted or ())
    picked = {find_notebook(name, available) for name in names}
    return {name: path for name, path in available.items() if name in picked or not names}


def find_notebook(name: str, available: Mapping[str, Path]) -> str:
    """Return the name of a notebook that is given by name, file name or number.

    Raises:
        KitError: For a notebook that does not exist; the message names the nearest one.
    """
    stem = name.removesuffix(".ipynb")
    for candidate in available:
        if stem == candidate or (stem.isdigit() and candidate.split("_")[0] == stem.zfill(2)):
            return candidate
    raise unknown("notebook", name, available)


def source_of(cell: Mapping[str, Any]) -> str:
    """Return a cell's source as one text; a notebook's file may have it as a list of lines."""
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)
