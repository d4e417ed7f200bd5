"""Attention on a CPU: plain matrix products for short texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# --- attention over short texts on a CPU ------------------------------------------------------------------------

CPU_ATTENTION = "qlora_kit_cpu"
# Longest text in tokens for plain products: beyond it the `[length, length]` products cost more than they save.
PLAIN_UP_TO = 64


def _cpu_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention in fp32, for short texts by plain batched products.

    torch's attention kernel for CPUs works in tiles made for long texts. Over a question's few tokens its forward and
    backward pass take longer than plain products, and longer in bf16 than in fp32.
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
    """Switch a transformers model to the attention that is fastest for short texts on a CPU, in place.

    Args:
        model: Contains a transformers model. One whose class has only its own attention stays as it is.

    Returns:
        The model.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == "sdpa":
            module.set_attn_implementation(CPU_ATTENTION)
    return model
