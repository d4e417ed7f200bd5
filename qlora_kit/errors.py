"""Errors that tell the user what was wrong, what is allowed, and what was probably meant."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable
from typing import Any


class KitError(ValueError):
    """Bad input. The message says what the user can do; the command line prints only the message and exits with 2."""


class Terminated(SystemExit):
    """The process was asked to end (SIGTERM and the like); it exits with 128 plus the signal's number, as shells do.

    Args:
        number: The signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return signal.Signals(self.number).name


def nearest(name: str, allowed: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """Return the allowed name most similar to `name`, or None if none reaches the similarity `cutoff` (0 to 1)."""
    by_fold = {str(candidate).lower(): str(candidate) for candidate in allowed}
    close = difflib.get_close_matches(str(name).lower(), by_fold, n=1, cutoff=cutoff)
    return by_fold[close[0]] if close else None


def described(value: Any) -> str:
    """Describe a value in a few words for a message: its type, and the value itself (cut off) if it is plain."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    if isinstance(value, (str, bytes, bool, int, float)):
        text = repr(value)
        return f"the {name} {text if len(text) <= 60 else f'{text[:57]}...'}"
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def shown(value: object) -> str:
    """Return a value as messages quote it: one line, long values cut off, only the type if it is not a plain value."""
    if not isinstance(value, str | int | float | list | tuple | dict | None):
        return described(value)
    text = " ".join(repr(value).split()) if isinstance(value, list | tuple | dict) else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text):,} characters)"


def unknown(what: str, name: object, allowed: Iterable[str]) -> KitError:
    """Return the error for a name that is not in `allowed`.

    Args:
        what: What kind of thing was named, e.g. `"preset"`.
        name: The name that was given.
        allowed: Every name that would have been accepted.

    Returns:
        An error for the caller to raise; it lists the allowed names and suggests the nearest one.
    """
    names = [str(candidate) for candidate in allowed]
    guess = nearest(str(name), names)
    hint = f" Did you mean {guess!r}?" if guess else ""
    return KitError(f"there is no {what} {shown(name)}.{hint} Allowed: {', '.join(names)}.")


class TrainingError(RuntimeError):
    """Training could not continue; the message says at which step, what to try, and what is saved."""


class NotebookFailed(RuntimeError):
    """A notebook stopped. The message ends with the failing cell's error."""
