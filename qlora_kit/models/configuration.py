"""A base's configuration, and what a classifier needs from it: positions, layers, pooling."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import transformers
from torch import nn

from ..config.sections import ModelSpec
from ..errors import KitError
from ..system.devices import quiet
from ..system.safe_peft import peft
from .sources import _readable, find_base


def load_config(spec: ModelSpec, **changes: Any) -> transformers.PretrainedConfig:
    """Read a base model's configuration, without weights.

    Args:
        spec: Which base.
        **changes: Values to set in it.

    Returns:
        The configuration, with `spec.layers` layers where that is given.

    Raises:
        KitError: When it cannot be read, or has fewer layers.
    """
    base = find_base(spec)
    with quiet(), _readable(spec.name):
        config: Any = transformers.AutoConfig.from_pretrained(
            base.source, revision=base.revision, trust_remote_code=False, **changes
        )
    for part in (config, config.get_text_config()):  # one and the same for most models
        # The experiment decides how a model is run. A file might name an attention from the hub, which is code.
        part._attn_implementation, part.return_dict = None, True
        part.output_hidden_states = part.output_attentions = False
        if hasattr(part, "gradient_checkpointing"):
            part.gradient_checkpointing = False
    if spec.layers is not None:
        inner: Any = config.get_text_config()
        if spec.layers > inner.num_hidden_layers:
            raise KitError(f"model.layers is {spec.layers}: {spec.name} has {inner.num_hidden_layers}")
        inner.num_hidden_layers = spec.layers
        if getattr(inner, "layer_types", None):
            inner.layer_types = inner.layer_types[: spec.layers]
    return config


def is_decoder(config: transformers.PretrainedConfig) -> bool:
    """Return whether a model reads from left to right: its config maps only to a causal language model."""
    mapping = transformers.models.auto.modeling_auto
    model_type = config.model_type
    causal = model_type in mapping.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = model_type in mapping.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return causal and not masked


def resolve_pooling(spec: ModelSpec, config: transformers.PretrainedConfig) -> str:
    """Return `mean` or `sequence_classification`, and refuse models that have neither.

    Args:
        spec: The model's spec.
        config: The model's config.

    Raises:
        KitError: For encoder-decoders such as T5, and for `sequence_classification` of a model that transformers has
            no such class for.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise KitError(
            f"{spec.name} is an encoder-decoder ({config.model_type}); this kit fine-tunes encoders (BERT, "
            "RoBERTa, MiniLM, ...) and decoders (GPT-2, Llama, Qwen2, OPT, GPT-NeoX, ...)"
        )
    pooling = spec.pooling
    if pooling == "auto":
        pooling = "sequence_classification" if is_decoder(config) else "mean"
    if (
        pooling == "sequence_classification"
        and type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    ):
        raise KitError(
            f"{spec.name} ({config.model_type}) has no class for sequence classification in transformers: set "
            "model.pooling: mean, with which its token states are averaged"
        )
    return pooling


def classifier_config(spec: ModelSpec, label_names: Sequence[str], **changes: Any) -> transformers.PretrainedConfig:
    """Read a base model's configuration, set up for a classifier with one label per text.

    Args:
        spec: Which base.
        label_names: Names of the classes, in the order of their ids.
        **changes: Further values to set in it.

    Returns:
        The configuration; no weights.

    Raises:
        KitError: As `load_config`.
    """
    return load_config(
        spec,
        num_labels=len(label_names),
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
        # The base may be a multi-label classifier, or a regression.
        problem_type="single_label_classification",
        **changes,
    )


def layers_of(spec: ModelSpec) -> int:
    """Return how many layers a base has; 1 where its configuration does not say.

    Args:
        spec: Which base.

    Raises:
        KitError: When its configuration cannot be read.
    """
    # A multimodal model keeps its text settings in a part of its configuration; some have no such number.
    return getattr(load_config(spec).get_text_config(), "num_hidden_layers", None) or 1


# What transformers' configurations call the number of positions, besides `max_position_embeddings`.
POSITIONS = ("n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length", "max_target_positions")
# What their tables of learned positions are called: `position_embeddings`, `embed_positions`, `wpe`, `positions_embed`.
POSITION_TABLE = re.compile("^(?!rel).*pos|^wpe$")


def positions_of(model: nn.Module) -> int | None:
    """Return the most tokens that a model's text can have; None if neither configuration nor modules have a limit.

    RoBERTa and similar models count positions from the pad token's id plus 1 (transformers,
    `create_position_ids_from_input_ids`), so a text can use 512 of 514 positions.

    Args:
        model: A classifier or its base, with or without adapters.
    """
    inner: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    text = inner.config.get_text_config()
    named = (getattr(text, name, None) for name in ("max_position_embeddings", *POSITIONS))
    limits = [value for value in named if isinstance(value, int) and value > 0]  # XLNet has -1
    skipped = 0
    for name, module in inner.named_modules():
        # BERT's embeddings have no pad token id of their own.
        if hasattr(module, "position_embeddings") and getattr(module, "padding_idx", None) is not None:
            skipped = module.padding_idx + 1
        if isinstance(module, nn.Embedding) and POSITION_TABLE.search(name.rpartition(".")[2]):
            limits.append(module.num_embeddings - getattr(module, "offset", 0))  # OPT has two rows more
    return min(limits) - skipped if limits else None


def check_length(model: nn.Module, name: str, length: int, what: str = "length") -> None:
    """Refuse texts that are longer than a model has positions for.

    Args:
        model: As `positions_of` takes it; its weights are not read.
        name: What the model is called.
        length: Tokens of the longest text.
        what: What the length is called.

    Raises:
        KitError: When there are too few positions.
    """
    most = positions_of(model)
    if most is not None and length > most:
        raise KitError(f"{what} is {length}: {name} has {most} positions, and allowed is no more")
