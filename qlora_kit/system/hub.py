"""The Hugging Face hub: find a model's files in its cache, and refuse what cannot be had."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path

from ..errors import KitError, nearest

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


# Configurations of well-known models without weights, by folder (`models.sources.SHAPES`).
_SHAPES = Path(__file__).parents[1] / "shapes"


@functools.lru_cache
def refuse_out_of_reach(name: str, revision: str | None = None) -> None:
    """Refuse a hub model whose configuration is neither in the local cache nor to be had, in seconds and in one line.

    transformers itself tries again and again where there is no network.

    Args:
        name: The model's name on the hub.
        revision: Its revision.

    Raises:
        KitError: It names the shape without weights that is most like the model.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    if in_cache(name, revision, "config.json") is not None:
        return
    why = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            huggingface_hub.HfApi().model_info(name, revision=revision, timeout=10)
            return
        except errors.RepositoryNotFoundError:
            why = f"the hub has no {name} that this login may see"
        except errors.HfHubHTTPError:
            return  # the hub answers, and what it says is told where the file is read
        except errors.HFValidationError as error:
            raise KitError(f"{name!r} is no name of a model on the hub: {' '.join(str(error).split())}") from error
        except Exception as error:  # from the HTTP library, which depends on the version of the hub's client
            why = f"the hub does not answer ({type(error).__name__})"
    raise KitError(
        f"the configuration of {name} is not in the local cache, and {why}. Without it, plan {shape_like(name)}, which "
        f"is most like it. Allowed: {', '.join(f'shape:{shape}' for shape in _shapes())}"
    )


def shape_like(name: str) -> str:
    """Return the shape that is most like a model: by its name, else by the size in its name.

    Args:
        name: A model's name, as `meta-llama/Llama-2-7b-hf`.

    Returns:
        Such as `shape:llama-7b`.
    """
    last, shapes = name.rpartition("/")[2].lower(), _shapes()
    same = next((shape for shape in shapes if shape in last), None)
    size, sizes = _size(last), {shape: found for shape in shapes if (found := _size(shape))}
    if same is None and size:
        same = min(sizes, key=lambda shape: abs(math.log(sizes[shape] / size)))
    return f"shape:{same or nearest(last, shapes, cutoff=0) or shapes[0]}"


def _shapes() -> list[str]:
    return sorted(item.name for item in _SHAPES.iterdir())


def _size(name: str) -> float | None:
    """Return the number of parameters that a model's name tells, in millions: 7000 of `llama-7b`; None if none."""
    found = re.search(r"(?<![\d.])(\d+(?:\.\d+)?)([bm])(?![a-z])", name)
    return None if found is None else (float(found[1]) * (1000 if found[2] == "b" else 1)) or None
