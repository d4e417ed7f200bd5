"""Packed 4-bit weights, and how to dequantize them: in plain PyTorch, or by a Triton kernel where there is one."""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import torch

from .codebooks import codebook
from .reference import block_scales

logger = logging.getLogger(__name__)

# The lowest that Triton says it supports; on a T4 (7.5) torch's and bitsandbytes' own kernels run instead.
TRITON_CAPABILITY = (8, 0)


@functools.cache
def _pairs() -> torch.Tensor:
    """Return the two weights that each byte stands for, side by side in one 8-byte word: int64, [256].

    One look-up per byte then yields two float32 weights.
    """
    levels = codebook("int4")
    byte = torch.arange(256)
    return torch.stack((levels[byte >> 4], levels[byte & 15]), dim=1).contiguous().view(torch.int64).reshape(256)


@functools.cache
def _table(device: torch.device) -> torch.Tensor:
    return _pairs().to(device)


class Stored(NamedTuple):
    """A layer's weight as it is stored.

    Attributes:
        packed: Codes, uint8, [ceil(size / 2)]: two per byte, the first in the upper half.
        absmax: Block scales: uint8 codes, or float32 where `nested_absmax` is None; [ceil(size / block_size)].
        nested_absmax: float32, [ceil(blocks / 256)], or None.
        offset: float32, [], or None.
        block_size: Weights per scale.
        size: How many weights there are.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    offset: torch.Tensor | None
    block_size: int
    size: int


def dequantize_plain(stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize in plain torch, on any device. The Triton kernel returns the same bits.

    Args:
        stored: The layer's stored weight.
        dtype: Dtype of the result; products are computed in float32 and rounded once.

    Returns:
        The weights, [size].
    """
    packed, absmax, nested_absmax, offset, block_size, size = stored
    values = _table(packed.device).index_select(0, packed.int()).view(torch.float32)
    scales = block_scales(absmax, nested_absmax, offset)
    whole = size // block_size
    values[: whole * block_size].view(-1, block_size).mul_(scales[:whole, None])
    if size % block_size:
        values[whole * block_size :].mul_(scales[whole])
    return values[:size].to(dtype)


@functools.cache
def triton_kernel() -> Any:
    """Return `triton_kernel.dequantize`; None where there is no Triton (Windows) or it cannot compile."""
    if torch.cuda.get_device_capability() < TRITON_CAPABILITY:
        return None
    try:
        from . import triton_kernel as four_bit_triton

        codes, ones = torch.zeros(16, dtype=torch.uint8, device="cuda"), torch.ones(16, device="cuda")
        four_bit_triton.dequantize(Stored(codes, ones[:1], None, None, 32, 32), ones, None, torch.float16)
    except Exception as error:  # Triton and its compiler fail in many ways, none of them the user's fault
        logger.warning("4-bit layers go without the kit's CUDA kernel, slower (%s)", " ".join(str(error).split()))
        return None
    return four_bit_triton.dequantize
