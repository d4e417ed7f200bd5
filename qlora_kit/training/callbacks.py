"""Callbacks: speed and memory of each epoch, progress bars, early stopping, one printed line per epoch."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from ..config.sections import TrainingSpec
from ..errors import TrainingError
from ..system.devices import peak_memory, wait
from . import checkpoints


class _Meter(TrainerCallback):
    """Measure each epoch (training seconds, rows, unpadded tokens, peak memory), and raise if a loss is not finite."""

    def __init__(self, trainer: Any) -> None:
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
            # The state holds the folder's path from when it was written; the folder may have moved since.
            state.best_model_checkpoint = str(checkpoints.path_of(Path(args.output_dir), state.best_global_step))
        if state.global_step >= state.max_steps:
            control.should_training_stop = True

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # accelerate does not pass `set_epoch` through the loader that skips the batches of a resumed epoch.
        if self.trainer.order is not None:
            self.trainer.order.set_epoch(int(state.epoch or 0))
        self.rows, self.tokens, self.seconds = 0, None, 0.0
        self.started = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.started is None:
            self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = self.trainer.spec.checkpoint_steps
        # At the last step of an epoch or of the run, do not save here. The checkpoint comes after the evaluation, as
        # without `checkpoint_steps`: a run that resumes from it must neither miss the evaluation nor draw other random
        # numbers.
        last = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        if every and state.global_step % every == 0 and not last:
            # A checkpoint does not hold the losses since the last log, so log them now.
            control.should_save = control.should_log = True
        # Do not count evaluation and saving inside an epoch as training time.
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
        # Set this after the log above: that log resets it.
        control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        for name in ("loss", "eval_loss", "grad_norm"):
            value = (logs or {}).get(name)
            # With fp16 infinite gradients are normal: loss scaling skips those steps.
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
    """transformers' progress bars with the newest loss beside them, instead of a line for each log entry."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if self.training_bar is not None and loss is not None:
            self.training_bar.set_postfix(loss=f"{loss:.3f}", refresh=False)


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping that keeps its count when an interrupted run resumes.

    The Trainer writes the count into checkpoints, but restores it only together with all other callbacks' settings.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the evaluations since the best one."""
        super().on_train_begin(args, state, control, **kwargs)
        scores = [entry["eval_f1_macro"] for entry in state.log_history if "eval_f1_macro" in entry]
        self.early_stopping_patience_counter = len(scores) - 1 - scores.index(max(scores)) if scores else 0
        if scores and self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


class EpochLines(TrainerCallback):
    """Print one line per epoch, above the progress bars if there are any."""

    def __init__(self) -> None:
        self.begun: tuple[float, int] | None = None  # when this process began to train, and at which step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when the training begins, for the time that is left."""
        self.begun = time.perf_counter(), state.global_step

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
            # Without a GPU the peak is the process's, Python and libraries included (see `peak_memory`).
            whose = "" if torch.cuda.is_available() else " (whole process)"
            words.append(f"peak{whose} {speed['peak_bytes'] / 2**20:,.0f} MiB")
        left = state.max_steps - state.global_step
        if self.begun is not None and left > 0 and state.global_step > self.begun[1]:
            taken = time.perf_counter() - self.begun[0]
            words.append(f"about {_spoken(left * taken / (state.global_step - self.begun[1]))} left")
        tqdm.write("; ".join(words), file=sys.stdout)
        sys.stdout.flush()


def _spoken(seconds: float) -> str:
    """Return a time in the unit that suits it: `40 s`, `12 min`, `1.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _callbacks(spec: TrainingSpec) -> list[TrainerCallback]:
    return [EarlyStopping(spec.early_stopping)] if spec.early_stopping else []
