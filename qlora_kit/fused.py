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

from .int4 import Int4Linear

# --- the adapted layer ------------------------------------------------------------------------------------------


class _AdaptedProduct(torch.autograd.Function):
    """`x W^T + bias + scaling dropped A^T B^T`, with gradients to `x`, `dropped`, `A` and `B`.

    `rows` is `x` as a matrix in the dtype of the products; `dropped` is None where nothing is dropped.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        rows: torch.Tensor,
        dropped: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        base: nn.Module,
    ) -> torch.Tensor:
        dtype = rows.dtype
        adapted = rows if dropped is None else dropped.reshape(-1, x.shape[-1]).to(dtype)
        bias: Any = base.bias
        out = nn.functional.linear(rows, dense_weight(base, dtype), None if bias is None else bias.to(dtype))
        low = adapted @ a.to(dtype).T
        out.addmm_(low, (b * scaling).to(dtype).T)
        ctx.save_for_backward(adapted, low, a, b)
        ctx.scaling, ctx.base, ctx.shape, ctx.given = scaling, base, x.shape, x.dtype
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        adapted, low, a, b = ctx.saved_tensors
        dtype = adapted.dtype
        gradient = gradients[0].reshape(-1, b.shape[0]).to(dtype)
        grad_low = gradient @ (b * ctx.scaling).to(dtype)
        grad_a = (grad_low.T @ adapted).to(a.dtype)
        grad_b = (gradient.T @ low).to(b.dtype).mul_(ctx.scaling)
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = gradient @ dense_weight(ctx.base, dtype)
            if not ctx.needs_input_grad[2]:
                grad_x.addmm_(grad_low, a.to(dtype))
            grad_x = grad_x.view(ctx.shape).to(ctx.given)
        if ctx.needs_input_grad[2]:
            grad_dropped = (grad_low @ a.to(dtype)).view(ctx.shape).to(ctx.given)
        return grad_x, None, grad_dropped, grad_a, grad_b, None, None


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
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    weight: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, absmax, state.blocksize, state.quant_type, state.shape, dtype
    )
    return weight


def fuse_(model: nn.Module) -> nn.Module:
    """Let a PEFT model's adapted linear layers compute as one operation, in place.

    The layers stay PEFT's: their weights, names, saving, loading and merging do not change. PEFT's own forward pass
    is taken wherever a layer does something else than plain LoRA with one active adapter (disabled or merged
    adapters, DoRA, mixed batches, 8-bit bases).

    Args:
        model: Adapted by PEFT.

    Returns:
        The model.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer) and isinstance(module, nn.Module) and _plain(module):
            module.forward = functools.partial(_forward, module, module.forward)
    return model


def _plain(layer: Any) -> bool:
    base = layer.get_base_layer()
    # The layers of 4 bits are nn.Linear too.
    return (
        isinstance(base, (nn.Linear, Conv1D)) and not isinstance(base, bnb.nn.Linear8bitLt) and not layer.lora_variant
    )


def _forward(layer: Any, theirs: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    more = args or kwargs or layer.disable_adapters or layer.merged or len(names) != 1
    if more or not x.numel() or _bitsandbytes_has_a_kernel(x):
        result: torch.Tensor = theirs(x, *args, **kwargs)
        return result
    (name,) = names
    dropout = layer.lora_dropout[name]
    dropping = layer.training and getattr(dropout, "p", 0.0) > 0.0
    product: torch.Tensor = _AdaptedProduct.apply(
        x,
        _rows(x, _compute_dtype(x)),
        dropout(x) if dropping else None,
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        layer.scaling[name],
        layer.get_base_layer(),
    )
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
