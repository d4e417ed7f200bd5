"""Unquantized weights in 32 or 16 bits: `nn.Linear`, and GPT-2's `Conv1D`, whose weight is transposed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config.quantization import SCHEMES, Quantization
from .backend import Backend, LinearStorage, register


class Plain(Backend):
    """Scheme `none`."""

    layers = (nn.Linear, Conv1D)

    def loading(
        self, spec: Quantization, skip_modules: Sequence[str], compute_dtype: torch.dtype, device: torch.device
    ) -> dict[str, Any]:
        """Read the checkpoint straight to one device; "auto" would spread the model over several."""
        return {"device_map": {"": device}, "quantization_config": None}

    def quantize_(
        self,
        model: nn.Module,
        spec: Quantization,
        skip_modules: Sequence[str],
        compute_dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> nn.Module:
        """Leave the model as it is."""
        return model

    def scheme_of(self, layer: Any) -> str:
        """Return `none`."""
        return "none"

    def storage(self, layer: Any) -> LinearStorage:
        """Measure a weight in floating point."""
        return LinearStorage(False, layer.weight.numel(), layer.weight.numel() * layer.weight.element_size(), 0)

    def shape(self, layer: Any) -> torch.Size:
        """Return the weight's shape, `[out_features, in_features]`."""
        return (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).shape

    def dense_weight(self, layer: Any, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight in `dtype`, without a copy if it has that dtype."""
        return (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).to(dtype)


register(Plain(), {"none": SCHEMES["none"]})
