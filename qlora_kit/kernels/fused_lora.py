"""A LoRA layer as one operation: base product, low-rank product, scale and sum, forward and backward.

PEFT writes it as a chain of modules. Each module casts its input and the adapter's weights again. The base's output is
copied, scaling and adding are separate passes over `[tokens, out]`, and autograd keeps a tensor of that size. In one
function the sums happen inside the matrix products, and nothing of that size is kept but the adapter's own input.

    y = x W^T + b + s dropout(x) A^T B^T        (LoRA, arXiv 2106.09685, section 4.1; QLoRA, 2305.14314, equation 5)

If W is stored in 4 bits, it is dequantized for each product and never kept.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..quantization.backend import backend_of_layer, dense_weight
from ..system.subclasses import subclass
from .side_by_side import side_by_side
from .streams import Branch

# --- the adapted layer ------------------------------------------------------------------------------------------


# Both functions return a matrix `[tokens, out_features]`, and the caller views it in the input's shape. torch forbids
# in-place changes to a view that the function itself returns, and Falcon adds its two branches in place.


class _AdaptedProduct(torch.autograd.Function):
    """`x W^T + bias + scaling dropped(x) A^T B^T`, with gradients for `x`, `A` and `B`.

    `rows` is `x` as a matrix in the dtype of the products, and `low_a` and `low_b` are `A` and `B` in that dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        rows: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        low_a: torch.Tensor,
        low_b: torch.Tensor,
        scaling: float,
        dropout: float,
        base: nn.Module,
    ) -> torch.Tensor:
        out, adapted, kept, low = _adapted_products(rows, low_a, low_b, scaling, dropout, base)
        ctx.save_for_backward(adapted, kept, low, low_a, low_b)
        ctx.scaling, ctx.dropout, ctx.base = scaling, dropout, base
        ctx.shape, ctx.given, ctx.trained = x.shape, x.dtype, (a.dtype, b.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        adapted, kept, low, low_a, low_b = ctx.saved_tensors
        dtype = adapted.dtype
        gradient = gradients[0].to(dtype)
        weight = None
        if ctx.needs_input_grad[0]:
            with Branch(gradient.device) as dequantizing:
                weight = dense_weight(ctx.base, dtype)
        grad_low = _scaled_product(gradient, low_b, ctx.scaling)
        with Branch(gradient.device) as adapters:
            grad_a = _product_in(ctx.trained[0], grad_low.T, adapted)
            grad_b = _product_in(ctx.trained[1], gradient.T, low)
        grad_x = None
        if weight is not None:
            grad_x = grad_low @ low_a
            if kept is not None:
                grad_x = torch.ops.aten.native_dropout_backward(grad_x, kept, 1 / (1 - ctx.dropout))
            dequantizing.join()
            grad_x.addmm_(gradient, weight)
            weight = None
            grad_x = grad_x.view(ctx.shape).to(ctx.given)
        adapters.join()
        return grad_x, None, grad_a, grad_b, None, None, None, None, None


class _FrozenProduct(torch.autograd.Function):
    """`x W^T + bias` of a frozen 4-bit layer without an adapter, with a gradient for `x`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor, base: nn.Module) -> torch.Tensor:
        ctx.base, ctx.dtype, ctx.shape, ctx.given = base, rows.dtype, x.shape, x.dtype
        return _base_product(rows, dense_weight(base, rows.dtype), base)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient = gradients[0].to(ctx.dtype)
        grad_x = gradient @ dense_weight(ctx.base, ctx.dtype)
        return grad_x.view(ctx.shape).to(ctx.given), None, None


def _adapted_products(
    rows: torch.Tensor, low_a: torch.Tensor, low_b: torch.Tensor, scaling: float, dropout: float, base: nn.Module
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return the product and what its gradients need: input of `A`, dropout's mask (or None), output of `A`."""
    with Branch(rows.device) as dequantizing:
        weight = dense_weight(base, rows.dtype)
    adapted, kept = torch.native_dropout(rows, dropout, True) if dropout else (rows, None)
    low = _scaled_product(adapted, low_a.T, scaling)
    dequantizing.join()
    return _base_product(rows, weight, base).addmm_(low, low_b.T), adapted, kept, low


def _base_product(rows: torch.Tensor, weight: torch.Tensor, base: nn.Module) -> torch.Tensor:
    bias: Any = base.bias
    return nn.functional.linear(rows, weight, None if bias is None else bias.to(rows.dtype))


def _scaled_product(one: torch.Tensor, other: torch.Tensor, scaling: float) -> torch.Tensor:
    # `alpha` scales inside the product: no extra pass over the result or over the weights.
    return torch.addmm(one.new_empty(()), one, other, beta=0, alpha=scaling)


def _product_in(dtype: torch.dtype, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return a product in `dtype`, wider than its factors'. On CUDA its sums are not rounded to their dtype first."""
    if one.is_cuda and one.dtype != dtype:
        return torch.mm(one, other, out_dtype=dtype)
    return (one @ other).to(dtype)


class _Casts:
    """The adapters' weights cast to the dtype of the products, all at once in each forward pass of the model."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        self.weights = weights
        self.inside = False
        self.made: dict[int, torch.Tensor] = {}
        self.dtype: torch.dtype | None = None

    def begin(self, *_: Any) -> None:
        self.inside, self.made = True, {}

    def end(self, *_: Any) -> None:
        self.inside, self.made = False, {}

    def of(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a weight in `dtype`, without gradient."""
        own = weight.detach()
        if weight.dtype == dtype or not self.inside:
            # Outside the model's forward pass (a layer that is recomputed for its backward pass, or called alone) the
            # casts may be out of date.
            return own.to(dtype)
        if not self.made or self.dtype != dtype:
            self.dtype, self.made = dtype, self._make(dtype)
        return self.made[id(weight)] if id(weight) in self.made else own.to(dtype)

    def _make(self, dtype: torch.dtype) -> dict[int, torch.Tensor]:
        alike = [weight for weight in self.weights if weight.device == self.weights[0].device and weight.dtype != dtype]
        _, made = side_by_side(alike, dtype)
        with torch.no_grad():
            torch._foreach_copy_(made, alike)
        return {id(weight): cast for weight, cast in zip(alike, made, strict=True)}


def fuse_(model: nn.Module) -> nn.Module:
    """Make each adapted linear layer of a PEFT model, and each other 4-bit layer, compute as one operation, in place.

    The layers stay PEFT's and bitsandbytes': their weights, names, saving, loading and merging do not change. A layer
    uses PEFT's own forward pass whenever it does anything but plain LoRA with one active adapter (disabled or merged
    adapters, DoRA, mixed batches, 8-bit bases).

    Args:
        model: Adapted by PEFT.

    Returns:
        The model.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer) and _plain(m)]
    casts = _Casts([part.weight for m in layers for kind in (m.lora_A, m.lora_B) for part in kind.values()])
    model.register_forward_pre_hook(casts.begin)
    model.register_forward_hook(casts.end, always_call=True)
    # Subclasses, so that `print(model)` shows them, and PEFT goes on taking the layers for its own.
    kind: Any
    for module in layers:
        kind = type(module)
        module.__class__ = subclass(f"Fused{kind.__name__}", FusedLora, kind)
        module.casts = casts
    adapted = {id(layer.get_base_layer()) for layer in layers}
    for module in model.modules():
        backend = backend_of_layer(module)
        if backend is not None and backend.keeps_its_weight(module) and id(module) not in adapted and _frozen(module):
            kind = type(module)
            module.__class__ = subclass(f"Frozen{kind.__name__}", FrozenLinear, kind)
    return model


class FusedLora:
    """A PEFT LoRA layer that computes plain LoRA with one active adapter as one operation.

    Attributes:
        casts: The adapters' weights in the dtype of the products.
    """

    casts: _Casts

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Apply base layer and adapter: `[..., in_features]` to `[..., out_features]`; arguments as PEFT's."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        more = args or kwargs or self.disable_adapters or self.merged or len(names) != 1
        if more or not x.numel() or _bitsandbytes_has_a_kernel(x):
            result: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]  # PEFT's, mixed in below
            return result
        (name,) = names
        dtype = _compute_dtype(x)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        low_a, low_b = self.casts.of(a, dtype), self.casts.of(b, dtype)
        dropout = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
        rows, scaling, base = _rows(x, dtype), self.scaling[name], self.get_base_layer()
        if not dropout and not torch.is_grad_enabled():
            # For a short text, autograd's overhead takes as long as the products.
            return _adapted_products(rows, low_a, low_b, scaling, 0.0, base)[0].view(*x.shape[:-1], -1)
        product: torch.Tensor = _AdaptedProduct.apply(x, rows, a, b, low_a, low_b, scaling, dropout, base)
        return product.view(*x.shape[:-1], -1)


class FrozenLinear:
    """A frozen layer without adapter that dequantizes its weight again in the backward pass and does not keep it."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """Multiply: `[..., in_features]` to `[..., out_features]`."""
        if not x.numel() or _bitsandbytes_has_a_kernel(x):
            result: torch.Tensor = super().forward(x)  # type: ignore[misc]  # the layer's own, mixed in below
            return result
        product: torch.Tensor = _FrozenProduct.apply(x, _rows(x, _compute_dtype(x)), self)
        return product.view(*x.shape[:-1], -1)


def _plain(layer: Any) -> bool:
    base = layer.get_base_layer()
    backend = backend_of_layer(base)
    return backend is not None and backend.fuses(base) and not layer.lora_variant and _frozen(base)


def _frozen(base: nn.Module) -> bool:
    # With `lora.bias` other than none the bias is trained, and the functions here give it no gradient.
    return not any(parameter.requires_grad for parameter in base.parameters())


def _bitsandbytes_has_a_kernel(x: torch.Tensor) -> bool:
    # For up to 32 tokens without a gradient (a prediction of one short text), bitsandbytes multiplies on a GPU by the
    # 4-bit weights without dequantizing them first (0.50, backends/cuda/ops.py).
    return x.is_cuda and not torch.is_grad_enabled() and x.numel() <= 32 * x.shape[-1]


_cast_rows: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `x` as `[tokens, features]` in `dtype`; query, key and value have one input and share its cast."""
    if x.dtype == dtype or x.is_inference():  # an inference tensor has no version, and nothing keeps its cast
        return x.detach().reshape(-1, x.shape[-1]).to(dtype)
    version, known = _cast_rows.get(x, (None, None))
    rows: torch.Tensor | None = known() if known is not None and version == x._version else None
    if rows is None or rows.dtype != dtype:
        rows = x.detach().reshape(-1, x.shape[-1]).to(dtype)
        # A weak reference: autograd keeps the cast as long as a backward pass needs it.
        _cast_rows[x] = (x._version, weakref.ref(rows))
    return rows


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    # A memory plan runs on the meta device and stands for a GPU.
    device = "cuda" if x.is_meta else x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
