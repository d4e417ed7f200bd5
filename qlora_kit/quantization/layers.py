"""Find a model's linear layers of any class: those that can be quantized and can take adapters."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Return whether a module computes `x W^T + b` from its own weight, so that it can be quantized and adapted.

    Args:
        module: Any module. GPT-2's `Conv1D` is linear, and so is a subclass of `nn.Linear` such as Falcon's, or one
            with a parametrization. A subclass that computes something else (a router that returns several tensors)
            is not linear. Nor is a layer whose weight another module reads (`nn.MultiheadAttention`'s output),
            because a layer of another class cannot replace it.
    """
    if not isinstance(module, (nn.Linear, Conv1D)) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    kind = type(module)
    # Quantized layers, bitsandbytes' and the kit's own, hold integers.
    stored: Any = module.weight
    if kind.forward in (nn.Linear.forward, Conv1D.forward) or not stored.is_floating_point():
        return True
    return _computes_a_product(module)


def _computes_a_product(layer: nn.Module) -> bool:
    """Test with a small weight whether a layer's class computes what `nn.Linear` does."""
    small: Any = copy.copy(layer)
    weight = torch.arange(6.0, device="cpu").reshape(3, 2) - 2
    bias = torch.arange(3.0, device="cpu") if layer.bias is not None else None
    rows = torch.arange(8.0, device="cpu").reshape(2, 2, 2) - 3
    wanted = nn.functional.linear(rows, weight, bias)
    small._parameters = {
        "weight": nn.Parameter(weight.T.contiguous() if isinstance(layer, Conv1D) else weight),
        "bias": None if bias is None else nn.Parameter(bias),
    }
    small.in_features, small.out_features, small.nf = 2, 3, 3
    try:
        with torch.no_grad(), torch.device("cpu"):
            result = small(rows)
    except Exception:  # it needs more than a vector, or other sizes
        return False
    return isinstance(result, torch.Tensor) and result.shape == wanted.shape and torch.equal(result, wanted)


def quantizable(model: nn.Module, skip_modules: Iterable[str] = ()) -> list[str]:
    """Return the names of the layers that a 4-bit or 8-bit scheme quantizes.

    Args:
        model: In floating point, on any device.
        skip_modules: Names of modules to skip, with all modules inside them: every head. `"classifier"` means any
            module of that name, `"encoder.layer.0"` only that one.

    Returns:
        Names of linear layers, in the model's order. Layers that share their weight with another module are left out,
        too, and so are those that transformers keeps in 32 bits because they do not work in fewer.
    """
    reasons = why_whole(model, skip_modules)
    return [
        name
        for name, module in model.named_modules()
        if name not in reasons and is_linear(module) and module.weight.is_floating_point()
    ]


def why_whole(model: nn.Module, skip_modules: Iterable[str] = ()) -> dict[str, str]:
    """Return the reason for each `nn.Linear` and `Conv1D` that is not quantized, by name.

    Args:
        model: As `quantizable` takes it.
        skip_modules: As `quantizable` takes it.
    """
    skipped = [f".{name}." for name in skip_modules]
    kept = {f".{name}." for module in model.modules() for name in getattr(module, "_keep_in_fp32_modules", None) or ()}
    shared = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    reasons = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        path = f".{name}."
        if any(skip in path for skip in skipped):
            reasons[name] = "the head"
        elif any(keep in path for keep in kept):
            reasons[name] = "transformers keeps it in 32 bits"
        elif not is_linear(module):
            reasons[name] = f"{type(module).__name__} is no plain linear layer"
        elif shared[id(module._parameters.get("weight"))] > 1:
            reasons[name] = "its weight is shared with another module"
    return reasons


def why_table_whole(embedding: nn.Embedding) -> str | None:
    """Return why an embedding's table cannot be stored in 4 bits, or None where it can.

    Args:
        embedding: In floating point, on any device.
    """
    if embedding.embedding_dim % 64:
        # bitsandbytes would dequantize the whole table at each look-up.
        return f"its rows have {embedding.embedding_dim} numbers, no multiple of the 64 of a block"
    if embedding.max_norm is not None:
        return "a look-up changes its rows (max_norm)"
    return None


def matrices_of(model: nn.Module, skip_modules: Sequence[str]) -> str:
    """Name the module classes that hold a model's matrices, without embeddings, the largest first."""
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) and not set(skip_modules) & set(name.split(".")):
            kind = type(module).__name__
            sizes[kind] = sizes.get(kind, 0) + sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
    largest = sorted((kind for kind in sizes if sizes[kind]), key=lambda kind: -sizes[kind])
    return ", ".join(largest[:3]) or "no module"
