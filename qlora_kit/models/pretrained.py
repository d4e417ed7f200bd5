"""Build a classifier from pretrained weights, or from random ones where none are wanted."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn

from ..config.experiment import Experiment
from ..config.quantization import Quantization
from ..config.sections import ModelSpec
from ..errors import KitError
from ..kernels.cpu_attention import use_cpu_attention_
from ..kernels.small_activations import make_lean_
from ..quantization.backend import backend_of, backend_of_layer, linear_storage
from ..quantization.bitsandbytes import quantize_embeddings_
from ..quantization.layers import matrices_of, quantizable, why_whole
from ..system.arguments import EXPERIMENT, takes
from ..system.devices import COMPUTE_DTYPES, quiet
from ..system.safe_bitsandbytes import keep_weights_as_stored_
from .configuration import check_length, classifier_config, is_decoder, resolve_pooling
from .heads import PooledClassifier, head_modules, last_tokens, make_head, width_of_states
from .precision import precision_of
from .sources import Base, _readable, find_base

logger = logging.getLogger(__name__)


@takes(experiment=EXPERIMENT)
def build_classifier(
    experiment: Experiment,
    label_names: Sequence[str],
    *,
    device: torch.device,
    pad_token_id: int | None = None,
) -> nn.Module:
    """Build a classifier without adapters: the base as it is stored and a new fp32 head.

    Args:
        experiment: Which model and quantization, and how long its texts are.
        label_names: Names of the classes.
        device: Where the model goes.
        pad_token_id: The tokenizer's pad token id.

    Returns:
        A `PooledClassifier` or one of transformers' classes for sequence classification, in eval mode.

    Raises:
        KitError: For models that cannot be classifiers, cannot be loaded, have fewer positions than
            `data.max_length`, have no embedding for the pad token, or cannot recompute activations although
            `training.gradient_checkpointing` asks for it.
    """
    spec = experiment.model
    base = find_base(spec)
    config = classifier_config(spec, label_names)
    if spec.name.startswith("shape:") and not spec.random_weights:
        raise KitError(f"{spec.name} is a shape without weights: set model.random_weights: true, or name a model")
    pooling = resolve_pooling(spec, config)
    if spec.head_init == "class_means" and pooling != "mean":
        raise KitError(f"model.head_init: class_means needs model.pooling: mean, which {spec.name} is not set to")
    _settle(config, spec, pad_token_id)
    precision = precision_of(experiment, device)
    # In full fine-tuning every weight is trained, and trained weights are fp32. On a CPU bf16 is only for the matrix
    # products of training: what is not quantized stays fp32 there, so that it predicts in fp32 with the same weights.
    plain = experiment.lora is None or device.type == "cpu"
    dtype = torch.float32 if plain else COMPUTE_DTYPES[precision]
    auto = transformers.AutoModel if pooling == "mean" else transformers.AutoModelForSequenceClassification
    with torch.device("meta"), quiet(), _readable(spec.name):
        skeleton = auto.from_config(config)
    _refuse_what_cannot_be(experiment, skeleton, pad_token_id)
    heads = [] if pooling == "mean" else head_modules(skeleton)
    # Mean pooling does not use BERT's pooler.
    _refuse_nothing_quantized(skeleton, experiment, heads or ["pooler"])
    with quiet(), _readable(spec.name):
        if spec.random_weights:
            model = _random(auto, config, experiment.quantization, heads, dtype, device)
        else:
            model = _pretrained(auto, skeleton, base, experiment.quantization, heads, dtype, device)
    if pooling == "mean":
        encoder: Any = model
        if getattr(encoder, "pooler", None) is not None:
            # Mean pooling does not use BERT's pooler, so it is not stored. Not None, because LayoutLM calls it.
            encoder.pooler = nn.Identity()
        runs = skeleton if device.type == "meta" else keep_weights_as_stored_(encoder)
        within = precision if device.type == "cuda" else "fp32"
        width = width_of_states(runs, device, within, experiment.data.max_length)
        model = PooledClassifier(encoder, len(label_names), width, spec.head).to(device)
    elif spec.head != "linear":  # transformers' own class has a linear one
        head = getattr(model, heads[0])
        if len(heads) != 1 or not isinstance(head, nn.Linear):
            raise KitError(
                f"{type(model).__name__} has a head of several layers; a {spec.head} head goes with "
                "model.pooling: mean, or with models whose head is one linear layer"
            )
        setattr(model, heads[0], make_head(spec.head, config, len(label_names), head.in_features).to(device))
    quantize_embeddings_(model, experiment.quantization.embeddings)
    if spec.lean:
        make_lean_(model)
    _tell_peft(model, experiment.quantization.scheme)
    for name in head_modules(model):
        getattr(model, name).float()
    if pooling == "sequence_classification" and is_decoder(config):
        _follow_mask(model, heads)
    if device.type == "cpu" and spec.fused:
        with quiet():  # Falcon says twice that it has only its own attention
            use_cpu_attention_(model)
    return keep_weights_as_stored_(model).eval()


def _settle(config: transformers.PretrainedConfig, spec: ModelSpec, pad_token_id: int | None) -> None:
    """Set a configuration's pad token, dropout and caches, in place."""
    for part in (config, config.get_text_config()):  # one and the same for most models
        # An encoder keeps its own pad token: it says where positions begin (RoBERTa). The mask says what is padding.
        if pad_token_id is not None and (is_decoder(config) or getattr(part, "pad_token_id", None) is None):
            part.pad_token_id = pad_token_id
        part.use_cache = False
    _set_dropout(config, spec)


def _refuse_what_cannot_be(experiment: Experiment, skeleton: Any, pad_token_id: int | None) -> None:
    """Refuse texts that are too long, a pad token without embedding, and checkpointing that a model cannot do."""
    spec, config = experiment.model, skeleton.config
    check_length(skeleton, spec.name, experiment.data.max_length, "data.max_length")
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if pad_token_id is not None and rows is not None and pad_token_id >= rows:
        raise KitError(f"the pad token is number {pad_token_id}, and {spec.name} has embeddings for {rows} tokens")
    if experiment.training.gradient_checkpointing and not skeleton.supports_gradient_checkpointing:
        raise KitError(
            f"{spec.name} ({type(skeleton).__name__}) cannot recompute its activations: allowed is "
            "training.gradient_checkpointing: false"
        )


def _tell_peft(model: nn.Module, scheme: str) -> None:
    """Mark a model as stored in 4 or 8 bits, in place."""
    # PEFT reads these flags; without them it uses another layer that takes more memory. from_pretrained sets them on
    # the model that it makes, not on the classifier that is built around it.
    wanted = backend_of(scheme).peft_flags(scheme)
    for flag in dict.fromkeys(("is_loaded_in_8bit", "is_loaded_in_4bit", *wanted)):
        setattr(model, flag, flag in wanted)


def _refuse_nothing_quantized(skeleton: nn.Module, experiment: Experiment, skip_modules: Sequence[str]) -> None:
    """Refuse a quantization scheme for a model that has no linear layer to quantize."""
    if not experiment.quantization.is_quantized or quantizable(skeleton, skip_modules):
        return
    scheme = experiment.quantization.scheme
    raise KitError(
        f"quantization.scheme is {scheme}, and {experiment.model.name} has no linear layer that could be stored so "
        f"(its matrices are those of {matrices_of(skeleton, skip_modules)}): use quantization.scheme none"
    )


# Names in transformers' configurations for the probabilities of the base's own dropout, without those of heads.
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
    skeleton: Any,
    base: Base,
    quantization: Quantization,
    heads: list[str],
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """Load a base's weights into a model and quantize it; refuse a checkpoint that lacks some of its weights."""
    config = skeleton.config
    if any(getattr(part, "quantization_config", None) is not None for part in (config, config.get_text_config())):
        # A checkpoint that is quantized already brings its own skip list and ignores the caller's.
        raise KitError(
            f"{base.source} is quantized already; give the full-precision checkpoint, and the kit quantizes it"
        )
    if transformers.utils.find_adapter_config_file(base.source, revision=base.revision) is not None:
        # transformers would load the adapter too, and the kit would train on top of it.
        raise KitError(
            f"{base.source} holds an adapter beside the model (adapter_config.json), which would be loaded with it: "
            "give a folder without it, or the model with that adapter merged"
        )
    backend = backend_of(quantization.scheme)
    whole = [*heads, "lm_head", *why_whole(skeleton, heads)]
    model, loading = auto.from_pretrained(
        base.source,
        config=config,
        revision=base.revision,
        trust_remote_code=False,
        weights_only=True,
        dtype=dtype,
        **backend.loading(quantization, whole, dtype, device),
        output_loading_info=True,
        # A head may have another number of labels. Anything else that does not fit is refused below.
        ignore_mismatched_sizes=True,
    )
    # Mean pooling does not use BERT's pooler, which is dropped, so it may be missing. transformers' own head uses it.
    fresh = {"pooler"} if auto is transformers.AutoModel else set(heads)
    misshapen = {key for key, *_ in loading["mismatched_keys"]} | _misshapen(model, skeleton)
    missing = sorted(key for key in {*loading["missing_keys"], *misshapen} if not fresh & set(key.split(".")))
    if missing:
        raise KitError(
            f"{base.source} lacks {len(missing)} of the weights that {type(model).__name__} needs, or has them in "
            f"another shape, the first {missing[0]!r}; they would be random"
        )
    if not any(set(heads) & set(key.split(".")) for key in loading["missing_keys"]):
        # All heads are there: the checkpoint is a classifier. (ModernBERT's masked language model has only a part of
        # its head.)
        _start_heads_afresh_(model, skeleton, heads)
    return backend.quantize_(model, quantization, heads, dtype, device)


def _misshapen(model: nn.Module, skeleton: nn.Module) -> set[str]:
    """Return the names of a loaded model's weights whose shape differs from what its configuration says.

    transformers puts a weight of another shape into a quantized layer without a warning, and before 5.23 into every
    layer of a model that has quantized ones.
    """
    found = set()
    for name, parameter in model.named_parameters():
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        backend, stored = backend_of_layer(layer), linear_storage(layer)
        if (
            parameter is layer._parameters.get("weight")
            and backend is not None
            and stored is not None
            and stored.quantized
        ):
            # In the model of shapes it may be a Conv1D, whose weight is transposed.
            shape, wanted = backend.shape(layer), torch.Size((layer.out_features, layer.in_features))
        else:
            shape, wanted = parameter.shape, skeleton.get_parameter(name).shape
        if shape != wanted:
            found.add(name)
    return found


@torch.no_grad()
def _start_heads_afresh_(model: Any, skeleton: nn.Module, heads: Sequence[str]) -> None:
    """Initialize heads that came from a checkpoint, as transformers does where a checkpoint has none, in place."""
    for head in heads:
        for name, parameter in model.get_submodule(head).named_parameters():
            # The checkpoint's head may have another number of labels.
            parameter.data = parameter.new_empty(skeleton.get_submodule(head).get_parameter(name).shape)
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
    return backend_of(quantization.scheme).quantize_(model, quantization, heads, dtype)


def _follow_mask(model: nn.Module, heads: Sequence[str]) -> None:
    """Make a decoder of transformers' own class find positions and a text's last token by the mask, in place.

    GPT-2 and others count positions from the first column, padding included. transformers corrects that in generation,
    but not in classification. Their classes also take the last token that is not the pad token, which is the wrong one
    if the text itself ends in a pad token.

    Args:
        model: The classifier, without adapters.
        heads: Names of its heads.
    """
    numbered = "position_ids" in inspect.signature(model.forward).parameters
    last: list[torch.Tensor] = []  # columns of the current batch

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        last.clear()
        mask = kwargs.get("attention_mask")
        if mask is not None:
            last.append(last_tokens(mask))
            if numbered and kwargs.get("position_ids") is None:
                kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return args, kwargs

    def pick(_: nn.Module, args: tuple[Any, ...], logits: torch.Tensor) -> torch.Tensor | None:
        if not last or logits.dim() != 3:  # the class gives its head one state per text
            return None
        rows = torch.arange(logits.shape[0], device=logits.device)  # len() would be a constant in a traced graph
        chosen = logits[rows, last.pop()]
        return chosen.unsqueeze(1).expand_as(logits)  # whichever column the class takes

    model.register_forward_pre_hook(begin, with_kwargs=True)
    for head in heads:
        model.get_submodule(head).register_forward_hook(pick)
