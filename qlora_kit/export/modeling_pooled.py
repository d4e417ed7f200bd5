"""A text classifier with a head on an encoder's pooled states, for transformers.

transformers has no class for it: its own classes classify from other states, and would fill the missing head with
random numbers. So this file is copied beside the weights, and

    AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    pipeline("text-classification", folder, trust_remote_code=True)

read it. Without `trust_remote_code` they refuse the folder: transformers does not know the model type. The file needs
torch and transformers alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

POOLINGS = ("mean", "last")
HEADS = ("linear", "cosine")


class PooledConfig(PretrainedConfig):
    """The configuration of `PooledForSequenceClassification`.

    Args:
        base: The base's configuration, as its `to_dict()` gives it.
        pooling: `mean` of a text's token states, or the state of its `last` token.
        head: `linear`, or `cosine`: `scale` times the cosine of the pooled states and each class's direction.
        scale: Factor of the cosines.
        width: Size of a token's state; None for the base's `hidden_size`.
        **more: As for every configuration of transformers; `id2label` has the labels.

    Raises:
        ValueError: When pooling or head is none of these.
    """

    model_type = "qlora_kit_pooled"

    def __init__(
        self,
        base: dict[str, Any] | None = None,
        pooling: str = "mean",
        head: str = "linear",
        scale: float = 1.0,
        width: int | None = None,
        **more: Any,
    ) -> None:
        for name, value, allowed in (("pooling", pooling, POOLINGS), ("head", head, HEADS)):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}, allowed: {', '.join(allowed)}")
        self.base, self.pooling, self.head, self.scale, self.width = base, pooling, head, scale, width
        super().__init__(**more)


class PooledForSequenceClassification(PreTrainedModel):
    """A base, the pooled states of a text's tokens, and a head of fp32 on them.

    Args:
        config: Its configuration.
    """

    config_class = PooledConfig
    base_model_prefix = "base"
    # In 16 bits, too, the head stays what it was trained as.
    _keep_in_fp32_modules_strict = {"classifier"}  # noqa: RUF012

    def __init__(self, config: PooledConfig) -> None:
        super().__init__(config)
        settings = dict(config.base or {})
        described = AutoConfig.for_model(settings.pop("model_type"), **settings)
        self.base = AutoModel.from_config(described)
        if isinstance(getattr(self.base, "pooler", None), nn.Module):
            self.base.pooler = nn.Identity()  # BERT's: nothing here reads it, and no weights of it are kept
        width = config.width or described.get_text_config().hidden_size
        self.classifier = nn.Linear(
            width, len(config.id2label or ()), bias=config.head == "linear", dtype=torch.float32
        )
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **more: Any,
    ) -> SequenceClassifierOutput:
        """Classify a batch of texts.

        Args:
            input_ids: Token ids, int64 `[batch, length]`.
            attention_mask: 1 for tokens and 0 for padding, `[batch, length]`; None if nothing is padding.
            labels: Class ids, int64 `[batch]`, or None.
            token_type_ids: No effect: a tokenizer may return them, and the model was trained without.
            **more: No effect.

        Returns:
            Logits `[batch, num_labels]`, and the mean cross-entropy where labels were given.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        states = self.base(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        if self.config.pooling == "mean":
            mask = attention_mask.unsqueeze(-1).to(torch.float32)
            pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1.0)
        else:
            last = attention_mask.long().cumsum(1).argmax(1)
            pooled = states[torch.arange(len(states), device=states.device), last]
        if self.config.head == "cosine":
            directions = nn.functional.normalize(self.classifier.weight, dim=-1)
            logits = self.config.scale * nn.functional.linear(nn.functional.normalize(pooled, dim=-1), directions)
        else:
            logits = self.classifier(pooled)
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return SequenceClassifierOutput(loss=loss, logits=logits)
