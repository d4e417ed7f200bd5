"""Print to the terminal: a last line on standard error."""

from __future__ import annotations

import contextlib
import sys

from ..system.showing import harmless


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
