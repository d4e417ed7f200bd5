"""Summarize a finished training for `training.json`, with the memory that was planned for it."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..config.experiment import Experiment
from ..config.sections import TrainingSpec
from ..data.rows import TextData
from ..errors import TrainingError
from ..models import inventory
from ..models.adapters import trainable_parameters
from ..models.forward import evaluation_rows
from ..system.devices import peak_memory
from ..system.parsing import SCHEMA
from ..system.showing import counted
from . import checkpoints
from .trainer import KitTrainer

if TYPE_CHECKING:
    from ..memory.devices import Device

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def _readable_memory(experiment: Experiment) -> Iterator[None]:
    """Turn CUDA's out-of-memory error into one message: what would fit by the plan, and what to try."""
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


def _plan_says(experiment: Experiment, device: Device | None = None) -> str:
    """Return the planned memory of a batch that did not fit, and which batch would; empty without a plan."""
    from ..memory.devices import find_device
    from ..memory.fits import Estimate

    spec, length = experiment.training, experiment.data.max_length
    try:
        device = device or find_device()
        planned, fitting = {}, {}
        evaluation, rows = 0, evaluation_rows(experiment, device.kind)
        for recompute in {spec.gradient_checkpointing, True} if device.bytes else ():
            estimate = Estimate(experiment.override({"training.gradient_checkpointing": recompute}), device)
            planned[recompute] = estimate.bytes(spec.batch_size, length)
            batch = spec.batch_size
            while batch and estimate.bytes(batch, length) > device.bytes:
                batch //= 2
            fitting[recompute] = batch
            if recompute == spec.gradient_checkpointing:
                evaluation = estimate.evaluation(rows, length)
    except Exception as error:
        # The out-of-memory error must be reported, with or without a plan.
        logger.warning("no memory plan of this run: %s: %s", type(error).__name__, error)
        return ""
    if not planned:
        return ""
    words = f"The plan says {planned[spec.gradient_checkpointing] / 2**20:,.0f} MiB of {device.bytes / 2**20:,.0f}"
    if fitting[spec.gradient_checkpointing] == spec.batch_size:
        if evaluation > device.bytes:
            at_once = counted(rows, "row")
            return f"{words} MiB, and {evaluation / 2**20:,.0f} MiB for an evaluation of {at_once} at a time. "
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
    """Return the content of `training.json`, from the Trainer's log, which survives an interruption."""
    history = trainer.state.log_history
    evaluations = [entry for entry in history if "eval_f1_macro" in entry]
    measured = {entry["step"]: entry for entry in history if "epoch_seconds" in entry}
    losses = [entry for entry in history if "loss" in entry and "eval_loss" not in entry]
    epochs, before = [], 0.0
    for entry in evaluations:
        step = entry["step"]
        own = [item for item in losses if before < item["step"] <= step]
        # Each logged loss is a mean over the steps since the log before; the last of an epoch covers fewer.
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
    trainable, everything = trainable_parameters(trainer.model)
    return {
        "schema": SCHEMA,
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
        "inventory": inventory.take(trainer.model, experiment).to_list(),
        "precision": "fp16" if trainer.args.fp16 else "bf16" if trainer.args.bf16 else "fp32",
        "optimizer": str(getattr(trainer.args.optim, "value", trainer.args.optim)),
        "random_weights": experiment.model.random_weights,
        "probe": getattr(trainer.model, "neighbours", None),
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
    """Return the planned peak bytes for the longest batch of training and evaluation; None without a plan."""
    from ..memory.plan import plan

    pad: Any = trainer.data_collator
    splits: Any = (trainer.train_dataset, trainer.eval_dataset)
    try:
        train, validation = (pad.width(max(rows.lengths)) for rows in splits)
        planned = plan(experiment, length=train, evaluation_length=validation, labels=labels)
        return max(planned.total, planned.evaluation)
    except Exception as error:
        # A missing plan must not cost a finished run.
        logger.warning("no memory plan of this run: %s: %s", type(error).__name__, error)
        return None


def _step_seconds(measured: Mapping[float, Mapping[str, float]], spec: TrainingSpec) -> float | None:
    # Only timed steps count: those of an interrupted epoch, up to its checkpoint, were not timed.
    steps = sum(
        math.ceil(entry["epoch_rows"] / (spec.batch_size * spec.gradient_accumulation)) for entry in measured.values()
    )
    return sum(entry["epoch_seconds"] for entry in measured.values()) / steps if steps else None


def _rate(measured: Mapping[float, Mapping[str, float]], what: str) -> float | None:
    seconds = sum(entry["epoch_seconds"] for entry in measured.values())
    return sum(entry[what] for entry in measured.values()) / seconds if seconds else None
