"""Dequantize 4-bit weights in one CUDA kernel, for any codebook.

One kernel reads the packed bytes and the scales' codes and writes the weights. Plain torch needs seven launches for
int4, and two temporary tensors as large as the weight. bitsandbytes needs three launches if the scales are quantized as
well. The result equals theirs to the last bit (`packed.dequantize_plain`, `bitsandbytes.functional`): the same
float32 operations in the same order. That is why fused multiply-add is off.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..config.quantization import NESTED_BLOCK_SIZE

# As `packed.Stored`: packed, absmax, nested_absmax, offset, block_size, size.
Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, int, int]

# Weights that a program writes, and its warps. On an H100 no other pair that was tried was faster, for 1 to 4 million
# weights.
ELEMENTS, WARPS = 2048, 4


@triton.jit
def _kernel(
    packed,
    absmax,
    nested_absmax,
    offset,
    levels,
    scale_levels,
    out,
    blocks,
    size,
    NESTED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write ROWS blocks of BLOCK weights in each program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < blocks
    if NESTED:
        code = tl.load(absmax + row, mask=there, other=0).to(tl.int32)
        scale = tl.load(scale_levels + code) * tl.load(nested_absmax + row // GROUP, mask=there, other=0.0)
        scale += tl.load(offset)
    else:
        scale = tl.load(absmax + row, mask=there, other=0.0)
    half: tl.constexpr = BLOCK // 2
    byte = row.to(tl.int64)[:, None] * half + tl.arange(0, half)[None, :]
    both = tl.load(packed + byte, mask=byte * 2 < size, other=0).to(tl.int32)
    first = tl.load(levels + (both >> 4)) * scale[:, None]
    second = tl.load(levels + (both & 15)) * scale[:, None]
    values = tl.reshape(tl.join(first, second), (ROWS, BLOCK))
    index = row.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + index, values.to(out.dtype.element_ty), mask=index < size)


def dequantize(
    stored: Weights, levels: torch.Tensor, scale_levels: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Dequantize weights on a CUDA device.

    Args:
        stored: A layer's stored weight, on the device (`packed.Stored`).
        levels: The value of each code, float32 `[16]`.
        scale_levels: The value of each scale's code, float32 `[256]`; None where scales are not quantized.
        dtype: Dtype of the result.

    Returns:
        The weights, `[size]`.
    """
    packed, absmax, nested_absmax, offset, block_size, size = stored
    out = torch.empty(size, dtype=dtype, device=packed.device)
    blocks = absmax.numel()
    rows = max(1, ELEMENTS // block_size)
    with torch.cuda.device(packed.device):
        _kernel[(triton.cdiv(blocks, rows),)](
            packed,
            absmax,
            absmax if nested_absmax is None else nested_absmax,
            absmax if offset is None else offset,
            levels,
            levels if scale_levels is None else scale_levels,
            out,
            blocks,
            size,
            NESTED=nested_absmax is not None,
            GROUP=NESTED_BLOCK_SIZE,
            BLOCK=block_size,
            ROWS=rows,
            enable_fp_fusion=False,
            num_warps=WARPS,
        )
    return out
