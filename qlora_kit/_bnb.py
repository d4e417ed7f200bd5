"""bitsandbytes, imported so that it runs nothing from the hub.

On a CPU with AVX512-BF16, bitsandbytes 0.50 looks for the package `kernels` while it is imported and, where
that is installed, downloads compiled code from the hub and uses it. Nobody named that code, so for the length of
the import the package is hidden; bitsandbytes then takes the kernels that it ships.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

_hidden: dict[str, Any] = {}
if "bitsandbytes" not in sys.modules:
    _hidden["kernels"] = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # makes `from kernels import ...` fail
_level = logging.getLogger("bitsandbytes").level
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
try:
    import bitsandbytes as bnb
finally:
    logging.getLogger("bitsandbytes").setLevel(_level)
    if "kernels" in _hidden:
        if _hidden["kernels"] is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = _hidden["kernels"]

__all__ = ["bnb", "keep_weights_as_stored_"]


def keep_weights_as_stored_(model: Any) -> Any:
    """Stop bitsandbytes from repacking 4-bit weights at the first evaluation, in place.

    On a CPU with AVX512-BF16, `Linear4bit` rewrites its weight for a bf16 kernel at the first forward pass in
    eval mode: the scales are rounded to bf16 for good, and that kernel has no gradient, so training that goes on
    after an evaluation silently loses the gradient through every frozen layer. (bitsandbytes 0.50.2,
    `nn/modules.py`, `Linear4bit.forward`.) Other CPUs have no such kernel.

    Args:
        model: Any module; its `Linear4bit` layers are changed.

    Returns:
        The model.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model
