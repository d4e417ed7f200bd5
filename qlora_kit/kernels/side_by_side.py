"""Several tensors as parts of one flat tensor, so that one operation covers all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

ALIGNMENT = 128  # bytes; kernels that read a single part need it


def side_by_side(like: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Make one flat tensor with room for several tensors.

    Args:
        like: Tensors of any shapes, on one device.
        dtype: Dtype of the new tensor.

    Returns:
        The tensor, one-dimensional and uninitialized, and its parts: views with the shapes and strides of `like`.
    """
    step = ALIGNMENT // dtype.itemsize
    places = [0, *itertools.accumulate(-(-tensor.numel() // step) * step for tensor in like)]
    flat = torch.empty(places[-1], dtype=dtype, device=like[0].device)
    parts = [flat.as_strided(t.shape, t.stride(), place) for t, place in zip(like, places, strict=False)]
    return flat, parts
