"""Import PEFT if it is new enough, and make it treat optional packages that are too old as absent.

For each layer PEFT checks for packages such as torchao or gptqmodel, and raises ImportError if one is too old, even if
the layer does not need it. Colab has torchao 0.10.0 and PEFT 0.21 wants 0.16: without this, adapters could only be put
on layers stored by bitsandbytes, and none could be merged.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from . import versions

# Before importing PEFT: an old version is refused in one line, not by an error from inside PEFT.
versions.check()

# Before PEFT, which imports bitsandbytes itself.
from . import safe_bitsandbytes  # noqa: E402, F401  # isort: skip
import peft  # noqa: E402
import peft.import_utils  # noqa: E402

__all__ = ["peft"]


def _absent_where_it_is_too_old(ask: Callable[..., bool]) -> Callable[..., bool]:
    @functools.lru_cache  # PEFT caches answers but not ImportErrors, and asks for each layer
    @functools.wraps(ask)
    def answer(*args: object, **kwargs: object) -> bool:
        try:
            return ask(*args, **kwargs)
        except ImportError:
            return False

    return answer


def _count_old_packages_as_absent() -> None:
    answers = {
        ask: _absent_where_it_is_too_old(ask)
        for name, ask in vars(peft.import_utils).items()
        if name.startswith("is_") and name.endswith("_available")
    }
    # PEFT modules that are already imported have their own references to the functions.
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "peft":
            for name, value in list(vars(module).items()):
                if callable(value) and name.endswith("_available") and value in answers:
                    setattr(module, name, answers[value])


_count_old_packages_as_absent()
