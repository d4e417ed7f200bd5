"""What all trackers need so that a failure of theirs costs no run: words for it, and quiet."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_log_files() -> Iterator[None]:
    """Keep logging from printing a traceback for each line that a tracker cannot write into its own log file."""
    before, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        yield
    finally:
        logging.raiseExceptions = before


def in_words(error: Exception) -> str:
    """Return an error as the end of a sentence: its kind and what it says, in one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".")
