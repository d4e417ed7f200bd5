"""Find notebooks, give them parameters, run them in order, and show the results on one page.

Names are imported when first used. A notebook begins with `qk.runtime`: it must work on a Python that lacks the
packages that the other names need, to say which are missing.
"""

from __future__ import annotations

from typing import Any

from ..errors import NotebookFailed as NotebookFailed
from ..public import HANDED_ON, handed_on


def __getattr__(name: str) -> Any:
    return handed_on("notebooks", name)


def __dir__() -> list[str]:
    return sorted({*globals(), *HANDED_ON["notebooks"]})
