"""Load tokenizers, and check that they have what a classifier needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from ..config.sections import ModelSpec
from ..errors import KitError
from ..system.arguments import MODEL_SPEC, takes
from ..system.devices import quiet
from . import probe
from .configuration import load_config, resolve_pooling
from .sources import Base, _readable, find_base

# --- tokenizer --------------------------------------------------------------------------------------------------


@takes(spec=MODEL_SPEC)
def load_tokenizer(spec: ModelSpec, source: str | Path | None = None) -> Any:
    """Load a base's tokenizer, check that it fits, and set its pad token and padding side.

    Args:
        spec: The model's spec.
        source: A folder to load it from instead, such as a run's `tokenizer/`.

    Returns:
        A transformers tokenizer. If it has no pad token (GPT-2), the end-of-text token is used; the mask, not the
        token, decides what is padding. All code that pads uses its `padding_side`. Its attribute `embeddings` is
        the number of tokens that the base has embeddings for (None where its configuration does not say).

    Raises:
        KitError: When it cannot be loaded, knows no words, has tokens that the base has no embedding for, or has
            neither a pad nor an end token.
    """
    config = load_config(spec)
    base = find_base(spec) if source is None else Base(str(source), None, None, None)
    with quiet(), _readable(spec.name):
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            base.source, revision=base.revision, trust_remote_code=False
        )
    if not isinstance(tokenizer.model_max_length, (int, float)):
        raise KitError(
            f"the tokenizer of {spec.name} has {tokenizer.model_max_length!r} for its longest text in tokens"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise KitError(f"the tokenizer of {spec.name} has neither a pad token nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.embeddings = getattr(config.get_text_config(), "vocab_size", None)
    probe.check_vocabulary(tokenizer, tokenizer.embeddings, spec.name if source is None else f"{spec.name} in {source}")
    tokenizer.padding_side = padding_side(spec, config)
    return tokenizer


def padding_side(spec: ModelSpec, config: transformers.PretrainedConfig) -> str:
    """Return the side on which a base's texts are padded: `left` if its class pools the last column, else `right`.

    Args:
        spec: The model's spec.
        config: The model's config.

    Raises:
        KitError: As `resolve_pooling`.
    """
    # XLNet's and XLM's own classes take a text's state from the column that `summary_type` names.
    last = getattr(config, "summary_type", None) == "last"
    return "left" if last and resolve_pooling(spec, config) == "sequence_classification" else "right"
