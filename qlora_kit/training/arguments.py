"""Translate an experiment into transformers' TrainingArguments."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import TrainingArguments

from ..config.experiment import Experiment
from ..config.sections import TrainingSpec
from ..models.forward import evaluation_rows
from ..models.precision import precision_of
from ..optimizers import resolve_optimizer


def arguments_of_run(
    experiment: Experiment,
    folder: Path,
    *,
    device: torch.device,
    rows: int,
    tracked: bool = False,
    progress: bool = False,
) -> TrainingArguments:
    """Return the Trainer's arguments for a whole run of an experiment, or for a trial.

    Args:
        experiment: What to train, and how.
        folder: The run's folder; checkpoints go into `checkpoints/` in it.
        device: Where it runs.
        rows: Rows to train on.
        tracked: Whether a W&B run is open.
        progress: Whether to show progress bars.
    """
    return training_arguments(
        experiment.training,
        folder / "checkpoints",
        device=device,
        precision=precision_of(experiment, device),
        steps=total_steps(experiment.training, rows),
        tracked=tracked,
        progress=progress,
        eval_rows=evaluation_rows(experiment, device.type),
    )


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
        steps: Optimizer steps in total, for the warm-up.
        tracked: Whether a W&B run is open.
        progress: Whether to show progress bars.
        eval_rows: Rows per forward pass in evaluation; by default `training.eval_batch_size`, or else the training
            batch size.

    Returns:
        The arguments, by names that both transformers 5.17 and 5.24 have.
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
        save_strategy="epoch",  # `_Meter` also saves every `checkpoint_steps`
        logging_steps=spec.logging_steps,
        # A loss that is not finite must be seen. The filter would also wait for the device at every step.
        logging_nan_inf_filter=False,
        load_best_model_at_end=spec.keep_best,
        metric_for_best_model="f1_macro",
        greater_is_better=True,
        # PEFT's wrapper hides the labels from the Trainer: without this it computes no evaluation loss.
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_num_workers=spec.workers,
        dataloader_pin_memory=device.type == "cuda",
        # The next batch is copied to the GPU while this one is computed.
        accelerator_config={"non_blocking": device.type == "cuda"},
        report_to=["wandb"] if tracked else [],
        disable_tqdm=not progress,
        use_cpu=device.type == "cpu",
    )
    # Use one GPU: with several, the Trainer would use DataParallel, which cannot copy 4-bit weights.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def total_steps(spec: TrainingSpec, rows: int) -> int:
    """Return the number of optimizer steps for this many training rows, as the Trainer counts them."""
    return spec.steps_for(rows)
