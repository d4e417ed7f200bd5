"""Print to the terminal: results alone on standard output, a last line on standard error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

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


@contextlib.contextmanager
def off_stdout() -> Iterator[None]:
    """Send to standard error what libraries print within a block, so that standard output has results alone.

    transformers prints a line when it is imported with `WANDB_MODE=offline`.
    """
    with contextlib.redirect_stdout(sys.stderr):
        yield
