"""Print to the terminal: a last line on standard error, texts without escape sequences."""

from __future__ import annotations

import contextlib
import re
import sys


def say(text: str, code: int) -> int:
    """Print a command's last message on standard error; return its exit code.

    Args:
        text: The message. The program's name stands before it, except before a failure of several lines.
        code: The exit code.
    """
    text = harmless(text if code == 1 and "\n" in text else f"qlora_kit: {text}")
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)
    return code


def harmless(text: str) -> str:
    """Return text with terminal control characters (such as escape sequences in a label) spelled out."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda found: ascii(found[0])[1:-1], text)
