"""A text classifier with a head on an encoder's pooled states, for transformers.

transformers has no class for it: its own classes classify from other states, and would fill the missing head with
random numbers. So this file is copied beside the weights, and

    AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    pipeline("text-classification", folder, trust_remote_code=True)

read it. Without `trust_remote_code` they refuse the folder: transformers does not know the model type. The file needs
torch and transformers alone.

A folder may hold adapters and a head for PEFT, without the base. Its `config.json` then says where the base is, and

    AutoPeftModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)

fetches the base and puts adapters and head on it. The base alone gives no labels: it has no head.
"""

from __future__ import annotations

import os
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
        elsewhere: None if all weights are in this folder. Else where the base's weights are: `name` (a name on the hub,
            or a folder) and `revision` (None for the main branch); and `adapter`, the checksum of the adapters that the
            folder was written with.
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
        elsewhere: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        for name, value, allowed in (("pooling", pooling, POOLINGS), ("head", head, HEADS)):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}, allowed: {', '.join(allowed)}")
        self.base, self.pooling, self.head, self.scale, self.width = base, pooling, head, scale, width
        self.elsewhere = elsewhere
        super().__init__(**more)


class Cosines(nn.Linear):
    """A head of fp32: a factor times the cosine of a vector and each class's direction.

    Args:
        width: Size of the vectors.
        labels: Number of classes.
        scale: The factor.
    """

    def __init__(self, width: int, labels: int, scale: float) -> None:
        super().__init__(width, labels, bias=False, dtype=torch.float32)
        self.scale = scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return logits, fp32 `[batch, labels]`, of vectors, fp32 `[batch, width]`."""
        directions = nn.functional.normalize(self.weight, dim=-1)
        return self.scale * nn.functional.linear(nn.functional.normalize(input, dim=-1), directions)


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
        labels = len(config.id2label or ())
        if config.head == "cosine":
            self.classifier: nn.Linear = Cosines(width, labels, config.scale)
        else:
            self.classifier = nn.Linear(width, labels, dtype=torch.float32)
        self._lacks_head = False
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> PooledForSequenceClassification:
        """Open a folder with all weights, or fetch the base of a folder with adapters for PEFT.

        Args:
            pretrained_model_name_or_path: A folder, or a repository's name on the hub.
            *model_args: As for every model of transformers.
            config: Its configuration, if it is read already.
            **kwargs: As for every model of transformers. `dtype` is fp32 by default where the base is fetched.

        Returns:
            The model. Where the base was fetched, its head is missing until PEFT loads it, and it refuses texts.

        Raises:
            ValueError: When the folder is not the one that the adapters were written with.
        """
        folder = pretrained_model_name_or_path
        if config is None:
            config, kwargs = PooledConfig.from_pretrained(folder, return_unused_kwargs=True, **kwargs)
        if not config.elsewhere:
            opened: PooledForSequenceClassification = super().from_pretrained(
                folder, *model_args, config=config, **kwargs
            )
            return opened
        # PEFT hands over the `revision` of adapter_config.json. The folder may hold another run by now.
        asked = kwargs.pop("revision", None)
        if os.path.isdir(folder) and asked not in (None, config.elsewhere["adapter"]):
            raise ValueError(
                f"{folder} holds other adapters now than those that are being opened: export the run again"
            )
        for name in ("adapter_kwargs", "subfolder", "trust_remote_code", "output_loading_info"):
            kwargs.pop(name, None)
        kwargs.setdefault("dtype", torch.float32)
        settings = dict(config.base or {})
        described = AutoConfig.for_model(settings.pop("model_type"), **settings)
        name, at = config.elsewhere["name"], config.elsewhere["revision"]
        base = AutoModel.from_pretrained(name, config=described, revision=at, **kwargs)
        with torch.device("meta"):
            model = cls(config)
        if isinstance(getattr(base, "pooler", None), nn.Module):
            base.pooler = nn.Identity()
        for layer in base.modules():
            # On a CPU with AVX512-BF16 bitsandbytes would round the scales to bf16, and compute in bf16.
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False
        model.base = base
        # No random numbers: PEFT puts the trained head in this place.
        model.classifier = model.classifier.to_empty(device=base.device)
        for weight in model.classifier.parameters():
            nn.init.constant_(weight, torch.nan)
        model._lacks_head = True
        for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # PEFT reads them
            setattr(model, flag, getattr(base, flag, False))
        return model.eval()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save all weights, the base's included, as every model of transformers does."""
        elsewhere, self.config.elsewhere = self.config.elsewhere, None
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.config.elsewhere = elsewhere

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
        logits = self.classifier(pooled)
        if self._lacks_head:  # looked at until PEFT has loaded it
            if bool(torch.isnan(logits).any()):
                raise RuntimeError(
                    "this is the base alone, without trained adapters and head: open the folder with "
                    "peft.AutoPeftModelForSequenceClassification, or call peft.PeftModel.from_pretrained(model, folder)"
                )
            self._lacks_head = False
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return SequenceClassifierOutput(loss=loss, logits=logits)
