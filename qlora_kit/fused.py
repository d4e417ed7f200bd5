"""LoRA's whole layer as one operation: base product, low-rank product, scale and sum, forward and backward.

PEFT writes it as a chain of modules. Each link casts its input and the adapter's weights again, copies the base's
output, scales and adds in passes of their own over `[tokens, out]`, and leaves autograd a tensor of that size to
keep. Written as one function the sums happen inside the matrix products and nothing of that size is kept beyond
the adapter's own input.

    y = x W^T + b + s dropout(x) A^T B^T        (LoRA, arXiv 2106.09685, section 4.1; QLoRA, 2305.14314, equation 5)

With W stored in 4 bits it is dequantized for each product and never kept.
"""

from __future__ import annotations

import functools
import math
import weakref
from typing import Any

# Before anything that imports bitsandbytes by itself.
from ._bnb import bnb  # isort: skip
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from .flat import side_by_side
from .graphs import Branch
from .int4 import Int4Linear, Stored, triton_kernel
from .quantization import NESTED_BLOCK_SIZE

# --- the adapted layer ------------------------------------------------------------------------------------------


class _AdaptedProduct(torch.autograd.Function):
    """`x W^T + bias + scaling dropped(x) A^T B^T`, with gradients to `x`, `A` and `B`.

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
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        adapted, kept, low, low_a, low_b = ctx.saved_tensors
        dtype = adapted.dtype
        gradient = gradients[0].reshape(-1, low_b.shape[0]).to(dtype)
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
    """`x W^T + bias` of a frozen layer in 4 bits without an adapter, with a gradient to `x`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor, base: nn.Module) -> torch.Tensor:
        ctx.base, ctx.dtype, ctx.shape, ctx.given = base, rows.dtype, x.shape, x.dtype
        out = _base_product(rows, dense_weight(base, rows.dtype), base)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1]).to(ctx.dtype)
        grad_x = gradient @ dense_weight(ctx.base, ctx.dtype)
        return grad_x.view(ctx.shape).to(ctx.given), None, None


def _adapted_products(
    rows: torch.Tensor, low_a: torch.Tensor, low_b: torch.Tensor, scaling: float, dropout: float, base: nn.Module
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return the product, and what its gradients need: what `A` was given, what dropout kept of it, what `A` made."""
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
    # The scale goes into the product's own: no pass over the result, nor over the weights.
    return torch.addmm(one.new_empty(()), one, other, beta=0, alpha=scaling)


def _product_in(dtype: torch.dtype, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return a product in a wider dtype than its factors': on CUDA its sums are, and need not be rounded first."""
    if one.is_cuda and one.dtype != dtype:
        return torch.mm(one, other, out_dtype=dtype)
    return (one @ other).to(dtype)


def dense_weight(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Return a frozen linear layer's weight as `[out_features, in_features]` in `dtype`, whatever it is stored in.

    Args:
        layer: `nn.Linear`, GPT-2's `Conv1D`, bitsandbytes' `Linear4bit` or the kit's `Int4Linear`.
        dtype: Of the result.
    """
    if isinstance(layer, Int4Linear):
        return layer.dequantize(dtype)
    weight: Any = layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        return _dequantized(weight.data, weight.quant_state, dtype)
    return (weight.T if isinstance(layer, Conv1D) else weight).to(dtype)


def _dequantized(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    # bitsandbytes' own function has no choice of dtype; a cast after it would be another pass over the weight.
    kernel = triton_kernel() if packed.is_cuda else None
    if kernel is not None and (not state.nested or state.state2.blocksize == NESTED_BLOCK_SIZE):
        nested, offset, scale_levels = (
            (state.state2.absmax, state.offset, state.state2.code) if state.nested else (None, None, None)
        )
        stored = Stored(packed, state.absmax, nested, offset, state.blocksize, math.prod(state.shape))
        values: torch.Tensor = kernel(stored, state.code, scale_levels, dtype)
        return values.view(state.shape)
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    weight: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, absmax, state.blocksize, state.quant_type, state.shape, dtype
    )
    return weight


class _Casts:
    """The adapters' weights in the dtype of the products, made all at once in each forward pass of the model."""

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
            # Outside of the model's forward pass (a layer that is recomputed for its backward pass, or called by
            # itself) nobody says when weights have changed.
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
    """Let a PEFT model's adapted linear layers compute as one operation, and its other 4-bit ones too, in place.

    The layers stay PEFT's and bitsandbytes': their weights, names, saving, loading and merging do not change. PEFT's
    own forward pass is taken wherever a layer does something else than plain LoRA with one active adapter (disabled or
    merged adapters, DoRA, mixed batches, 8-bit bases).

    Args:
        model: Adapted by PEFT.

    Returns:
        The model.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer) and _plain(m)]
    casts = _Casts([part.weight for m in layers for kind in (m.lora_A, m.lora_B) for part in kind.values()])
    model.register_forward_pre_hook(casts.begin)
    model.register_forward_hook(casts.end, always_call=True)
    for module in layers:
        module.forward = functools.partial(_forward, module, module.forward, casts)
    adapted = {id(layer.get_base_layer()) for layer in layers}
    others: list[Any] = [m for m in model.modules() if type(m) is bnb.nn.Linear4bit and id(m) not in adapted]
    for other in filter(_frozen, others):
        other.forward = functools.partial(_frozen_forward, other, other.forward)
    return model


def _frozen_forward(base: Any, theirs: Any, x: torch.Tensor) -> torch.Tensor:
    if not x.numel() or _bitsandbytes_has_a_kernel(x):
        result: torch.Tensor = theirs(x)
        return result
    product: torch.Tensor = _FrozenProduct.apply(x, _rows(x, _compute_dtype(x)), base)
    return product


def _plain(layer: Any) -> bool:
    base = layer.get_base_layer()
    # The layers of 4 bits are nn.Linear too.
    return (
        isinstance(base, (nn.Linear, Conv1D))
        and not isinstance(base, bnb.nn.Linear8bitLt)
        and not layer.lora_variant
        and _frozen(base)
    )


def _frozen(base: nn.Module) -> bool:
    # With `lora.bias` other than none its bias is trained, to which the functions here give no gradient.
    return not any(parameter.requires_grad for parameter in base.parameters())


def _forward(layer: Any, theirs: Any, casts: _Casts, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    more = args or kwargs or layer.disable_adapters or layer.merged or len(names) != 1
    if more or not x.numel() or _bitsandbytes_has_a_kernel(x):
        result: torch.Tensor = theirs(x, *args, **kwargs)
        return result
    (name,) = names
    dtype = _compute_dtype(x)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    low_a, low_b = casts.of(a, dtype), casts.of(b, dtype)
    dropout = getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0
    rows, scaling, base = _rows(x, dtype), layer.scaling[name], layer.get_base_layer()
    if not dropout and not torch.is_grad_enabled():  # autograd's part takes as long as a short text's small products
        return _adapted_products(rows, low_a, low_b, scaling, 0.0, base)[0].view(*x.shape[:-1], -1)
    product: torch.Tensor = _AdaptedProduct.apply(x, rows, a, b, low_a, low_b, scaling, dropout, base)
    return product


def _bitsandbytes_has_a_kernel(x: torch.Tensor) -> bool:
    # For up to 32 tokens without a gradient it multiplies on a GPU by 4-bit weights as they are, dequantizing none
    # (0.50, backends/cuda/ops.py): a prediction of one short text.
    return x.is_cuda and not torch.is_grad_enabled() and x.numel() <= 32 * x.shape[-1]


_cast_rows: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `x` as `[tokens, features]` in `dtype`; query, key and value, which share their input, share its cast."""
    if x.dtype == dtype or x.is_inference():  # an inference tensor has no version, and nothing keeps its cast
        return x.detach().reshape(-1, x.shape[-1]).to(dtype)
    version, known = _cast_rows.get(x, (None, None))
    rows: torch.Tensor | None = known() if known is not None and version == x._version else None
    if rows is None or rows.dtype != dtype:
        rows = x.detach().reshape(-1, x.shape[-1]).to(dtype)
        # Weakly: autograd keeps it as long as a backward pass needs it.
        _cast_rows[x] = (x._version, weakref.ref(rows))
    return rows


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    # A plan's shapes stand for a GPU's.
    device = "cuda" if x.is_meta else x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


# --- attention over short texts on a CPU ------------------------------------------------------------------------

CPU_ATTENTION = "qlora_kit_cpu"
# Above it the plain way's `[length, length]` products outgrow what it saves.
PLAIN_UP_TO = 64


def _cpu_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend in fp32, and for short texts by plain batched products.

    torch's attention kernel for CPUs works in tiles made for long texts: at 17 tokens its forward and backward pass
    take 2.5 times as long as plain products, and in bf16 five times as long as in fp32.
    """
    backends = [torch.nn.attention.SDPBackend.MATH]
    if query.shape[2] > PLAIN_UP_TO:
        backends.append(torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    device = "cpu" if query.is_meta else query.device.type
    mask = (
        attention_mask.float() if attention_mask is not None and attention_mask.is_floating_point() else attention_mask
    )
    with torch.autocast(device, enabled=False), torch.nn.attention.sdpa_kernel(backends):
        out, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **kwargs)
    return out.to(query.dtype), None


AttentionInterface.register(CPU_ATTENTION, _cpu_attention)
AttentionMaskInterface.register(CPU_ATTENTION, sdpa_mask)


def use_cpu_attention_(model: nn.Module) -> nn.Module:
    """Let a transformers model attend the way that is fastest for short texts on a CPU, in place.

    Args:
        model: Holds a transformers model; one whose class attends in no other way than its own stays as it is.

    Returns:
        The model.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == "sdpa":
            module.set_attn_implementation(CPU_ATTENTION)
    return model
