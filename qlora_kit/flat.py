"""Tensors side by side in one: what is done to all of them is done at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

ALIGNMENT = 128  # bytes, for the kernels that read a part alone


def side_by_side(like: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Make one tensor with a place for each of several.

    Args:
        like: Tensors of any shapes, on one device.
        dtype: Of the tensor that is made.

    Returns:
        The tensor, one-dimensional and not filled, and its parts: views with the shapes and strides of `like`.
    """
    step = ALIGNMENT // dtype.itemsize
    places = [0, *itertools.accumulate(-(-tensor.numel() // step) * step for tensor in like)]
    flat = torch.empty(places[-1], dtype=dtype, device=like[0].device)
    parts = [flat.as_strided(t.shape, t.stride(), place) for t, place in zip(like, places, strict=False)]
    return flat, parts
