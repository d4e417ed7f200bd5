"""The Hugging Face hub: find a model's files in its cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

# Where transformers looks for weights, in its order.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def find_weights(find: Callable[[str], Path | None]) -> Path | None:
    """Return the file of a model's weights, or their index if they are several files; None if there is neither."""
    return next((file for file in map(find, WEIGHTS) if file is not None and file.is_file()), None)


def in_cache(name: str, revision: str | None, file: str) -> Path | None:
    """Return the path of a model's file in the hub's local cache, or None."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def hub_weights(name: str) -> tuple[bool, str]:
    """Return whether a hub model's weights are available, from the local cache or the hub.

    Args:
        name: The model's name on the hub.

    Returns:
        Whether they are available, and how (or why not), as the end of a sentence.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if find_weights(functools.partial(in_cache, name, None)) is not None:
        return True, "is in the local cache"
    if constants.HF_HUB_OFFLINE:
        return False, "is not in the local cache and HF_HUB_OFFLINE is set"
    try:
        huggingface_hub.HfApi().model_info(name, timeout=10)
    except Exception as error:  # any failure means the same: the weights are not available
        return False, f"is not in the local cache and the hub does not answer ({type(error).__name__})"
    return True, "can be had from the hub"
