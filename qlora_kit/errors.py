"""Errors and warnings that tell the user what was wrong, what is allowed, and what was probably meant."""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_PACKAGE = f"{Path(__file__).parent}{os.sep}"
_in_terminal = contextvars.ContextVar("in_terminal", default=False)


class KitError(ValueError):
    """Bad input. The message says what the user can do; the command line prints only the message and exits with 2."""


class KitWarning(UserWarning):
    """Something about the input that a result may suffer from. The message says what the user can do."""


def warn(message: str) -> None:
    """Warn the user. The warning names the line outside the package that led here, the user's own.

    Args:
        message: One line.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, KitWarning, stacklevel=level)


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Show the kit's warnings as one line each within a block: where no line of code is the user's own."""
    before = warnings.formatwarning
    warnings.formatwarning = _format_plainly(before)
    try:
        yield
    finally:
        warnings.formatwarning = before


def show_warnings_plainly() -> None:
    """Show the kit's warnings as one line each from here on, as `plain_warnings` does for a block."""
    warnings.formatwarning = _format_plainly(warnings.formatwarning)


def _format_plainly(before: Any) -> Any:
    def format_plainly(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if issubclass(category, KitWarning):
            return f"warning: {' '.join(str(message).split())}\n"
        return str(before(message, category, filename, lineno, line))

    return format_plainly


@contextlib.contextmanager
def in_terminal() -> Iterator[None]:
    """Let messages name the options of the command line within a block, instead of Python's arguments."""
    token = _in_terminal.set(True)
    try:
        yield
    finally:
        _in_terminal.reset(token)


def either(python: str, terminal: str) -> str:
    """Return the words that the user writes: those of Python, or on the command line those of the terminal.

    Args:
        python: As in `test=0.2`.
        terminal: As in `--test 0.2`.
    """
    return terminal if _in_terminal.get() else python


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


class NotebookRefused(NotebookFailed, KitError):
    """A notebook stopped at bad input. The message is one line: the notebook, its cell, and the cell's `KitError`."""
