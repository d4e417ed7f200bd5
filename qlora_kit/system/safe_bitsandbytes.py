"""Import bitsandbytes without running code from the hub, and fix how it dequantizes 4-bit weights on a CPU.

On a CPU with AVX512-BF16, bitsandbytes 0.50 looks for the package `kernels` during its import and, if it is installed,
downloads compiled code from the hub and uses it. The user did not ask for that code, so the package is hidden during
the import; bitsandbytes then uses the kernels that it ships.

If bitsandbytes was already imported (`import peft` does so, and `from transformers import Trainer`), it is too late to
hide the package. The downloaded code is then removed, so that nothing runs it from here on, and a warning says so.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)

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

from bitsandbytes.autograd._functions import MatMul8bitFp  # noqa: E402

__all__ = ["MatMul8bitFp", "bnb", "keep_weights_as_stored_"]


class _FlatRows:
    """bitsandbytes' C library, but 4-bit weights are always dequantized as one long row.

    On a CPU with AVX-512, the library silently uses the wrong block's scale if the row length is a multiple of 16
    but not of the block size (32, 48, 80, 96, 416, ... with blocks of 64). (0.50.2; the kernel counts blocks row by
    row, while quantization counts them through the whole tensor.) A weight passed as one row is read correctly.
    """

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        if not name.startswith(("cdequantize_blockwise_cpu_nf4_", "cdequantize_blockwise_cpu_fp4_")):
            return function

        @functools.wraps(function)
        def flat(packed: Any, absmax: Any, out: Any, block_size: Any, rows: Any, columns: Any) -> Any:
            if columns.value % block_size.value:
                rows, columns = ctypes.c_longlong(1), ctypes.c_longlong(rows.value * columns.value)
            return function(packed, absmax, out, block_size, rows, columns)

        return flat


def _read_back_right() -> None:
    from bitsandbytes.backends.cpu import ops

    if not isinstance(ops.lib, _FlatRows):
        ops.lib = _FlatRows(ops.lib)  # type: ignore[assignment]


def _drop_code_from_the_hub() -> None:
    from bitsandbytes.backends.cpu import ops

    # The name exists only on a CPU with AVX512-BF16; without the package `kernels` it is None.
    if getattr(ops, "gemm_4bit_forward_kernel", None) is not None:
        ops.gemm_4bit_forward_kernel = None
        logger.warning(
            "bitsandbytes was imported before qlora_kit; it has found the package kernels and loaded compiled code "
            "from the hub with it. From here on it uses its own instead. To keep the hub's from being loaded at all, "
            "put `import qlora_kit.models` before transformers and peft, or uninstall kernels."
        )


def _say_nothing_of_casts(record: logging.LogRecord) -> bool:
    # An 8-bit layer logs this for every product that is not in fp16: hundreds of lines an epoch, all harmless.
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


_read_back_right()
_drop_code_from_the_hub()
logging.getLogger("bitsandbytes.autograd._functions").addFilter(_say_nothing_of_casts)


def keep_weights_as_stored_(model: Any) -> Any:
    """Stop bitsandbytes from repacking 4-bit weights at the first evaluation; changes the model in place.

    On a CPU with AVX512-BF16, `Linear4bit` rewrites its weight for a bf16 kernel at the first forward pass in
    eval mode. This rounds the scales to bf16 permanently. That kernel has no gradient, so training after an
    evaluation silently loses the gradient through every frozen layer. (bitsandbytes 0.50.2, `nn/modules.py`,
    `Linear4bit.forward`.) Other CPUs have no such kernel.

    Args:
        model: Any module; its `Linear4bit` layers are changed.

    Returns:
        The model.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model
