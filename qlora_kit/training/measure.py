"""Measure memory and time in a few real training steps, to compare them with the plan."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config.experiment import Experiment
from ..errors import KitError
from ..memory.fits import with_method
from ..memory.plan import check_shape, plan
from ..models.precision import precision_of
from ..system.arguments import COUNT, EXPERIMENT, FLAG, MAPPING, WHOLE, a_path, takes
from ..system.devices import default_device, quiet, trainers_device
from .prepare import count_memory_anew, prepare_model
from .watcher import Measured, _Watcher, random_rows


@takes(
    experiment=EXPERIMENT,
    batch=WHOLE,
    length=WHOLE,
    steps=COUNT,
    labels=COUNT,
    padded=FLAG,
    parts=FLAG,
    snapshot=a_path("snapshot.pickle"),
)
def measure(
    experiment: Experiment,
    *,
    batch: int | None = None,
    length: int | None = None,
    steps: int = 3,
    labels: int = 77,
    padded: bool = True,
    parts: bool = True,
    snapshot: str | Path | None = None,
) -> Measured:
    """Run a few training steps and return their memory and time.

    The kit's own Trainer trains on random tokens of the given shape: one warm-up step, `steps` timed steps and, with
    `parts`, one or two watched steps. Steps run eagerly; the memory of CUDA graphs is in `plan` and in a run's
    `training.json`. On CUDA the allocator counts per process: other tensors of this process count, too.

    Args:
        experiment: What to train; set `model.random_weights` if the weights do not matter.
        batch: Rows per step; by default the experiment's.
        length: Tokens per row; by default `data.max_length`.
        steps: Steps to time.
        labels: Number of classes.
        padded: Whether batches have padding, as in `plan`.
        parts: Whether to watch a step and count its tensor storages.
        snapshot: File for CUDA's memory history; it opens in PyTorch's memory viewer (pytorch.org/memory_viz).

    Returns:
        What was measured. Out of memory is a result, not an error: `fits` is False.

    Raises:
        KitError: For impossible shapes, a snapshot without a GPU, or a current GPU that is not the first.
    """
    batch, length = batch or experiment.training.batch_size, length or experiment.data.max_length
    check_shape(batch, length)
    device = trainers_device(default_device())
    cuda = device.type == "cuda"
    if snapshot is not None and not cuda:
        raise KitError("a snapshot is CUDA's memory history: there is no GPU here")
    watched = (2 if not cuda else 1) if parts else 0
    experiment = _steps_alone(experiment, batch, length, 1 + steps + watched)
    common: dict[str, Any] = {
        "experiment": experiment,
        "batch": batch,
        "length": length,
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "precision": precision_of(experiment, device),
    }
    gc.collect()
    try:
        with quiet():
            prepared = prepare_model(experiment, [f"label {i}" for i in range(labels)], pad_token_id=0)
        if cuda:
            count_memory_anew(device)
            if snapshot is not None:
                torch.cuda.memory._record_memory_history(max_entries=200_000)
        rows = random_rows(experiment, prepared.model, labels, padded)
        watcher = _Watcher(experiment, prepared, rows, steps, watched)
        watcher.train()
    except torch.cuda.OutOfMemoryError:
        return Measured(
            **common, fits=False, total=None, reserved=None, parts={}, paged=0, step_seconds=None, losses=[],
            parameters=(0, 0),
        )  # fmt: skip
    finally:
        if snapshot is not None:
            with contextlib.suppress(Exception):
                torch.cuda.memory._dump_snapshot(str(snapshot))
                torch.cuda.memory._record_memory_history(enabled=None)
    return watcher.result(common)


def _steps_alone(experiment: Experiment, batch: int, length: int, steps: int) -> Experiment:
    """Return the experiment with only this many eager steps, each of one batch of the same shape."""
    return experiment.override(
        {
            "training.batch_size": batch,
            "training.gradient_accumulation": 1,
            "training.padding": "max_length",
            "training.max_steps": steps,
            "training.logging_steps": 1,
            "training.keep_best": False,
            "training.early_stopping": None,
            "training.graphs": "none",
            "data.max_length": length,
        }
    )


@takes(experiment=EXPERIMENT, ways=MAPPING, batch=WHOLE, length=WHOLE, steps=COUNT)
def compare(
    experiment: Experiment,
    ways: Mapping[str, tuple[str, str, Mapping[str, Any]]],
    *,
    batch: int | None = None,
    length: int | None = None,
    steps: int = 3,
) -> Iterator[dict[str, Any]]:
    """Plan and measure the same model trained in several ways, with one batch shape.

    Args:
        experiment: The model, and what the ways do not change.
        ways: For each label the method and the scheme, as `with_method` takes them, and further changes.
        batch: Rows per step; by default the experiment's.
        length: Tokens per row, padding included; by default `data.max_length`.
        steps: Steps to time, for each way.

    Yields:
        One row per way, as soon as it is measured, for tables, `plots.memory_parts` and `plots.memory_against_time`:
        `label`, `method`, `scheme`, `changes`, `batch`, `length`; in bytes, `parts` and `planned` from the plan, and
        `measured`, `counted`, `measured_parts`, `reserved` and `paged` from the measurement; `step_seconds`. If the GPU
        had too little memory, `measured`, `reserved` and `step_seconds` are None.
    """
    for label, (method, scheme, changes) in ways.items():
        spec = with_method(experiment, method, scheme).override(dict(changes))
        planned = plan(spec, batch=batch, length=length)
        measured = measure(spec, batch=batch, length=length, steps=steps)
        yield {
            "label": label,
            "method": method,
            "scheme": scheme,
            "changes": dict(changes),
            "batch": planned.batch,
            "length": planned.length,
            "parts": planned.parts,
            "planned": planned.total,
            "measured": measured.total,
            "counted": measured.counted,
            "measured_parts": measured.parts,
            "reserved": measured.reserved,
            "paged": measured.paged,
            "step_seconds": measured.step_seconds,
        }


@takes(experiment=EXPERIMENT, ways=MAPPING, batch=WHOLE, length=WHOLE, steps=COUNT, repeats=COUNT)
def race(
    experiment: Experiment,
    ways: Mapping[str, tuple[str, str, Mapping[str, Any]]],
    *,
    batch: int | None = None,
    length: int | None = None,
    steps: int = 3,
    repeats: int = 5,
) -> list[dict[str, Any]]:
    """Time the same model trained in several ways, in alternating rounds, with one batch shape.

    A single timing includes whatever else the machine did. So each round times every way, and every second round goes
    in reverse order: slow changes (clock speed, other processes) then affect all ways alike. The spread over the rounds
    shows how far to trust a time.

    Args:
        experiment: The model, and what the ways do not change.
        ways: As for `compare`.
        batch: Rows per step; by default the experiment's.
        length: Tokens per row, padding included; by default `data.max_length`.
        steps: Timed steps per way and round; the round's time is their median.
        repeats: Rounds.

    Returns:
        One row per way: `label`, `method`, `scheme`, `changes`, `batch`, `length`, `steps`, `step_seconds_each` (one
        time per round) and `step_seconds` (their median). A way that does not fit into the GPU's memory has no times.
    """
    specs = {
        label: with_method(experiment, method, scheme).override(dict(changes))
        for label, (method, scheme, changes) in ways.items()
    }
    seconds: dict[str, list[float]] = {label: [] for label in specs}
    for turn in range(repeats):
        for label in reversed(specs) if turn % 2 else specs:
            measured = measure(specs[label], batch=batch, length=length, steps=steps, parts=False)
            if measured.step_seconds is not None:
                seconds[label].append(measured.step_seconds)
    return [
        {
            "label": label,
            "method": method,
            "scheme": scheme,
            "changes": dict(changes),
            "batch": batch or specs[label].training.batch_size,
            "length": length or specs[label].data.max_length,
            "steps": steps,
            "step_seconds_each": seconds[label],
            "step_seconds": float(np.median(seconds[label])) if seconds[label] else None,
        }
        for label, (method, scheme, changes) in ways.items()
    ]
