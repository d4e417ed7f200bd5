"""End a benchmark that cannot start or go on, with one line."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from qlora_kit.errors import KitError


def told_in_a_line(main: Callable[[], int]) -> Callable[[], int]:
    """Decorate a benchmark's `main`: print a `KitError` as one line, and return exit code 2."""

    @functools.wraps(main)
    def checked() -> int:
        try:
            return main()
        except KitError as error:
            print(error, file=sys.stderr)
            return 2

    return checked
