"""Find which training method fits on which GPU, and up to which model size."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..config.experiment import Experiment
from ..config.names import presets
from ..config.preset import preset
from ..config.quantization import SCHEMES
from ..config.sections import LoraSpec, ModelSpec, TrainingSpec
from ..errors import KitError, unknown
from ..models.adapters import trainable_parameters
from ..models.configuration import layers_of, positions_of
from ..models.sources import find_base
from ..system.arguments import COUNT, DEVICE, EXPERIMENT, FLAG, MODEL, ROWS, TEXT, takes
from ..system.hub import refuse_out_of_reach
from ..system.safe_peft import peft
from .devices import DEVICES, Device, find_device
from .meta_device import _precision, _skeleton
from .plan import _evaluate, _train

# --- what fits on a GPU ------------------------------------------------------------------------------------------


METHODS = (
    ("full", "none", True),
    ("lora", "none", True),
    ("qlora", "int8", True),
    ("qlora", "nf4", True),
)
"""Method, scheme, double quantization: what `fits` compares."""

LLAMA = ("llama-1.1b", "llama-3b", "llama-7b", "llama-13b", "llama-30b", "llama-65b")


@takes(experiment=EXPERIMENT, method=TEXT, scheme=TEXT, nested=FLAG)
def with_method(experiment: Experiment, method: str, scheme: str = "none", nested: bool = True) -> Experiment:
    """Return an experiment with another training method and without CUDA graphs, all else equal.

    Args:
        experiment: The experiment. If it has no adapters and the method needs them, those of `LoraSpec()` are added.
        method: `full`, `lora` or `qlora`.
        scheme: How the base is stored, for `qlora`.
        nested: Whether its scales are quantized too.

    Raises:
        KitError: For an unknown method.
    """
    if method not in ("full", "lora", "qlora"):
        raise unknown("method", method, ("full", "lora", "qlora"))
    changes: dict[str, Any] = {"quantization.scheme": scheme if method == "qlora" else "none"}
    if not SCHEMES[changes["quantization.scheme"]].blocks:
        changes["quantization.block_size"] = 64
    changes["quantization.double_quantization"] = nested
    changes["training.graphs"] = "none"  # as in `measure`
    if method == "full":
        changes["lora"] = None
    elif experiment.lora is None:
        changes["lora"] = dataclasses.asdict(LoraSpec())
    return experiment.override(changes)


@takes(model=MODEL)
def of_model(model: str | Experiment) -> Experiment:
    """Return an experiment for a model: a preset, a YAML file, or a model's name with the kit's own settings.

    Args:
        model: An experiment (returned as it is), a preset's name, a `.yaml` file, `shape:NAME`, a folder, or a name
            on the hub.
    """
    if isinstance(model, Experiment):
        return model
    if model in presets() or model == "auto" or model.endswith((".yaml", ".yml")):
        return preset(model)
    spec = ModelSpec(model, random_weights=model.startswith("shape:"))
    if find_base(spec).source == model and not Path(model).is_dir():
        refuse_out_of_reach(model)
    return Experiment("plan", spec, training=TrainingSpec(batch_size=8, optimizer="paged_adamw_8bit"))


class Estimate:
    """Estimate the memory of a deep model from plans of two shallow ones: each layer adds the same.

    Args:
        experiment: What is trained.
        device: Where it is trained.
        labels: Number of classes.
    """

    def __init__(self, experiment: Experiment, device: Device, labels: int = 77) -> None:
        self.device = device
        self.layers = layers_of(experiment.model)
        precision = _precision(experiment, device)
        counts = (2, 5) if self.layers > 6 else (self.layers,)
        self._plans = [experiment.override({"model.layers": count}) for count in counts]
        self._models = [_skeleton(each, precision, labels, device) for each in self._plans]
        self.positions = positions_of(self._models[0])
        self._known: dict[tuple[int, int], int] = {}

    @property
    def parameters(self) -> int:
        """Number of the model's parameters, without adapters."""
        counted = [trainable_parameters(model) for model in self._models]
        adapted = isinstance(self._models[0], peft.PeftModel)
        return self._whole([everything - adapted * trained for trained, everything in counted])

    def _whole(self, values: list[int]) -> int:
        return values[0] if len(values) == 1 else round(values[0] + (self.layers - 2) * (values[1] - values[0]) / 3)

    def bytes(self, batch: int, length: int) -> int:
        """Return an estimate of the bytes that the allocator will have reserved."""
        key = (batch, length)
        if key not in self._known:
            self._known[key] = self._whole(
                [
                    self._reserved(each, model, batch, length)
                    for each, model in zip(self._plans, self._models, strict=True)
                ]
            )
        return self._known[key]

    def evaluation(self, rows: int, length: int) -> int:
        """Return the most bytes that an evaluation with this many rows per forward pass allocates at once."""
        return self._whole(
            [
                _evaluate(each, model, rows, length, self.device)[0]
                for each, model in zip(self._plans, self._models, strict=True)
            ]
        )

    def _reserved(self, experiment: Experiment, model: nn.Module, batch: int, length: int) -> int:
        peak, _, cublas = _train(experiment, model, batch, length, self.device)
        return peak.reserved + cublas


@takes(model=MODEL, device=DEVICE, length=COUNT, most=COUNT)
def fits(
    model: str | Experiment,
    *,
    device: str | Device = "T4",
    length: int = 512,
    checkpointing: Sequence[bool] = (True, False),
    methods: Sequence[tuple[str, str, bool]] = METHODS,
    most: int = 4096,
) -> list[dict[str, Any]]:
    """Find the largest batch and the longest text with which a model fits on a GPU, for each method.

    Args:
        model: An experiment, or what `of_model` takes.
        device: A name of `DEVICES`.
        length: Tokens per row, for the largest batch.
        checkpointing: Whether layers are recomputed: with, without, or both.
        methods: Method, scheme and double quantization of each row.
        most: Largest batch to try.

    Returns:
        A row for each method, with and without checkpointing: `method`, `scheme`, `double_quantization`,
        `checkpointing`, `length`, `batch` (the largest at that length; 0 where not even one row fits), `longest` (the
        largest length at batch 1; 0 where none fits), and `planned_bytes` at one row.

    Raises:
        KitError: For the CPU, whose memory depends on the machine, and for an unknown device or model.
    """
    experiment = of_model(model)
    where = device if isinstance(device, Device) else find_device(device)
    if not where.bytes:
        raise KitError("fits is for GPUs: name one of " + ", ".join(name for name in DEVICES if name != "cpu"))
    rows = []
    for method, scheme, nested in methods:
        for recompute in checkpointing:
            spec = with_method(experiment, method, scheme, nested).override(
                {"training.gradient_checkpointing": recompute}
            )
            estimate = Estimate(spec, where)
            positions = estimate.positions or 8192
            row_length = min(length, positions)
            rows.append(
                {
                    "method": method,
                    "scheme": scheme,
                    "double_quantization": nested,
                    "checkpointing": recompute,
                    "length": row_length,
                    "batch": _largest(functools.partial(estimate.bytes, length=row_length), where.bytes, most),
                    "longest": _largest(functools.partial(estimate.bytes, 1), where.bytes, positions, 64),
                    "planned_bytes": estimate.bytes(1, row_length),
                }
            )
    return rows


def _largest(size: Callable[[int], int], room: int, most: int, grain: int = 1) -> int:
    """Return the largest multiple of `grain` (at most `most`) whose size fits into `room`, or 0."""
    low, high = 0, most // grain + 1
    if high < 2 or size(grain) > room:
        return 0
    # Sizes grow almost linearly: aim at the point where a straight line through two of them reaches `room`.
    low, far = 1, min(9, high - 1)
    slope = max((size(far * grain) - size(grain)) / max(far - 1, 1), 1)
    aim, tries = 1 + (room - size(grain)) / slope, 0
    while high - low > 1:
        if tries > 3:  # not linear enough: bisect
            aim = (low + high) / 2
        value = round(min(max(aim, low + 1), high - 1))
        left = room - size(value * grain)
        low, high = (value, high) if left >= 0 else (low, value)
        aim, tries = value + left / slope, tries + 1
    return low * grain


@takes(device=DEVICE, batch=COUNT, length=COUNT, checkpointing=FLAG)
def crossing(
    *,
    device: str | Device = "T4",
    batch: int = 1,
    length: int = 512,
    checkpointing: bool = True,
    shapes: Sequence[str] = LLAMA,
    methods: Sequence[tuple[str, str, bool]] = METHODS,
) -> dict[str, Any]:
    """Find the model size at which each method stops fitting a GPU.

    Args:
        device: A name of `DEVICES`.
        batch: Rows per step.
        length: Tokens per row.
        checkpointing: Whether layers are recomputed.
        shapes: Models of one family, the smallest first; see `qlora_kit/shapes`.
        methods: As for `fits`.

    Returns:
        `rows`: one for each model and method, with `parameters`, `planned_bytes` and `fits`. `limits`: for each method
        the number of parameters at which its memory reaches the device's (interpolated linearly between two models;
        None where even the largest fits). `device_bytes`.
    """
    where = device if isinstance(device, Device) else find_device(device)
    rows: list[dict[str, Any]] = []
    limits: list[dict[str, Any]] = []
    for method, scheme, nested in methods:
        before: tuple[float, float] | None = None
        limit: float | None = None
        for name in shapes:
            spec = with_method(of_model(f"shape:{name}"), method, scheme, nested).override(
                {"training.gradient_checkpointing": checkpointing}
            )
            estimate = Estimate(spec, where)
            size = estimate.bytes(batch, length)
            parameters = estimate.parameters
            rows.append(
                {
                    "model": name,
                    "method": method,
                    "scheme": scheme,
                    "double_quantization": nested,
                    "parameters": parameters,
                    "planned_bytes": size,
                    "fits": size <= where.bytes,
                }
            )
            if size > where.bytes and limit is None:
                if before is None:
                    limit = parameters * where.bytes / size
                else:
                    share = (where.bytes - before[1]) / (size - before[1])
                    limit = before[0] + share * (parameters - before[0])
            before = (parameters, size)
        limits.append({"method": method, "scheme": scheme, "double_quantization": nested, "parameters": limit})
    return {
        "device": where.name,
        "device_bytes": where.bytes,
        "batch": batch,
        "length": length,
        "rows": rows,
        "limits": limits,
    }


@takes(rows=ROWS)
def same_shape(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Return the batch and length that all rows of a comparison have.

    Memory at different shapes does not compare methods, because activations grow with the shape.

    Args:
        rows: Each with `batch` and `length`.

    Raises:
        KitError: When they differ; the message names the shapes.
    """
    found = {(row["batch"], row["length"]) for row in rows}
    if len(found) != 1:
        raise KitError(
            "these rows cannot be compared: they have "
            + " and ".join(f"batch {batch} x length {length}" for batch, length in sorted(found))
            + ". Measure all of them at one shape"
        )
    return found.pop()
