"""Norms and GELUs that keep smaller activations for the backward pass."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from transformers.activations import NewGELUActivation

from ..system.subclasses import subclass


def make_lean_(model: nn.Module) -> nn.Module:
    """Make a model keep smaller activations, in place; the mathematics stays the same.

    Autocast computes norms in fp32 and returns fp32, so every later layer and its residual sum keep fp32 tensors. Here
    a norm returns its input's dtype. GPT-2's GELU is written as seven operations, and autocast computes its power in
    fp32: it keeps several times its input for the backward pass. torch's own `gelu` has the same formula and keeps
    only its input.

    Args:
        model: A classifier without adapters.

    Returns:
        The model.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, NewGELUActivation):
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], nn.GELU("tanh"))
        elif isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward:
            # A subclass may compute something else: Nemotron's adds 1 to its weight.
            kind: Any = type(module)
            # A subclass that computes the same may have other methods, so its class stays a base.
            lean = LeanLayerNorm if kind is nn.LayerNorm else subclass(f"Lean{kind.__name__}", LeanLayerNorm, kind)
            module.__class__ = lean
    return model


class LeanLayerNorm(nn.LayerNorm):
    """A norm that returns its input's dtype even under autocast; its sums are in fp32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimensions: `[..., normalized_shape]`."""
        # torch's kernel sums in fp32 for any input dtype. The meta device has no autocast.
        with contextlib.nullcontext() if input.is_meta else torch.autocast(input.device.type, enabled=False):
            weight, bias = (None if part is None else part.to(input.dtype) for part in (self.weight, self.bias))
            return torch.native_layer_norm(input, self.normalized_shape, weight, bias, self.eps)[0]
