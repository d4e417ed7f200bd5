"""Training: one transformers Trainer for everything, whose checkpoints are whole and hold no pickle."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before anything that imports bitsandbytes by itself.
from ._bnb import bnb  # isort: skip
import numpy as np
import peft
import torch
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback

from . import cards, checkpoints, evaluation, graphs, models, records, tracking
from .data import LengthBatchSampler, TextData, TokenizedDataset, collator, edges_of, load, tokenize
from .errors import KitError
from .experiment import Experiment, TrainingSpec, safe_name
from .flat import FlatAdamW
from .records import Run

if TYPE_CHECKING:
    from . import memory

logger = logging.getLogger(__name__)

# Off CUDA, the plain optimizer of the same kind.
UNPAGED = {"paged_adamw_8bit": "adamw_8bit", "paged_adamw_32bit": "adamw_torch"}
KEPT_CHECKPOINTS = 2


class TrainingError(RuntimeError):
    """Training could not go on; the message says at which step, what to try, and what is kept."""


# --- the Trainer ------------------------------------------------------------------------------------------------


class KitTrainer(Trainer):
    """transformers' Trainer with length buckets, two learning rates and checkpoints that are safe to keep.

    Callbacks, logging, evaluation and resume are the Trainer's own.

    Args:
        spec: How to train.
        lengths: Tokens of each training row.
        **kwargs: What the Trainer takes.
    """

    def __init__(self, *, spec: TrainingSpec, lengths: list[int], **kwargs: Any) -> None:
        self.spec = spec
        self.lengths = lengths
        self.order = order_of(spec, lengths, kwargs["args"].device) if spec.padding == "buckets" else None
        self.meter = _Meter(self)
        self.graphs: graphs.Graphs | None = None
        super().__init__(**kwargs, callbacks=[*_callbacks(spec), self.meter])
        # The Trainer takes it from a `forward` with `**kwargs` that the model divides its loss by the rows of all
        # batches of an accumulation. No head for sequences does, in transformers or here: left at that, N batches
        # would weigh N times as much.
        self.model_accepts_loss_kwargs = False
        self.model: Any  # the Trainer's own hint admits None, before a model is made
        if self.args.disable_tqdm:
            # Without bars the Trainer prints every log entry instead.
            self.remove_callback(PrinterCallback)
        elif self.pop_callback(ProgressCallback) is not None:  # None in a notebook, which has a table of its own
            self.add_callback(_Bars())

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.order if self.order is not None else super()._get_train_sampler(train_dataset)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer: adapters and head apart, each with its own learning rate."""
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            heads = models.head_parameters(model)
            groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    key = (name in heads, name in decayed)
                    groups.setdefault(key, []).append(parameter)
            self._take(model, [parameter for group in groups.values() for parameter in group])
            head_rate = self.spec.head_learning_rate or self.spec.learning_rate
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
            adapters = self.gradients is not None and self.gradients.twice and isinstance(model, peft.PeftModel)
            if adapters and arguments.get("fused"):  # safetensors takes a whole model side by side for tied weights
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
                _keep_embeddings_in_32_bits(self.optimizer, model)
        return self.optimizer

    def _take(self, model: Any, trained: list[torch.nn.Parameter]) -> None:
        """Take a model to train: note what is trained, and find once whether its steps can be graphs."""
        graphs.forget(model)  # those of predictions: weights may be moved
        self.trained = trained
        self.counted = models.trainable_parameters(model)[1]
        self.prepared = False
        device = self.args.device
        problem = graphs.obstacle(self.spec, model, device.type)
        if problem is not None and self.spec.graphs != "none":
            logger.log(
                logging.WARNING if device.type == "cuda" else logging.INFO,
                "Steps run eagerly, not as CUDA graphs: %s.",
                problem,
            )
        self.graphs = graphs.Graphs(device) if problem is None else None
        self.gradients = None if self.graphs is None else graphs.Gradients(self.trained)
        _spare_the_host(model, self.trained, self.gradients)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run one forward and backward pass, counting rows and real tokens without waiting for the device."""
        self.meter.count(inputs["attention_mask"])
        step = super().training_step
        if self.graphs is None:
            # Around the backward pass too: a layer that runs again there must attend as it did before.
            with graphs.attending(self.args.device):
                return step(model, inputs, num_items_in_batch)
        inputs = graphs.filled(inputs, self.spec.batch_size)
        # What a graph is made for besides its shapes: what the loss is divided by.
        kind = f"training step of {self.current_gradient_accumulation_steps}"

        def work(given: dict[str, torch.Tensor]) -> torch.Tensor:
            assert self.gradients is not None
            with graphs.attending(self.args.device), self.gradients.summed():
                return step(model, given)

        if not self.prepared:
            self.prepared = True
            self._prepare_graphs(kind, work, inputs)
        loss: torch.Tensor = self.graphs.run(kind, work, inputs)
        return loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that was cut off after its last step: the Trainer would take one more before it looks.
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _prepare_graphs(self, kind: str, work: graphs.Work, inputs: graphs.Inputs) -> None:
        """Capture a step for each width that the epochs have, the widest first, and say so."""
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
        """Return the widths of the batches of all epochs, the widest first; none if the collator hides them."""
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
        """Run one forward pass of an evaluation, as a graph where steps are."""
        step = super().prediction_step

        def work(given: dict[str, torch.Tensor]) -> tuple[Any, Any, Any]:
            with graphs.attending(self.args.device):
                result: tuple[Any, Any, Any] = step(model, given, prediction_loss_only, ignore_keys)
            return result

        if self.graphs is None:
            return work(inputs)
        with torch.no_grad():
            result: tuple[Any, Any, Any] = self.graphs.run(f"prediction {prediction_loss_only}", work, inputs)
        return result

    # What follows the Trainer does at every step with a walk over every module of the model.

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
            models.save_adapter(self.model, made / "adapter")
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
        models.load_weights_(self.model if model is None else model, Path(resume_from_checkpoint) / "adapter")

    def _load_best_model(self) -> None:
        models.load_weights_(self.model, Path(str(self.state.best_model_checkpoint)) / "adapter")


def trained_embeddings(model: torch.nn.Module) -> list[torch.nn.Embedding]:
    """Return the embeddings that are trained whole: 8-bit optimizers keep their state in 32 bits.

    So does transformers' Trainer (trainer.py, `create_optimizer`), as the optimizers' paper does (Dettmers et al.,
    8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861, section 2.3).

    Args:
        model: A model, with or without adapters.
    """
    return [
        module for module in model.modules() if isinstance(module, torch.nn.Embedding) and module.weight.requires_grad
    ]


def _keep_embeddings_in_32_bits(optimizer: Any, model: torch.nn.Module) -> None:
    # Not in the manager that all optimizers of a process share: it would hold on to every model that was trained, and
    # keep parameters of later ones in 32 bits because they stand in the same place.
    optimizer.mng = manager = bnb.optim.GlobalOptimManager.__new__(bnb.optim.GlobalOptimManager)
    manager.initialize()
    for module in trained_embeddings(model):
        manager.register_module_override(module, "weight", {"optim_bits": 32})


def order_of(spec: TrainingSpec, lengths: Sequence[int], device: torch.device) -> LengthBatchSampler:
    """Return the order of rows in which batches have like lengths (`training.padding` `buckets`).

    Args:
        spec: How to train.
        lengths: Tokens of each training row.
        device: Where. On CUDA few widths occur, so that a graph can be captured for each.
    """
    return LengthBatchSampler(lengths, spec.batch_size * spec.gradient_accumulation, spec.seed, edges=edges_of(device))


def _spare_the_host(model: Any, trained: list[torch.nn.Parameter], gradients: graphs.Gradients | None) -> None:
    """Make what the Trainer asks of a model at every step cost what changes, not a walk over every module.

    It switches the model to training mode and clears its gradients each step: with hundreds of modules that is several
    milliseconds of Python, in which a GPU waits.
    """

    def train(mode: bool = True) -> Any:
        # Its modules are switched together, here and by `eval`.
        return model if model.training == mode else type(model).train(model, mode)

    def zero_grad(set_to_none: bool = True) -> None:
        if gradients is not None:
            gradients.flat.zero_()
            return
        for parameter in trained:
            parameter.grad = None if set_to_none or parameter.grad is None else parameter.grad.zero_()

    model.train, model.zero_grad = train, zero_grad


class _Meter(TrainerCallback):
    """Measures each epoch: seconds of training alone, rows, real tokens, peak memory; and stops on a bad loss."""

    def __init__(self, trainer: KitTrainer) -> None:
        self.trainer = trainer
        self.rows = 0
        self.tokens: torch.Tensor | None = None
        self.seconds = 0.0
        self.started: float | None = None

    def count(self, attention_mask: torch.Tensor) -> None:
        self.rows += attention_mask.shape[0]
        tokens = attention_mask.sum()
        self.tokens = tokens if self.tokens is None else self.tokens + tokens

    def _stop(self) -> None:
        if self.started is not None:
            wait()
            self.seconds += time.perf_counter() - self.started
            self.started = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.best_global_step:
            # The path in the state is where the folder was when it was written.
            state.best_model_checkpoint = str(checkpoints.path_of(Path(args.output_dir), state.best_global_step))
        if state.global_step >= state.max_steps:
            control.should_training_stop = True

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # accelerate does not reach through the loader that skips the batches of a resumed epoch.
        if self.trainer.order is not None:
            self.trainer.order.set_epoch(int(state.epoch or 0))
        self.rows, self.tokens, self.seconds = 0, None, 0.0
        self.started = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.started is None:
            self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = self.trainer.spec.checkpoint_steps
        # At an epoch's last step, and at the last of all, the checkpoint comes after the evaluation, as without
        # `checkpoint_steps`: a run that goes on from there must neither miss it nor draw other random numbers.
        last = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        if every and state.global_step % every == 0 and not last:
            # Losses since the last log are no part of a checkpoint, so they are logged with it.
            control.should_save = control.should_log = True
        # Evaluation and saving inside an epoch are no training time.
        if control.should_save or control.should_evaluate:
            self._stop()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()
        if self.rows and self.tokens is not None:
            self.trainer.log(
                {
                    "epoch_seconds": self.seconds,
                    "epoch_rows": self.rows,
                    "epoch_tokens": int(self.tokens),
                    "samples_per_second": self.rows / self.seconds,
                    "tokens_per_second": int(self.tokens) / self.seconds,
                    "peak_bytes": peak_memory()["peak_bytes"],
                }
            )
        # After the log above, with which the Trainer takes every wish to log as fulfilled.
        control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        for name in ("loss", "eval_loss", "grad_norm"):
            value = (logs or {}).get(name)
            # fp16's loss scale meets infinite gradients by design, and skips those steps.
            if value is None or math.isfinite(value) or (name == "grad_norm" and args.fp16):
                continue
            rate = self.trainer._get_learning_rate()
            kept = state.best_model_checkpoint or (checkpoints.newest_whole(Path(args.output_dir)))
            raise TrainingError(
                f"{name} is {value} at step {state.global_step} (learning rate {rate:.3g}). Try a learning rate "
                f"of {self.trainer.spec.learning_rate / 3:.2g}, more warm-up, or max_grad_norm 0.3"
                + (", or precision bf16 or fp32" if args.fp16 else "")
                + (f". Kept: {kept}" if kept else "")
            )


class _Bars(ProgressCallback):
    """transformers' bars with the newest loss beside them, where it has a line for each entry of the log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if self.training_bar is not None and loss is not None:
            self.training_bar.set_postfix(loss=f"{loss:.3f}", refresh=False)


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, whose count a run that was cut off takes up again.

    The Trainer writes the count into checkpoints, but reads it only together with every other callback's settings.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the evaluations since the best one."""
        super().on_train_begin(args, state, control, **kwargs)
        scores = [entry["eval_f1_macro"] for entry in state.log_history if "eval_f1_macro" in entry]
        self.early_stopping_patience_counter = len(scores) - 1 - scores.index(max(scores)) if scores else 0
        if scores and self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


class EpochLines(TrainerCallback):
    """Prints one line an epoch, above the bars where there are any."""

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Print the epoch's validation scores, speed and memory."""
        scores = metrics or {}
        words = [f"epoch {state.epoch:.3g} of {args.num_train_epochs:g}, step {state.global_step} of {state.max_steps}"]
        words += [
            f"{label} {scores[key]:.4f}"
            for key, label in (("eval_loss", "validation loss"), ("eval_f1_macro", "macro F1"))
            if key in scores
        ]
        speed = next((entry for entry in reversed(state.log_history) if "epoch_seconds" in entry), None)
        if speed is not None and speed["step"] == state.global_step:
            words.append(f"{speed['samples_per_second']:.1f} samples/s, {speed['tokens_per_second']:.0f} tokens/s")
            words.append(f"peak {speed['peak_bytes'] / 2**20:,.0f} MiB")
        tqdm.write("; ".join(words), file=sys.stdout)
        sys.stdout.flush()


def _callbacks(spec: TrainingSpec) -> list[TrainerCallback]:
    return [EarlyStopping(spec.early_stopping)] if spec.early_stopping else []


def wait() -> None:
    """Wait for what the GPU has been given, where there is one: before a clock is read."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> dict[str, Any]:
    """Return the most memory used at once by this process so far.

    Returns:
        `peak_bytes` and `reserved_bytes`: on CUDA the allocator's `max_memory_allocated` and
        `max_memory_reserved`; without a GPU the process's largest resident set (Python and libraries included)
        for both. `measure` says which.
    """
    if torch.cuda.is_available():
        return {
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "measure": "CUDA allocator",
        }
    peak = _most_resident()
    return {"peak_bytes": peak, "reserved_bytes": peak, "measure": "resident set of the process"}


def _most_resident() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    with contextlib.suppress(OSError, StopIteration):
        # Linux's own count. `getrusage` has that of the process that started this one as well, if it was larger.
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    import resource

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- arguments --------------------------------------------------------------------------------------------------


def training_arguments(
    spec: TrainingSpec,
    folder: Path,
    *,
    device: torch.device,
    precision: str,
    steps: int,
    tracked: bool,
    progress: bool,
    eval_rows: int | None = None,
) -> TrainingArguments:
    """Translate a spec into the Trainer's arguments.

    Args:
        spec: How to train.
        folder: Where checkpoints go.
        device: Where it runs.
        precision: `fp32`, `fp16` or `bf16`, resolved.
        steps: Optimizer steps in all, for the warm-up.
        tracked: Whether a W&B run is open.
        progress: Whether to show progress bars.
        eval_rows: Rows a forward pass in evaluation; by default `training.eval_batch_size`, or as many as a step has.

    Returns:
        The arguments. Names are those that transformers 5.17 and 5.24 have in common.
    """
    warmup = spec.warmup_steps if spec.warmup_steps is not None else math.ceil(spec.warmup_ratio * steps)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=spec.epochs,
        max_steps=spec.max_steps or -1,
        per_device_train_batch_size=spec.batch_size,
        per_device_eval_batch_size=eval_rows or spec.eval_batch_size or spec.batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation,
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        warmup_steps=warmup,
        lr_scheduler_type=spec.schedule,
        optim=resolve_optimizer(spec.optimizer, device),
        max_grad_norm=spec.max_grad_norm,
        label_smoothing_factor=spec.label_smoothing,
        fp16=precision == "fp16",
        bf16=precision == "bf16",
        seed=spec.seed,
        data_seed=spec.seed,
        eval_strategy="epoch",
        save_strategy="epoch",  # and every `checkpoint_steps`, by the meter's callback
        logging_steps=spec.logging_steps,
        # A loss that is not finite must be seen, and filtering it would wait for the device at every step.
        logging_nan_inf_filter=False,
        load_best_model_at_end=spec.keep_best,
        metric_for_best_model="f1_macro",
        greater_is_better=True,
        # PEFT's wrapper hides the labels from the Trainer, which then computes no evaluation loss.
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_num_workers=spec.workers,
        dataloader_pin_memory=device.type == "cuda",
        # The next batch travels while this one is computed.
        accelerator_config={"non_blocking": device.type == "cuda"},
        report_to=["wandb"] if tracked else [],
        disable_tqdm=not progress,
        use_cpu=device.type == "cpu",
    )
    # One device a process: several GPUs would be taken for DataParallel, which cannot copy 4-bit weights.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


MOST_EVAL_ROWS = 64


def evaluation_rows(experiment: Experiment, device: str, batch: int | None = None) -> int:
    """Return how many rows a forward pass in evaluation has (`training.eval_batch_size`, or what it stands for).

    A run that fits the GPU while it trains must not fail at its first evaluation. With checkpointing the backward pass
    keeps one layer's activations at a time, more than a forward pass of as many rows does; without it, every layer's,
    which leaves a forward pass room for more rows. Half a layer for each row is on the safe side of both.

    Args:
        experiment: What is trained how.
        device: `cuda` or `cpu`; on a CPU an evaluation has 64 rows.
        batch: Rows a training step; by default the experiment's.

    Raises:
        KitError: When the base's configuration cannot be read.
    """
    spec = experiment.training
    if spec.eval_batch_size is not None:
        return spec.eval_batch_size
    if device == "cpu":
        return MOST_EVAL_ROWS
    rows = 1 if spec.gradient_checkpointing else max(models.layers_of(experiment.model) // 2, 1)
    return min((batch or spec.batch_size) * rows, MOST_EVAL_ROWS)


def trainers_device(device: torch.device) -> torch.device:
    """Return a device if the Trainer would train on it.

    transformers' `TrainingArguments` make the first GPU the current one, whichever was current before
    (training_args.py, `_setup_devices`): a model on another would be trained across two.

    Args:
        device: Where a run is to be made.

    Raises:
        KitError: When it is a GPU other than the first.
    """
    if device.index:
        raise KitError(
            f"the current GPU is {device}, and transformers' Trainer takes the first that it sees: instead of "
            "torch.cuda.set_device, start Python with CUDA_VISIBLE_DEVICES set to the GPU that is meant"
        )
    return device


def resolve_optimizer(name: str, device: torch.device) -> str:
    """Return the optimizer that a device has: off CUDA, the plain one of the same kind for a paged one.

    Args:
        name: One of transformers' names.
        device: Where it runs.
    """
    if device.type == "cuda" or name not in UNPAGED:
        return name
    logger.warning("%s exists on CUDA only; this run takes %s.", name, UNPAGED[name])
    return UNPAGED[name]


def enable_checkpointing(model: torch.nn.Module, use_reentrant: bool) -> None:
    """Recompute activations in the backward pass instead of keeping them.

    The Trainer would set `use_reentrant` its own way, so the model is told directly.

    Args:
        model: As `models.build` made it.
        use_reentrant: Which of torch's two implementations; handed on as it is.
    """
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    base: Any = inner.base_model if isinstance(inner, models.PooledClassifier) else inner
    more: dict[str, Any] = {}
    if not use_reentrant and next(model.parameters()).is_cuda:
        # torch's own way of dropping the same twice cannot be captured in a CUDA graph.
        more = {"preserve_rng_state": False, "context_fn": graphs.checkpoint_contexts}
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant, **more})
    if use_reentrant:
        # The reentrant way finds no gradient to carry unless its inputs need one, and frozen embeddings do not.
        base.enable_input_require_grads()


# --- fine-tuning ------------------------------------------------------------------------------------------------


def finetune(
    experiment: Experiment,
    *,
    data: TextData | None = None,
    out: str | Path = "runs",
    name: str | None = None,
    resume: bool = True,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> Run:
    """Fine-tune an experiment's model and keep everything that belongs to it in a run folder.

    Args:
        experiment: What to train on what, and how.
        data: The data, where it is not what `experiment.data` names; from `qlora_kit.text_classification`.
        out: Folder that run folders are made in.
        name: Name of the run folder; by default the experiment's name and the seed.
        resume: Go on from the newest whole checkpoint of the same run that was cut off, and return a finished
            one as it is. What is finished and different is moved aside to `NAME-DATE`, never overwritten.
        progress: Show progress bars.
        callbacks: Further callbacks of transformers' Trainer.

    Returns:
        The run, ready for `predict` and `qlora_kit.evaluate`.

    Raises:
        KitError: For bad input, before anything is written; when there is no room on the disk; when another
            process is training the same run.
        TrainingError: When the loss is no longer finite or the GPU's memory does not suffice.
    """
    started = time.perf_counter()
    spec = experiment.training
    if data is None:
        data = load(experiment.data)
    else:
        experiment = with_data(experiment, data)
    folder = Path(out) / safe_name("run", name or f"{experiment.name}_seed{spec.seed}")
    base = models.find_base(experiment.model)
    records.refuse_links(folder)
    with records.locked(folder):
        finished = _settle(folder, experiment, data, base, resume)
        if finished is not None:
            logger.warning("%s is finished already; it is returned as it is.", folder)
            return finished
        tokenizer = models.load_tokenizer(experiment.model)
        tokens = {
            split: tokenize(tokenizer, rows.texts, experiment.data.max_length, experiment.data.too_long)
            for split, rows in (("train", data.train), ("validation", data.validation))
        }
        if spec.threads:
            torch.set_num_threads(spec.threads)
        device = trainers_device(models.default_device())
        precision = models.precision_of(experiment, device)
        if device.type == "cuda":
            _count_memory_anew(device)
        with _readable_memory(experiment):
            model = models.build(experiment, data.label_names, device=device, pad_token_id=tokenizer.pad_token_id)
            if experiment.model.random_weights and device.type == "cuda":
                # They are made whole and then quantized, which is no part of fine-tuning a checkpoint.
                _count_memory_anew(device)
            if spec.gradient_checkpointing:
                enable_checkpointing(model, spec.use_reentrant)
            base = models.find_base(experiment.model)  # anew: one from the hub may have come into the cache
            _begin(folder, experiment, data, base)
            with tracking.opened(experiment, Path(out), folder.name) as tracked_run:
                trainer = _trainer(
                    experiment, model, tokenizer, data, tokens, folder, device, precision, bool(tracked_run), progress
                )
                for callback in callbacks:
                    trainer.add_callback(callback)
                train_started = time.perf_counter()
                checkpoint = checkpoints.newest_whole(folder / "checkpoints")
                if checkpoint is not None:
                    logger.warning("Going on from %s.", checkpoint)
                elif experiment.model.head_init == "class_means":
                    start_head(experiment, model, tokenizer, data, device, precision, progress)
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
                train_seconds = time.perf_counter() - train_started
                # By another prefix W&B would show these as test scores.
                validation = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")  # type: ignore[arg-type]
                logits, rows = np.asarray(validation.predictions), data.validation
                tracking.log_validation(tracked_run, logits, rows.labels, rows.texts, data.label_names)
        metrics = evaluation.metrics(logits, np.asarray(rows.labels))
        training = _summary(
            trainer, experiment, data, metrics, train_seconds, time.perf_counter() - started, checkpoint
        )
        _finish(folder, experiment, data, base, model, tokenizer, training, device)
    return Run(folder)


def _count_memory_anew(device: torch.device) -> None:
    gc.collect()  # an earlier run's model, whose Trainer refers to itself, would count as this one's
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def with_data(experiment: Experiment, data: TextData) -> Experiment:
    """Return an experiment on other data; a preset's name says so.

    Args:
        experiment: The experiment.
        data: What it is to be trained on.
    """
    name = experiment.name
    if data.spec.name != "banking77" and experiment.data.name == "banking77":
        kept = (c if c.isascii() and (c.isalnum() or c in "-.") else "-" for c in Path(data.spec.name).stem[:60])
        stem = "".join(kept).strip("-.") or "data"
        name = name.replace("_banking77_", f"_{stem}_")
    return experiment.override({"name": name, "data": records.plain(data.spec)})


def _settle(folder: Path, experiment: Experiment, data: TextData, base: models.Base, resume: bool) -> Run | None:
    """Decide what an existing run folder is: finished (returned), cut off (kept), or another's (moved aside)."""
    if not (folder / "experiment.yaml").is_file():
        return None
    same = False
    with contextlib.suppress(KitError):
        begun = records.read_json(folder / "environment.json")
        same = (
            resume
            and _same(Experiment.from_yaml(folder / "experiment.yaml"), experiment)
            and begun.get("checksums", {}).get("data") == data.checksum
            # Unknown for a base that is not in the hub's cache, then or now.
            and (base.checksum is None or begun["checksums"].get("base") in (None, base.checksum))
        )
    if same:
        if not (folder / "training.json").is_file():
            return None
        _drop_checkpoints(folder, experiment)  # where the run was cut off right before it did so itself
        return Run(folder)
    contents = [item for item in folder.iterdir() if item.name != ".lock"]
    aside = records.move_aside(folder / "experiment.yaml")
    target = folder.with_name(f"{folder.name}-{aside.name.removeprefix('experiment.yaml-')}")
    target.mkdir()
    for item in contents:
        source = aside if item.name == "experiment.yaml" else item
        source.rename(target / item.name)
    logger.warning("%s held another run; it is now %s.", folder, target)
    return None


def _same(first: Experiment, second: Experiment) -> bool:
    """Return whether two experiments give the same result; where they are logged does not matter."""
    one, two = first.to_dict(), second.to_dict()
    for tree in (one, two):
        tree.pop("tracking")
    return one == two


def _begin(folder: Path, experiment: Experiment, data: TextData, base: models.Base) -> None:
    if not (folder / "experiment.yaml").is_file():
        environment = records.environment(data_checksum=data.checksum, base_checksum=base.checksum)
        records.write_json(folder / "environment.json", environment)
        if experiment.data.name != "banking77":  # a file may move or change, and the run folder alone must do
            data.save(folder / "data")
        records.write_text(folder / "experiment.yaml", experiment.to_yaml())


def _trainer(
    experiment: Experiment,
    model: torch.nn.Module,
    tokenizer: Any,
    data: TextData,
    tokens: Mapping[str, list[list[int]]],
    folder: Path,
    device: torch.device,
    precision: str,
    tracked: bool,
    progress: bool,
) -> KitTrainer:
    spec = experiment.training
    return KitTrainer(
        spec=spec,
        lengths=[len(row) for row in tokens["train"]],
        model=model,
        args=training_arguments(
            spec,
            folder / "checkpoints",
            device=device,
            precision=precision,
            steps=total_steps(spec, len(data.train)),
            tracked=tracked,
            progress=progress,
            eval_rows=evaluation_rows(experiment, device.type),
        ),
        **trainer_data(experiment, tokenizer, data, tokens),
    )


def total_steps(spec: TrainingSpec, rows: int) -> int:
    """Return how many optimizer steps training on so many rows takes, as the Trainer counts them."""
    # The last batch of an epoch, and the last step, may have fewer.
    each_epoch = math.ceil(math.ceil(rows / spec.batch_size) / spec.gradient_accumulation)
    return spec.max_steps or math.ceil(each_epoch * spec.epochs)


def trainer_data(
    experiment: Experiment, tokenizer: Any, data: TextData, tokens: Mapping[str, list[list[int]]]
) -> dict[str, Any]:
    """Return the Trainer's arguments that are about data: rows, their padding, their score."""
    return {
        "train_dataset": TokenizedDataset(tokens["train"], data.train.labels),
        "eval_dataset": TokenizedDataset(tokens["validation"], data.validation.labels),
        "data_collator": collator(
            tokenizer.pad_token_id,
            "max_length" if experiment.training.padding == "max_length" else "longest",
            experiment.data.max_length,
            edges=edges_of(models.default_device()),
        ),
        "compute_metrics": lambda predicted: evaluation.compute_metrics(predicted.predictions, predicted.label_ids),
    }


def start_head(
    experiment: Experiment,
    model: torch.nn.Module,
    tokenizer: Any,
    data: TextData,
    device: torch.device,
    precision: str,
    progress: bool,
) -> None:
    """Start a cosine head from the class means of the untrained model's states, in place (`model.head_init`).

    Args:
        experiment: The model's.
        model: As `models.build` made it.
        tokenizer: Its tokenizer.
        data: Its training rows are read, in one forward pass.
        device: Where the model is.
        precision: `fp32`, `fp16` or `bf16`.
        progress: Show a progress bar.
    """
    states = models.forward_texts(
        model,
        tokenizer,
        data.train.texts,
        device=device,
        precision=precision,
        max_length=experiment.data.max_length,
        batch_size=evaluation_rows(experiment, device.type),
        states=True,
        progress="class means" if progress else None,
    )
    graphs.forget(model)  # those of its forward passes: training has its own
    models.start_head_from_class_means_(model, states, data.train.labels)
    model.train()


@contextlib.contextmanager
def _readable_memory(experiment: Experiment) -> Iterator[None]:
    """Turn CUDA's out-of-memory error into one message with what the plan says would fit, and what to try."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        spec = experiment.training
        tries = [f"training.batch_size {max(spec.batch_size // 2, 1)} with gradient_accumulation doubled"]
        if spec.eval_batch_size is not None:
            tries.append("training.eval_batch_size null, which takes no more than training does")
        if not spec.gradient_checkpointing:
            tries.append("training.gradient_checkpointing true")
        if experiment.quantization.scheme == "none" and experiment.lora is not None:
            tries.append("quantization.scheme nf4")
        raise TrainingError(
            f"the GPU's memory does not suffice for batch {spec.batch_size} of up to {experiment.data.max_length} "
            f"tokens. {_plan_says(experiment)}Try {'; or '.join(tries)}. Checkpoints written so far are whole."
        ) from error


def _plan_says(experiment: Experiment, device: memory.Device | None = None) -> str:
    """Return what the plan says of a batch that did not fit, and which would; empty where there is no plan."""
    from . import memory

    spec, length = experiment.training, experiment.data.max_length
    try:
        device = device or memory.find_device()
        planned, fitting = {}, {}
        evaluation, rows = 0, evaluation_rows(experiment, device.kind)
        for recompute in {spec.gradient_checkpointing, True} if device.bytes else ():
            estimate = memory.Estimate(experiment.override({"training.gradient_checkpointing": recompute}), device)
            planned[recompute] = estimate.bytes(spec.batch_size, length)
            batch = spec.batch_size
            while batch and estimate.bytes(batch, length) > device.bytes:
                batch //= 2
            fitting[recompute] = batch
            if recompute == spec.gradient_checkpointing:
                evaluation = estimate.evaluation(rows, length)
    except Exception as error:
        # The error that is being told is worth more than its plan.
        logger.warning("no memory plan of this run: %s: %s", type(error).__name__, error)
        return ""
    if not planned:
        return ""
    words = f"The plan says {planned[spec.gradient_checkpointing] / 2**20:,.0f} MiB of {device.bytes / 2**20:,.0f}"
    if fitting[spec.gradient_checkpointing] == spec.batch_size:
        if evaluation > device.bytes:
            return f"{words} MiB, and {evaluation / 2**20:,.0f} MiB for an evaluation of {rows} rows at a time. "
        return f"{words} MiB, which fits: look whether something else is on the GPU (nvidia-smi). "
    would = [
        f"batch {batch}{' with' if recompute else ' without'} checkpointing"
        for recompute, batch in sorted(fitting.items())
        if batch
    ]
    return f"{words} MiB; {' or '.join(would) or 'not even one row'} would fit. "


def _summary(
    trainer: KitTrainer,
    experiment: Experiment,
    data: TextData,
    metrics: Mapping[str, Any],
    train_seconds: float,
    total_seconds: float,
    resumed: Path | None,
) -> dict[str, Any]:
    """Put `training.json` together from the Trainer's log, which outlives an interruption."""
    history = trainer.state.log_history
    evaluations = [entry for entry in history if "eval_f1_macro" in entry]
    measured = {entry["step"]: entry for entry in history if "epoch_seconds" in entry}
    losses = [entry for entry in history if "loss" in entry and "eval_loss" not in entry]
    epochs, before = [], 0.0
    for entry in evaluations:
        step = entry["step"]
        own = [item for item in losses if before < item["step"] <= step]
        # Each is the mean of the steps since the one before it, which the last of an epoch has fewer of.
        weights = np.diff([before, *(item["step"] for item in own)])
        meter = measured.get(step, {})
        epochs.append(
            {
                "epoch": entry["epoch"],
                "step": step,
                "loss": float(np.average([item["loss"] for item in own], weights=weights)) if own else None,
                "validation": {key: entry[f"eval_{key}"] for key in ("accuracy", "f1_macro", "f1_weighted", "loss")},
                "timing": {
                    "seconds": meter.get("epoch_seconds"),
                    "samples_per_second": meter.get("samples_per_second"),
                    "tokens_per_second": meter.get("tokens_per_second"),
                },
                "memory": {"peak_bytes": meter.get("peak_bytes")},
            }
        )
        before = step
    best = trainer.state.best_global_step if experiment.training.keep_best else None
    trainable, everything = models.trainable_parameters(trainer.model)
    return {
        "schema": records.SCHEMA,
        "name": experiment.name,
        "labels": list(data.label_names),
        "rows": {split: len(rows) for split, rows in data.splits().items()},
        "steps": trainer.state.global_step,
        "best_step": best,
        "metrics": {"validation": metrics},
        "epochs": epochs,
        "losses": [
            {key: entry[key] for key in ("step", "epoch", "loss", "learning_rate", "grad_norm") if key in entry}
            for entry in losses
        ],
        "parameters": {"trainable": trainable, "all": everything},
        "precision": "fp16" if trainer.args.fp16 else "bf16" if trainer.args.bf16 else "fp32",
        "optimizer": str(getattr(trainer.args.optim, "value", trainer.args.optim)),
        "random_weights": experiment.model.random_weights,
        "memory": {"planned_bytes": _planned(trainer, experiment, len(data.label_names)), **peak_memory()},
        "timing": {
            "train_seconds": train_seconds,
            "step_seconds": _step_seconds(measured, experiment.training),
            "samples_per_second": _rate(measured, "epoch_rows"),
            "tokens_per_second": _rate(measured, "epoch_tokens"),
            "total_seconds": total_seconds,
            "resumed_from_step": checkpoints.step_of(resumed) if resumed else None,
        },
        "graphs": None
        if trainer.graphs is None
        else {
            "captured": len(trainer.graphs),
            "start_seconds": trainer.graphs.seconds,
            "start_bytes": trainer.graphs.bytes,
            "start_device_bytes": trainer.graphs.device_bytes,
            "problem": trainer.graphs.problem,
        },
    }


def _planned(trainer: KitTrainer, experiment: Experiment, labels: int) -> int | None:
    """Return what the plan says of the longest batch, in training and in evaluation."""
    from . import memory

    pad: Any = trainer.data_collator
    splits: Any = (trainer.train_dataset, trainer.eval_dataset)
    try:
        train, validation = (pad.width(max(rows.lengths)) for rows in splits)
        plan = memory.plan(experiment, length=train, evaluation_length=validation, labels=labels)
        return max(plan.total, plan.evaluation)
    except Exception as error:
        # A finished run is worth more than its plan.
        logger.warning("no memory plan of this run: %s: %s", type(error).__name__, error)
        return None


def _step_seconds(measured: Mapping[float, Mapping[str, float]], spec: TrainingSpec) -> float | None:
    # Of the steps that were timed: those of an epoch that was cut off, up to its checkpoint, were not.
    steps = sum(
        math.ceil(entry["epoch_rows"] / (spec.batch_size * spec.gradient_accumulation)) for entry in measured.values()
    )
    return sum(entry["epoch_seconds"] for entry in measured.values()) / steps if steps else None


def _rate(measured: Mapping[float, Mapping[str, float]], what: str) -> float | None:
    seconds = sum(entry["epoch_seconds"] for entry in measured.values())
    return sum(entry[what] for entry in measured.values()) / seconds if seconds else None


def _finish(
    folder: Path,
    experiment: Experiment,
    data: TextData,
    base: models.Base,
    model: torch.nn.Module,
    tokenizer: Any,
    training: dict[str, Any],
    device: torch.device,
) -> None:
    """Write the run's results; `training.json` comes last, so that a run that has it is whole."""
    with records.saving(folder):
        records.drop_partial(folder)
        for part, save in (
            ("adapter", lambda target: models.save_adapter(model, target)),
            ("tokenizer", lambda target: tokenizer.save_pretrained(str(target))),
        ):
            aside = folder / f".{part}"
            for stale in (aside, folder / part):
                shutil.rmtree(stale, ignore_errors=True)
            save(aside)
            records.move_into_place(aside, folder / part)
        environment = records.environment(device, data_checksum=data.checksum, base_checksum=base.checksum)
        records.write_json(folder / "environment.json", environment)
        card = cards.model_card(experiment, records.plain(training), base.licence, environment=environment)
        records.write_text(folder / "README.md", card)
        records.write_json(folder / "training.json", training)
        _drop_checkpoints(folder, experiment)


def _drop_checkpoints(folder: Path, experiment: Experiment) -> None:
    if experiment.training.checkpoints == "remove":
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
