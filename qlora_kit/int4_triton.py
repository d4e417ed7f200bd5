"""The int4 layer's dequantization as one CUDA kernel.

In plain torch it takes seven launches and two temporary tensors as large as the weight. One kernel reads the
packed bytes and the scales' codes and writes 16-bit weights. Its result is that of
`qlora_kit.int4.dequantize_plain` to the last bit: the same float32 operations in the same order, which is why
fused multiply-add is off.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from . import quantization
from .int4 import Stored
from .quantization import NESTED_BLOCK_SIZE


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
    """Each program writes ROWS blocks of BLOCK weights."""
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


@functools.cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return quantization.codebook("int4").to(device), quantization.dynamic_codebook().to(device)


def dequantize(stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    """As `qlora_kit.int4.dequantize_plain`, for tensors on a CUDA device."""
    packed, absmax, nested_absmax, offset, block_size, size = stored
    levels, scale_levels = _tables(packed.device)
    out = torch.empty(size, dtype=dtype, device=packed.device)
    blocks = absmax.numel()
    rows = max(1, 2048 // block_size)
    nested = nested_absmax is not None
    with torch.cuda.device(packed.device):
        _kernel[(triton.cdiv(blocks, rows),)](
            packed,
            absmax,
            nested_absmax if nested else absmax,
            offset if nested else absmax,
            levels,
            scale_levels,
            out,
            blocks,
            size,
            NESTED=nested,
            GROUP=NESTED_BLOCK_SIZE,
            BLOCK=block_size,
            ROWS=rows,
            enable_fp_fusion=False,
        )
    return out
