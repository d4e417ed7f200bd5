"""Manifests: the SHA-256 of every file in a folder that must not change any more."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import KitError
from .files import sha256
from .parsing import SCHEMA, read_json, refuse_newer

NAME = "manifest.json"
# Must not change once a run is finished.
OF_A_RUN = ("experiment.yaml", "training.json", "environment.json", "adapter", "tokenizer", "data")


def of(folder: Path, parts: Iterable[str] = (".",), *, coming: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the manifest of a folder, to be written into it as `manifest.json`.

    Args:
        folder: The folder.
        parts: Files and folders in it whose content must not change; missing ones are left out.
        coming: Texts of files that will be written after the manifest, by name.

    Returns:
        `schema`, and `sha256` by the name of each file, relative to the folder.

    Raises:
        KitError: For something that is neither a file nor a folder: reading a named pipe would wait forever.
    """
    sums = {}
    for name, file in _files(folder, parts).items():
        if not file.is_file():
            raise KitError(f"{file} is no file")
        sums[name] = sha256(file)
    sums |= {name: hashlib.sha256(text.encode()).hexdigest() for name, text in (coming or {}).items()}
    return {"schema": SCHEMA, "sha256": sums}


def problem(folder: Path, parts: Iterable[str] = (".",), *, may_lack: Iterable[str] = ()) -> str | None:
    """Return the first difference between a folder and its manifest, or None if every file is unchanged.

    Args:
        folder: The folder.
        parts: The parts that the manifest was made from.
        may_lack: Parts that may be missing completely.

    Returns:
        The first problem, in words.

    Raises:
        KitError: When a newer version of the kit has written the manifest.
    """
    try:
        content = read_json(folder / NAME)
    except KitError as error:
        return f"its manifest cannot be read ({error})"
    refuse_newer(content, folder / NAME)
    wanted = content.get("sha256") if isinstance(content, dict) else None
    if not isinstance(wanted, dict) or content.get("schema") != SCHEMA:
        return "its manifest cannot be read"
    gone = tuple(f"{part}/" for part in may_lack if not (folder / part).exists())
    found = _files(folder, parts)
    for name in sorted({*wanted, *found}):
        if name not in found:
            if not name.startswith(gone):
                return f"{name} is missing"
        elif name not in wanted:
            return f"{name} does not belong to it"
        elif _sum(found[name]) != wanted[name]:
            return f"{name} is damaged, or was changed"
    return None


def problem_of_run(folder: Path) -> str | None:
    """Return the first difference between a finished run's folder and its manifest (see `problem`), or None.

    Args:
        folder: The run folder. Its `data` may be missing completely, e.g. in a run that was passed on.

    Raises:
        KitError: When a newer version of the kit has written the manifest.
    """
    return problem(folder, OF_A_RUN, may_lack=("data",))


def _sum(file: Path) -> str | None:
    try:
        return sha256(file) if file.is_file() else None  # reading a named pipe would wait forever
    except OSError:
        return None


def _files(folder: Path, parts: Iterable[str]) -> dict[str, Path]:
    """Return everything but folders in some parts of a folder, by name relative to the folder."""
    found = {}
    for part in parts:
        place = folder / part
        inside = [Path(root) / name for root, _, names in os.walk(place) for name in names]
        for item in [place] if place.exists() and not place.is_dir() else inside:
            found[item.relative_to(folder).as_posix()] = item
    found.pop(NAME, None)
    return found
