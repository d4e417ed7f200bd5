"""The user's home, where it is missing or cannot be written: a run needs none."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from pathlib import Path


def give_home() -> None:
    """Set `HOME` to `instead_of_home`, where nothing says where the home is: no `HOME`, and a user without a name.

    Libraries would end there, or make a folder named `~` in the folder that the program was started in. `import
    qlora_kit` calls this.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(instead_of_home())


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
