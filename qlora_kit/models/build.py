"""Build a model for training: the base in the chosen precision, an unquantized head, and adapters.

Only linear layers of the frozen base are quantized. The adapters and the head are trained and stay in fp32. The head is
named in the skip list, so that it never becomes a 4-bit layer, and in PEFT's `modules_to_save`, so that it is trained,
saved and restored.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import nn

from ..config.experiment import Experiment
from ..errors import KitError
from ..kernels import cuda_graphs
from ..kernels.randomness import checkpoint_contexts
from ..quantization.backend import backend_of
from ..quantization.compaction import compact_
from ..system.arguments import EXPERIMENT, takes
from ..system.devices import default_device
from ..system.safe_peft import peft
from . import probe
from .adapters import _adapted
from .configuration import is_decoder
from .heads import PooledClassifier
from .precision import computing, precision_of
from .pretrained import build_classifier
from .tokenizers import padding_side

logger = logging.getLogger(__name__)

# --- building ---------------------------------------------------------------------------------------------------


@takes(experiment=EXPERIMENT)
def build(
    experiment: Experiment,
    label_names: Sequence[str],
    *,
    device: torch.device | None = None,
    pad_token_id: int | None = None,
    trained: bool = False,
    checkpointing: bool = False,
) -> nn.Module:
    """Build an experiment's model: the base as it is stored, a new head, and adapters.

    Args:
        experiment: Which model, quantization, adapters and seed.
        label_names: Names of the classes, in the order of their ids.
        device: Where the model goes; by default the current GPU, else the CPU.
        pad_token_id: The tokenizer's pad token id. If it is given, the model is tested: see `neighbours`.
        trained: Whether trained weights will be loaded into the model. What the test finds is then only a warning.
        checkpointing: Whether the model will be trained. Layers are then recomputed in the backward pass if the
            experiment asks for it (`training.gradient_checkpointing`). Otherwise, as for predictions, they never are.

    Returns:
        A `peft.PeftModel` (or, in full fine-tuning, the bare classifier) in training mode. The head and the
        adapters are fp32 and need gradients; nothing else does. Each call makes a new model, and equal
        experiments give equal weights. Its attribute `neighbours` holds what the test found.

    Raises:
        KitError: For models that cannot be classifiers, target modules that the model does not have, texts that
            are longer than it has positions for, and models whose results for a text depend on other texts.
    """
    device = device or default_device()
    transformers.set_seed(experiment.training.seed)
    model = build_classifier(experiment, label_names, device=device, pad_token_id=pad_token_id)
    model = model.float().requires_grad_(True) if experiment.lora is None else _adapted(experiment, model)
    if pad_token_id is not None and device.type != "meta":
        try:
            setattr(model, "neighbours", neighbours(experiment, model, device, pad_token_id))  # noqa: B010
        except KitError as error:
            if not trained:
                raise
            logger.warning("%s.", error)
    compact_(model)
    model.train()
    if checkpointing and experiment.training.gradient_checkpointing:
        enable_checkpointing(model, experiment.training.use_reentrant)
    return model


@contextlib.contextmanager
def _running(name: str, model: nn.Module, precision: str) -> Iterator[None]:
    """Turn the error of a model that cannot be run into a KitError of one line."""
    try:
        yield
    except (KitError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        known = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        hint = "training.precision: fp32 may work" if precision != "fp32" else "choose another base"
        raise KitError(f"{name} ({type(model).__name__}) cannot be run in {precision} ({known}): {hint}") from error


def neighbours(experiment: Experiment, model: nn.Module, device: torch.device, pad_token_id: int) -> dict[str, Any]:
    """Test whether a text's result depends on texts beside it or before it (`probe.neighbours`).

    Args:
        experiment: The model's experiment.
        model: A classifier, with or without adapters, not on the meta device. It is in eval mode afterwards.
        device: Where the model is.
        pad_token_id: The tokenizer's pad token id.

    Returns:
        What the run's record says about it.

    Raises:
        KitError: When a result does depend on other texts, or the model cannot be run at all.
    """
    inner: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    name, config, precision = experiment.model.name, inner.config, precision_of(experiment, device)
    text = config.get_text_config()
    # If all weights are in 32 bits, compute in 32 bits: there rounding hides nothing. Quantized layers have no such
    # weights, and may compute in 16 bits while all others are in 32 (`training.prepare_for_kbit_training`).
    dtypes = {weight.dtype for weight in inner.parameters() if weight.is_floating_point()}
    dtypes |= {dtype for module in inner.modules() if (dtype := getattr(module, "compute_dtype", None)) is not None}
    computed = "fp32" if dtypes == {torch.float32} else precision
    scheme = experiment.quantization.scheme
    rounded = backend_of(scheme).rounds_its_input(scheme)
    special = {value for key, value in text.to_dict().items() if key.endswith("_token_id") and isinstance(value, int)}
    model.eval()

    def forward(batch: dict[str, torch.Tensor], precision: str = computed) -> torch.Tensor:
        # Not in inference mode: a table that a model makes here and keeps is read in training as well.
        with torch.no_grad(), computing(device, precision), cuda_graphs.without_cudnn_attention(device):
            logits: torch.Tensor = model(**{key: value.to(device) for key, value in batch.items()}).logits
        return logits.float().cpu()

    with _running(name, inner, precision):
        found = probe.neighbours(
            forward,
            model,
            probe.Texts(
                vocabulary=min(text.vocab_size, 1 << 16) if hasattr(text, "vocab_size") else 256,
                special={*special, pad_token_id},
                pad_token_id=pad_token_id,
                side=padding_side(experiment.model, config),
                shortest=1 if is_decoder(config) else 3,  # an encoder's tokenizer adds two
                longest=experiment.data.max_length,
            ),
            name=name,
            precision=probe.ROUNDED if rounded else computed,
        )
        if precision != computed:
            ids = torch.full((2, 8), pad_token_id)
            forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, precision)
    return found


def enable_checkpointing(model: torch.nn.Module, use_reentrant: bool) -> None:
    """Recompute activations in the backward pass instead of keeping them.

    The Trainer would choose `use_reentrant` itself, so it is set on the model directly.

    Args:
        model: As `models.build` made it.
        use_reentrant: Which of torch's two implementations is used.
    """
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    base: Any = inner.base_model if isinstance(inner, PooledClassifier) else inner
    more: dict[str, Any] = {}
    if not use_reentrant and next(model.parameters()).is_cuda:
        # torch's own way of repeating dropout cannot be captured in a CUDA graph.
        more = {"preserve_rng_state": False, "context_fn": checkpoint_contexts}
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant, **more})
    if use_reentrant:
        # The reentrant implementation needs inputs that require a gradient, and frozen embeddings' outputs do not.
        base.enable_input_require_grads()
