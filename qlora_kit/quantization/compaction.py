"""Move a model's weights on a GPU into memory without gaps.

Weights are quantized one after another, each next to its 16-bit original. Where the original was, a gap is left, and
CUDA's caching allocator cannot give back a segment that still holds anything. The gaps can be larger than the weights,
as with OPT-350m in NF4. What a step needs later does not fit into the gaps, so more is reserved than a plan can know.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from .storage import tensors_of

logger = logging.getLogger(__name__)


def compact_(model: nn.Module) -> None:
    """Move a model's weights on a GPU into memory without gaps, in place, through the host's memory.

    Args:
        model: A model on one device. Nothing is done unless that is a GPU. Weights that share memory still share it
            afterwards. No CUDA graph may have been captured of the model.
    """
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    if device.type != "cuda":
        return
    gc.collect()
    torch.cuda.empty_cache()
    gaps = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    size = sum(tensors[0].untyped_storage().nbytes() for tensors in tensors_of(model).values())
    if gaps < size // 100:
        return
    if _available() < 2 * size:
        logger.warning(
            "The model's weights lie in GPU memory with gaps of %d MiB, and the host has no room to move them.",
            gaps >> 20,
        )
        return
    move_(model, lambda storage: storage.cpu())
    torch.cuda.empty_cache()
    move_(model, lambda storage: storage.to(device=device))


def _available() -> float:
    """Return the available bytes of host memory; infinity if the system does not say."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    return float("inf")


def move_(model: nn.Module, to: Callable[[torch.UntypedStorage], torch.UntypedStorage]) -> None:
    """Move all that a model stores, in the model's order, each storage once.

    `nn.Module.to` skips some of the scales and tables of quantized weights, and moves a storage twice if two tensors
    share it.

    Args:
        model: The model. Its tensors stay the same objects.
        to: Returns a copy of a storage in the new place.
    """
    for tensors in tensors_of(model).values():
        moved = to(tensors[0].untyped_storage())
        for tensor in tensors:
            place = (tensor.storage_offset(), tensor.shape, tensor.stride())
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=moved.device).set_(moved, *place)
