"""Refuse versions of torch, transformers, PEFT and bitsandbytes that are older than the kit was tested with.

pip checks versions when it installs the kit, but nothing checks them in a clone that is used without installing. An
older library may silently give other numbers: PEFT 0.20 pads GPT-2 wrong.
"""

from __future__ import annotations

from ..errors import KitError

VERSION = "0.1.0"

# The lower ends of pyproject.toml's ranges.
OLDEST = {"torch": "2.11", "transformers": "5.17", "peft": "0.21", "bitsandbytes": "0.50"}


def check() -> None:
    """Refuse a library that is too old.

    Raises:
        KitError: With the installed version, the oldest allowed one, and the command to install it.
    """
    # Imported here because `import qlora_kit` reads VERSION: that must be fast and work before anything is installed.
    import importlib.metadata

    from packaging.version import Version

    for name, oldest in OLDEST.items():
        found = importlib.metadata.version(name)
        # Compare only the release: `2.11.0a0+cu128`, a vendor's build of torch, counts as 2.11.
        if Version(found).release < Version(oldest).release:
            raise KitError(
                f"{name} {found} is installed and qlora_kit needs {oldest} or newer: pip install '{name}>={oldest}', "
                "then restart Python"
            )
