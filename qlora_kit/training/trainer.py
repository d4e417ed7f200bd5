"""The Trainer for everything: transformers' own, with checkpoints that are complete and hold no pickle."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn

# Where WANDB_MODE is offline, this import prints a line, which would stand before what a command prints as JSON.
with contextlib.redirect_stdout(sys.stderr):
    from transformers import Trainer
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback

from ..config.sections import TrainingSpec
from ..data.batches import LengthBatchSampler, edges_of
from ..kernels import cuda_graphs
from ..models.adapters import trainable_parameters
from ..models.heads import head_parameters
from ..models.weights import load_weights_, save_adapter
from ..optimizers import FlatAdamW, keep_embeddings_in_32_bits
from ..system.safe_peft import peft
from ..system.subclasses import subclass
from . import checkpoints
from .callbacks import _Bars, _callbacks, _Meter

logger = logging.getLogger(__name__)

KEPT_CHECKPOINTS = 2


class KitTrainer(Trainer):
    """transformers' Trainer with length buckets, two learning rates and checkpoints that are safe to keep.

    Callbacks, logging, evaluation and resume are the Trainer's own.

    Args:
        spec: How to train.
        lengths: Tokens of each training row.
        **kwargs: Other arguments of the Trainer.
    """

    def __init__(self, *, spec: TrainingSpec, lengths: list[int], **kwargs: Any) -> None:
        self.spec = spec
        self.lengths = lengths
        self.order = order_of(spec, lengths, kwargs["args"].device) if spec.padding == "buckets" else None
        self.meter = _Meter(self)
        self.graphs: cuda_graphs.Graphs | None = None
        super().__init__(**kwargs, callbacks=[*_callbacks(spec), self.meter])
        # If `forward` takes `**kwargs`, the Trainer assumes that the model divides its loss by the rows of all
        # accumulated batches. No sequence classification head does, in transformers or here: N accumulated batches
        # would weigh N times as much.
        self.model_accepts_loss_kwargs = False
        self.model: Any  # the Trainer's own type hint allows None, before a model is made
        if self.args.disable_tqdm:
            # Without bars the Trainer prints every log entry instead.
            self.remove_callback(PrinterCallback)
        elif self.pop_callback(ProgressCallback) is not None:  # None in a notebook, which shows its own table
            self.add_callback(_Bars())

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.order if self.order is not None else super()._get_train_sampler(train_dataset)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer, with separate learning rates for adapters and head."""
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            heads = head_parameters(model)
            groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    key = (name in heads, name in decayed)
                    groups.setdefault(key, []).append(parameter)
            self._take(model, [parameter for group in groups.values() for parameter in group])
            head_rate = self.spec.head_learning_rate or self.spec.learning_rate
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
            adapters = self.gradients is not None and self.gradients.twice and isinstance(model, peft.PeftModel)
            if adapters and arguments.get("fused"):  # safetensors takes a whole flat model for tied weights
                kind = FlatAdamW
            self.optimizer = kind(
                [
                    {
                        "params": parameters,
                        "weight_decay": self.spec.weight_decay if decay else 0.0,
                        "lr": head_rate if head else self.spec.learning_rate,
                    }
                    for (head, decay), parameters in groups.items()
                ],
                **arguments,
            )
            if arguments.get("optim_bits") == 8:
                keep_embeddings_in_32_bits(self.optimizer, model)
        return self.optimizer

    def _take(self, model: Any, trained: list[torch.nn.Parameter]) -> None:
        """Set up a model for training: note its trained weights, and check once whether steps can be CUDA graphs."""
        cuda_graphs.forget(model)  # the graphs of predictions: weights may have moved
        self.trained = trained
        self.counted = trainable_parameters(model)[1]
        self.prepared = False
        device = self.args.device
        problem = cuda_graphs.obstacle(self.spec, model, device.type)
        if problem is not None and self.spec.graphs != "none":
            logger.log(
                logging.WARNING if device.type == "cuda" else logging.INFO,
                "Steps run eagerly, not as CUDA graphs: %s.",
                problem,
            )
        self.graphs = cuda_graphs.Graphs(device) if problem is None else None
        self.gradients = None if self.graphs is None else cuda_graphs.Gradients(self.trained)
        make_train_and_zero_grad_cheap_(model, self.trained, self.gradients)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run one forward and backward pass; count rows and unpadded tokens without waiting for the device."""
        self.meter.count(inputs["attention_mask"])
        step = super().training_step
        if self.graphs is None:
            # Around the backward pass too: a layer recomputed there must use the same attention kernel.
            with cuda_graphs.without_cudnn_attention(self.args.device):
                return step(model, inputs, num_items_in_batch)
        inputs = cuda_graphs.pad_rows(inputs, self.spec.batch_size)
        # Besides its shapes, a graph depends on what the loss is divided by.
        kind = f"training step of {self.current_gradient_accumulation_steps}"

        def work(given: dict[str, torch.Tensor]) -> torch.Tensor:
            assert self.gradients is not None
            with cuda_graphs.without_cudnn_attention(self.args.device), self.gradients.summed():
                return step(model, given)

        if not self.prepared:
            self.prepared = True
            self._prepare_graphs(kind, work, inputs)
        loss: torch.Tensor = self.graphs.run(kind, work, inputs)
        return loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # If a run was interrupted after its last step, the Trainer would take one more step before it checks.
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _prepare_graphs(self, kind: str, work: cuda_graphs.Work, inputs: cuda_graphs.Inputs) -> None:
        """Capture a step as a CUDA graph for each batch width of all epochs, the widest first, and log it."""
        assert self.graphs is not None and self.gradients is not None

        def of_width(width: int) -> dict[str, torch.Tensor]:
            batch = {
                name: torch.zeros((self.spec.batch_size, width)[: value.dim()], dtype=value.dtype)
                for name, value in inputs.items()
            }
            batch["attention_mask"][:, : max(width - 1, 1)] = 1
            return {name: value.to(self.args.device) for name, value in batch.items()}

        before = self.gradients.flat.clone()
        self.graphs.prepare(kind, work, (of_width(width) for width in self.widths()))
        self.gradients.flat.copy_(before)
        logger.info(
            "A step of each of %d widths captured as a CUDA graph in %.1f s; they hold %.0f MiB.",
            len(self.graphs),
            self.graphs.seconds,
            self.graphs.bytes / 2**20,
        )

    def widths(self) -> list[int]:
        """Return the widths of the batches of all epochs, the widest first; empty if the collator has no `width`."""
        width: Any = getattr(self.data_collator, "width", None)
        if width is None:
            return []
        if self.order is None:
            # Shuffled rows: any of them can be the longest of its batch.
            return sorted({width(length) for length in self.lengths}, reverse=True)
        found, size = set(), self.spec.batch_size
        for epoch in range(math.ceil(self.args.num_train_epochs)):
            lengths = self.order.lengths[self.order.order(epoch)]
            longest = np.maximum.reduceat(lengths, np.arange(0, len(lengths), size))
            found |= {width(int(length)) for length in np.unique(longest)}
        return sorted(found, reverse=True)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Run one forward pass of an evaluation, as a CUDA graph if training steps are."""
        step = super().prediction_step

        def work(given: dict[str, torch.Tensor]) -> tuple[Any, Any, Any]:
            with cuda_graphs.without_cudnn_attention(self.args.device), self._plain_loss():
                result: tuple[Any, Any, Any] = step(model, given, prediction_loss_only, ignore_keys)
            return result

        if self.graphs is None:
            return work(inputs)
        with torch.no_grad():
            result: tuple[Any, Any, Any] = self.graphs.run(f"prediction {prediction_loss_only}", work, inputs)
        return result

    @contextlib.contextmanager
    def _plain_loss(self) -> Iterator[None]:
        """Turn label smoothing off inside the block, so that validation losses can be compared."""
        smoother, self.label_smoother = self.label_smoother, None
        try:
            yield
        finally:
            self.label_smoother = smoother

    # For the methods below the Trainer would go over every module of the model at every step.

    def floating_point_ops(self, inputs: Any) -> int:
        """Return the operations of a step, estimated as transformers does: 6 for each token and parameter."""
        tokens: int = inputs["input_ids"].numel()
        return 6 * tokens * self.counted

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.gradients is None:
            return self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)
        self.accelerator.unscale_gradients()
        return self.gradients.clip_(self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return self.accelerator.clip_grad_norm_(self.trained, math.inf) if grad_norm is None else grad_norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        self.store_flos()
        best = self.state.best_global_step
        if best:
            self.state.best_model_checkpoint = str(checkpoints.path_of(folder, best))
        stateful: Any = self.state.stateful_callbacks
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                stateful[type(callback).__name__] = callback.state()

        def fill(made: Path) -> None:
            save_adapter(self.model, made / "adapter")
            self._save_optimizer_and_scheduler(str(made))
            self._save_scaler(str(made))
            self._save_rng_state(str(made))
            self.state.save_to_json(str(made / "trainer_state.json"))

        checkpoints.write(folder, self.state.global_step, fill)
        checkpoints.rotate(
            folder,
            KEPT_CHECKPOINTS,
            Path(self.state.best_model_checkpoint) if self.state.best_model_checkpoint else None,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights_(self.model if model is None else model, Path(resume_from_checkpoint) / "adapter")

    def _load_best_model(self) -> None:
        load_weights_(self.model, Path(str(self.state.best_model_checkpoint)) / "adapter")


def order_of(spec: TrainingSpec, lengths: Sequence[int], device: torch.device) -> LengthBatchSampler:
    """Return the sampler that puts rows of similar length into a batch (`training.padding` `buckets`).

    Args:
        spec: How to train.
        lengths: Tokens of each training row.
        device: The device. On CUDA batches have few widths, so that a graph can be captured for each.
    """
    return LengthBatchSampler(lengths, spec.batch_size * spec.gradient_accumulation, spec.seed, edges=edges_of(device))


def make_train_and_zero_grad_cheap_(
    model: nn.Module, trained: Sequence[nn.Parameter], gradients: cuda_graphs.Gradients | None
) -> None:
    """Make a model's `train()` and `zero_grad()` cheap, in place: the Trainer calls both every step.

    torch's versions go over every module: with hundreds of modules, the GPU waits for milliseconds. The model's class
    becomes a subclass whose methods touch only what changes; `print(model)` shows its name.

    Args:
        model: The model that the Trainer steps.
        trained: Its trained weights.
        gradients: Their gradients in one flat tensor; None if they are separate.
    """
    cheap: Any = model
    if not isinstance(model, _CheapSteps):
        # Under its own name, which `save_pretrained` writes into config.json.
        cheap.__class__ = subclass(cheap.__class__.__name__, _CheapSteps, cheap.__class__)
    cheap._trained, cheap._gradients = list(trained), gradients


class _CheapSteps(nn.Module):
    """`train()` and `zero_grad()` that touch only what changes; `make_train_and_zero_grad_cheap_` mixes them in."""

    _trained: list[nn.Parameter]
    _gradients: cuda_graphs.Gradients | None

    def _get_name(self) -> str:
        return f"{super()._get_name()}WithCheapSteps"  # what `print` shows

    def train(self, mode: bool = True) -> Self:
        # All modules switch together, here and in `eval`, so the model's own mode is that of all.
        return self if self.training == mode else super().train(mode)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self._gradients is not None:
            self._gradients.flat.zero_()
            return
        for parameter in self._trained:
            parameter.grad = None if set_to_none or parameter.grad is None else parameter.grad.zero_()
