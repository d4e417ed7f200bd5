"""Names of presets, and the check of names that become folders."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from ..errors import KitError


def presets() -> list[str]:
    """Return the names of the presets that come with the package."""
    folder = resources.files("qlora_kit") / "presets"
    return sorted(item.name[: -len(".yaml")] for item in folder.iterdir() if item.name.endswith(".yaml"))


def named_after(name: str, data: str) -> str:
    """Return the name of an experiment on other data than its preset's: `banking77` in it becomes the data's name.

    Args:
        name: The preset's name, as `minilm_banking77_qlora`.
        data: The data's name: a file, a pattern of files, a data set on the hub, or `banking77`, which changes nothing.

    Returns:
        For `data/tickets.csv`, `minilm_tickets_qlora`.
    """
    if data == "banking77":
        return name
    kept = (c if c.isascii() and (c.isalnum() or c in "-.") else "-" for c in Path(data).stem[:60])
    return name.replace("_banking77_", f"_{''.join(kept).strip('-.') or 'data'}_")


def safe_name(what: str, name: str) -> str:
    """Return `name` if it is a valid folder name on every system.

    Args:
        what: What it names, for the message.
        name: The name.

    Raises:
        KitError: When it is not.
    """
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    if not name or not set(name) <= allowed or name.startswith((".", "-")) or len(name) > 128:
        raise KitError(
            f"{name!r} cannot be the name of the {what}: allowed are up to 128 letters, digits, dots, hyphens and "
            "underscores, beginning with a letter, digit or underscore"
        )
    return name
