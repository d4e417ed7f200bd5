"""Classification heads: pooled states, cosine similarity, a linear layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..config.sections import HEADS, Head
from ..errors import KitError
from ..system.safe_peft import peft
from .precision import computing

# --- head -------------------------------------------------------------------------------------------------------


class CosineHead(nn.Linear):
    """A linear layer without bias that ignores vectors' lengths: `SCALE` times the cosine of input and weight.

    A sentence encoder is trained to put meaning into the direction of a vector. Its length is noise that a linear
    head has to learn to ignore (NormFace, arXiv 1704.06369, section 3.3).

    Args:
        in_features: Size of the vectors.
        out_features: Number of classes.
    """

    SCALE = 16.0

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return logits between -16 and 16, fp32 `[..., out_features]`, of vectors `[..., in_features]`."""
        # The meta device has no autocast.
        with contextlib.nullcontext() if input.is_meta else torch.autocast(input.device.type, enabled=False):
            directions = nn.functional.normalize(input.float(), dim=-1)
            return self.SCALE * nn.functional.linear(directions, nn.functional.normalize(self.weight.float(), dim=-1))


class PooledClassifier(nn.Module):
    """An encoder whose token states are averaged, under one linear head.

    Sentence encoders are trained so that the mean of a text's token states is its embedding. A head on that mean
    starts from what the model already knows; one on BERT's pooler (trained on another task) does not.

    Args:
        base: The encoder, `AutoModel`'s class.
        num_labels: Number of classes.
        width: Size of a token's state.
        head: One of `HEADS`.
    """

    main_input_name = "input_ids"
    base_model_prefix = "base"

    def __init__(self, base: transformers.PreTrainedModel, num_labels: int, width: int, head: str = "linear") -> None:
        super().__init__()
        self.base = base
        self.config = base.config
        self.classifier = make_head(head, base.config, num_labels, width)

    @property
    def base_model(self) -> transformers.PreTrainedModel:
        """The encoder, under the name that transformers' own classes use."""
        return self.base

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput:
        """Classify a batch of texts.

        Args:
            input_ids: Token ids, int64 `[batch, length]`.
            attention_mask: 1 for tokens and 0 for padding, `[batch, length]`.
            labels: Class ids, int64 `[batch]`, or None.
            inputs_embeds: No effect: PEFT passes this and the following arguments to any model.
            output_attentions: No effect.
            output_hidden_states: No effect.
            return_dict: No effect: the result is always a `SequenceClassifierOutput`.

        Returns:
            Logits `[batch, num_labels]`, and the mean cross-entropy where labels were given.
        """
        states = self.base(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.classifier(mean_pool(states, attention_mask).to(self.classifier.weight.dtype))
        loss = nn.functional.cross_entropy(logits.float(), labels) if labels is not None else None
        return SequenceClassifierOutput(loss=loss, logits=logits)


def start_head_from_class_means_(model: nn.Module, states: np.ndarray, labels: Sequence[int]) -> None:
    """Set each class's weight to the mean direction of its texts, in place.

    Args:
        model: As `build` made it, with a cosine head on the mean of the token states.
        states: The training texts' pooled states under this model, float32 `[rows, hidden]`.
        labels: Their class ids, `[rows]`. A class without rows keeps its random weight.
    """
    inner: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    head = inner.classifier
    if isinstance(head, peft.utils.ModulesToSaveWrapper):
        head = head.modules_to_save["default"]
    directions = nn.functional.normalize(torch.from_numpy(states), dim=-1)
    ids = torch.tensor(labels)
    sums = torch.zeros(head.weight.shape).index_add_(0, ids, directions)
    present = torch.bincount(ids, minlength=len(sums)) > 0
    with torch.no_grad():
        head.weight[present] = nn.functional.normalize(sums[present], dim=-1).to(head.weight.device)


_layers: dict[str, Callable[[int, int], nn.Linear]] = {"linear": nn.Linear, "cosine": CosineHead}


def register_head(name: str, layer: Callable[[int, int], nn.Linear], kind: Head) -> None:
    """Register a kind of head, so that `model.head` accepts its name.

    Args:
        name: Its name.
        layer: A class, or a function, that makes the head from the size of its input and the number of classes. The
            head has a `weight` `[classes, size]`, takes vectors `[..., size]` and returns logits `[..., classes]`.
        kind: What can be done with it.

    Raises:
        KitError: When there is a head of that name already.
    """
    if name in _layers:
        raise KitError(f"there is a head {name!r} already")
    _layers[name], HEADS[name] = layer, kind


def make_head(kind: str, config: transformers.PretrainedConfig, num_labels: int, width: int) -> nn.Linear:
    """Make a head with random weights.

    Args:
        kind: One of `HEADS`.
        config: The base's configuration.
        num_labels: Number of classes.
        width: Size of the input vectors.
    """
    layer = _layers[kind](width, num_labels)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    # Initialized as transformers' own heads are.
    nn.init.normal_(layer.weight, std=getattr(config.get_text_config(), "initializer_range", 0.02))
    return layer


def width_of_states(base: Any, device: torch.device, precision: str, length: int) -> int:
    """Return the size of the states that a base outputs: OPT-350m has 1,024 inside but outputs 512.

    Args:
        base: A model of `AutoModel`'s class. If it cannot be run this way, its `hidden_size` is returned.
        device: Where it is; on the meta device no 4-bit layer can be run.
        precision: `fp32`, `fp16` or `bf16`.
        length: Tokens of the longest text: after a short text BigBird switches to another attention for good.
    """
    ids = torch.zeros((1, length), dtype=torch.long, device=device)
    try:
        with torch.no_grad(), computing(device, precision):
            states = base.eval()(input_ids=ids).last_hidden_state  # a mask cannot be read on the meta device
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception:
        return int(base.config.get_text_config().hidden_size)
    return int(states.shape[-1])


def mean_pool(states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Average token states over each text's real tokens.

    Args:
        states: `[batch, length, hidden]`, any floating dtype.
        attention_mask: 1 for tokens and 0 for padding, `[batch, length]`.

    Returns:
        `[batch, hidden]` in fp32.
    """
    mask = attention_mask.unsqueeze(-1).to(torch.float32)
    return (states.float() * mask).sum(1) / mask.sum(1).clamp(min=1.0)


def last_tokens(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the column of each text's last token, on whichever side it is padded, and whatever that token is.

    Args:
        attention_mask: 1 for tokens and 0 for padding, `[batch, length]`.

    Returns:
        Int64 `[batch]`.
    """
    return attention_mask.long().cumsum(1).argmax(1)


def head_modules(model: nn.Module) -> list[str]:
    """Return the names of a classifier's modules outside its base: all that is newly initialized.

    They must never be quantized, and must always be trained and saved: GPT-2's `score`, RoBERTa's `classifier`
    with its two layers, DistilBERT's `pre_classifier` and `classifier`.
    """
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]


def is_head_parameter(name: str) -> bool:
    """Return whether a parameter's name (in a model with adapters) is the trained copy of the head."""
    return ".modules_to_save." in name


def head_parameters(model: nn.Module) -> set[str]:
    """Return the names of the head's trained parameters, in a model with adapters or without."""
    names = {name for name, _ in model.named_parameters()}
    if isinstance(model, peft.PeftModel):
        return {name for name in names if is_head_parameter(name)}
    heads = head_modules(model)
    return {name for name in names if name.split(".")[0] in heads}


def check_head(model: nn.Module, heads: Sequence[str]) -> None:
    """Check that the head is unquantized, trained and fp32, and that adapters are fp32: the whole kit relies on it.

    Raises:
        RuntimeError: When a head holds a quantized layer, does not train, or a trainable weight is not fp32.
    """
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    for head in heads:
        wrapped = inner.get_submodule(head)
        if not isinstance(wrapped, peft.utils.ModulesToSaveWrapper):
            raise RuntimeError(f"the head {head} is not in modules_to_save: it would be neither trained nor saved")
        for name, module in wrapped.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and not weight.is_floating_point():
                raise RuntimeError(f"the head's layer {head}.{name} was quantized ({type(module).__name__})")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise RuntimeError(f"the trainable weight {name} is {parameter.dtype}, not fp32")
