"""The user's home, where it is missing or cannot be written: a run needs none."""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import tempfile
from pathlib import Path


def home() -> Path | None:
    """Return the user's home; None where nothing says it: no `HOME`, and a user without an entry in the passwd file."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def is_writable(folder: Path) -> bool:
    """Return whether files can be made in a folder, which is made if it is missing.

    It is tried, because permissions do not tell it: root may write anywhere, and not below /proc.
    """
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    return False


@functools.cache
def instead_of_home() -> Path:
    """Return a folder of this process alone for what would go into a home that cannot be written; it goes with it."""
    folder = tempfile.mkdtemp(prefix="qlora_kit-home-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
