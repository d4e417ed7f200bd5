"""Plan the memory that a run will take, part by part."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..config.experiment import Experiment
from ..errors import KitError
from ..kernels import cuda_graphs
from ..models.adapters import trainable_parameters
from ..models.configuration import check_length
from ..models.forward import evaluation_rows
from ..models.inventory import Inventory, take
from ..system.arguments import COUNT, DEVICE, EXPERIMENT, FLAG, WHOLE, takes
from ..system.devices import COMPUTE_DTYPES
from ..system.showing import counted
from .allocator import Peak, replay
from .devices import MIB, Device, find_device
from .meta_device import _autocast_flag, _batch, _inside, _precision, _skeleton
from .step import _Step
from .tape import Stage, Tape

# Most tokens per step, so that no size on the meta device is beyond 64 bits.
MOST_TOKENS = 2**24

WEIGHTS = (
    "base, linear layers",
    "base, embeddings",
    "base, other matrices",
    "base, norms and biases",
    "head as it was",
)
PARTS = (*WEIGHTS, "adapters and head", "gradients", "optimizer", "batch", "activations", "workspace", "cuBLAS")
"""What memory is used for. `activations` is what the forward pass keeps for the backward pass, and what a checkpointed
layer keeps while it is recomputed. `workspace` is temporary memory: the dequantized weight, gradients of activations,
the optimizer's intermediate values. `cuBLAS` is that library's own memory."""


# --- the plan ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """The planned memory of a training step.

    Args:
        experiment: What is trained.
        batch: Rows per step.
        length: Tokens per row, padding included.
        device: Where it is trained.
        precision: `fp32`, `fp16` or `bf16`.
        parts: Bytes at the moment when most is allocated, by name (`PARTS`).
        total: Their sum: most bytes allocated at once.
        reserved: Bytes that the allocator will have taken from the device by then; with CUDA graphs, by the first
            evaluation.
        paged: Bytes of optimizer state outside torch's allocator, in pages that CUDA moves to the host when the GPU's
            memory runs short.
        phase: When the peak is: `forward`, `backward` or `optimizer`.
        evaluation: Most bytes allocated at once by an evaluation between two steps, of `evaluation_rows` rows.
        evaluation_rows: Rows per forward pass of that evaluation.
        details: Bytes of activations and workspace by the operation that made them.
        parameters: Number of trained parameters, and of all parameters.
        inventory: Which weights of the base are quantized, which are adapted, and which are not quantized.
    """

    experiment: Experiment
    batch: int
    length: int
    device: Device
    precision: str
    parts: dict[str, int]
    total: int
    reserved: int
    paged: int
    phase: str
    evaluation: int
    evaluation_rows: int
    details: dict[str, dict[str, int]]
    parameters: tuple[int, int]
    inventory: Inventory

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as a dict for JSON, with sizes in bytes."""
        return {
            "planned_bytes": self.total,
            "planned_reserved_bytes": self.reserved,
            "paged_bytes": self.paged,
            "parts": dict(self.parts),
            "details": self.details,
            "phase": self.phase,
            "evaluation_bytes": self.evaluation,
            "evaluation_rows": self.evaluation_rows,
            "batch": self.batch,
            "length": self.length,
            "device": self.device.name,
            "precision": self.precision,
            "parameters": {"trainable": self.parameters[0], "all": self.parameters[1]},
            "inventory": self.inventory.to_list(),
        }

    def rows(self) -> list[dict[str, str]]:
        """Return the plan as rows of a table: part, MiB, share."""
        shown = [(name, self.parts[name]) for name in PARTS if self.parts.get(name)]
        rows = [
            {"part": name, "MiB": f"{size / MIB:,.1f}", "share": f"{size / self.total:.0%}"} for name, size in shown
        ]
        rows.append({"part": "total", "MiB": f"{self.total / MIB:,.1f}", "share": "100%"})
        if self.paged:
            rows.append({"part": "paged, outside", "MiB": f"{self.paged / MIB:,.1f}", "share": ""})
        return rows

    def __str__(self) -> str:
        spec = self.experiment
        method = spec.quantization.label if spec.lora else "every weight trained"
        if spec.lora and not spec.quantization.is_quantized:
            method = "LoRA on a base in " + ("32 bits" if self.precision == "fp32" else "16 bits")
        checkpointing = "with" if spec.training.gradient_checkpointing else "without"
        lines = [
            f"{spec.model.name}, {method}, batch {self.batch}, length {self.length}, {self.precision}, "
            f"{checkpointing} checkpointing, {self.device.name}"
        ]
        rows = self.rows()
        width = max(len(row["part"]) for row in rows)
        lines += [f"  {row['part']:{width}}  {row['MiB']:>10} MiB  {row['share']:>4}" for row in rows]
        lines.append(f"  the base: {self.inventory}")
        lines.append(f"  most is allocated in the {self.phase} pass" if self.phase != "optimizer" else
                     "  most is allocated in the optimizer's step")  # fmt: skip
        rows_at_once = counted(self.evaluation_rows, "row")
        lines.append(f"  an evaluation of {rows_at_once} takes {self.evaluation / MIB:,.1f} MiB")
        if self.device.bytes:
            reserved = max(self.reserved, self.evaluation)
            lines.append(
                f"  the allocator will have reserved about {reserved / MIB:,.0f} MiB of "
                f"{self.device.bytes / MIB:,.0f}: it {'fits' if reserved <= self.device.bytes else 'does not fit'}"
            )
        lines += [f"  note: {note}" for note in [self.inventory.warning(spec)] if note]
        return "\n".join(lines)

    def draw(self) -> Any:
        """Draw the parts as one stacked bar."""
        from ..plots.cost import memory_parts

        return memory_parts([{"label": "planned", "parts": self.parts}], self.device.bytes or None)


@takes(
    experiment=EXPERIMENT,
    batch=WHOLE,
    length=WHOLE,
    evaluation_length=WHOLE,
    device=DEVICE,
    labels=COUNT,
    padded=FLAG,
)
def plan(
    experiment: Experiment,
    *,
    batch: int | None = None,
    length: int | None = None,
    evaluation_length: int | None = None,
    device: str | Device | None = None,
    labels: int = 77,
    padded: bool = True,
) -> Plan:
    """Plan the memory of a training step, without weights and without a GPU.

    The experiment's real model is built on the meta device, and one step runs there: forward, loss, backward, clipping,
    optimizer. Every storage that this would allocate is recorded and, for a GPU, replayed through a model of CUDA's
    caching allocator. On a CPU, oneDNN's scratch memory in a 16-bit product is not planned: it depends on the CPU's
    instructions, and is no larger than a copy of the largest weight.

    Args:
        experiment: What is to be trained.
        batch: Rows per step; by default the experiment's.
        length: Tokens per row; by default `data.max_length`.
        evaluation_length: Tokens per row in evaluation; by default `length`.
        device: A name of `DEVICES`, or None for this machine's.
        labels: Number of classes.
        padded: Whether batches have padding; without it attention needs no mask.

    Returns:
        The plan.

    Raises:
        KitError: For a device, model or shape that is not possible, and for a model whose forward pass depends on
            values, not on shapes alone.
    """
    where = device if isinstance(device, Device) else find_device(device)
    spec = experiment.training
    batch = spec.batch_size if batch is None else batch
    length = experiment.data.max_length if length is None else length
    evaluation_length = length if evaluation_length is None else evaluation_length
    check_shape(batch, length)
    check_shape(batch, evaluation_length)
    precision = _precision(experiment, where)
    model = _skeleton(experiment, precision, labels, where)
    peak, paged, cublas = _train(experiment, model, batch, length, where, padded)
    rows = evaluation_rows(experiment, where.kind, batch)
    evaluation, its_own = _evaluate(experiment, model, rows, evaluation_length, where, padded)
    # An evaluation runs eagerly the first time that it meets a width, while the captured steps keep their memory.
    beside = its_own if cuda_graphs.obstacle(spec, model, where.kind) is None else 0
    parts, details = sum_up(peak)
    if cublas:
        parts["cuBLAS"] = cublas
    return Plan(
        experiment=experiment,
        batch=batch,
        length=length,
        device=where,
        precision=precision,
        parts=parts,
        total=sum(parts.values()),
        reserved=peak.reserved + cublas + beside,
        paged=paged,
        phase=peak.phase,
        evaluation=evaluation,
        evaluation_rows=rows,
        details=details,
        parameters=trainable_parameters(model),
        inventory=take(model, experiment),
    )


@contextlib.contextmanager
def _recorded(
    experiment: Experiment, model: nn.Module, length: int, where: Device, padded: bool
) -> Iterator[tuple[_Step, Any]]:
    """Yield a recorded training step on shapes alone, and a stand-in for autocast."""
    precision = _precision(experiment, where)
    check_length(model, experiment.model.name, length)
    dtype = None if precision == "fp32" else COMPUTE_DTYPES[precision]
    stage = Stage(where.kind, where.capability, dtype, padded, experiment.model.fused)
    tape = Tape("meta", _inside(where))
    tape.on_operation = stage.forget_casts
    step = _Step(experiment, model, tape, where)
    with (
        _by_shapes(experiment),
        torch.autograd.set_multithreading_enabled(False),
        _autocast_flag(stage.dtype),
        tape,
        stage,
    ):
        step.hold_weights()
        yield step, stage.autocast()


@contextlib.contextmanager
def _by_shapes(experiment: Experiment) -> Iterator[None]:
    """Turn an error of a step on shapes alone into a KitError of one line."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        first = " ".join(str(error).split())[:200]
        raise KitError(
            f"there is no plan for {experiment.model.name}: a step of it cannot be run on shapes alone ({first}); "
            "qlora_kit.memory.measure runs real steps"
        ) from error


def _train(
    experiment: Experiment, model: nn.Module, batch: int, length: int, where: Device, padded: bool = True
) -> tuple[Peak, int, int]:
    """Run one training step on shapes alone; return its peak, the paged bytes, and the bytes that cuBLAS takes."""
    with _recorded(experiment, model, length, where, padded) as (step, autocast):
        paged = step.hold_optimizer()
        step.run(_batch(batch, length), autocast)
    return replay(step.tape.events, caching=where.kind == "cuda"), paged, step.cublas


def _evaluate(
    experiment: Experiment, model: nn.Module, rows: int, length: int, where: Device, padded: bool = True
) -> tuple[int, int]:
    """Run one forward pass on shapes alone, as the Trainer does in an evaluation between two steps.

    Returns:
        Most bytes allocated at once, and how many of them the pass itself takes, without weights and optimizer state.
    """
    with _recorded(experiment, model, length, where, padded) as (step, autocast), torch.no_grad():
        step.hold_optimizer()
        held = sum(block.bytes for block in step.tape.alive())
        batch = _batch(rows, length)
        for tensor in batch.values():
            step.tape.hold(tensor, "batch")
        step.tape.phase = "forward"
        model.eval()
        with autocast:
            model(**batch)
        model.train()
    most = sum(size for _, size in replay(step.tape.events, caching=where.kind == "cuda").alive)
    return most + step.cublas, most - held


def sum_up(peak: Peak) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Return a peak's bytes by part, and those of activations and workspace by the operation that made them."""
    parts = dict.fromkeys(PARTS, 0)
    details: dict[str, dict[str, int]] = {}
    for block, size in peak.alive:
        part = block.kind or "workspace"
        if part == "workspace" and block.recomputed:
            part = "activations"
        parts[part] += size
        if part in ("activations", "workspace"):
            made = block.made_by.split("::")[-1]
            by = details.setdefault(part, {})
            by[made] = by.get(made, 0) + size
    return (
        {name: size for name, size in parts.items() if size},
        {part: dict(sorted(by.items(), key=lambda item: -item[1])) for part, by in details.items()},
    )


def check_shape(batch: int, length: int) -> None:
    """Refuse a batch without rows or tokens, or one larger than any GPU can hold."""
    for name, value in (("batch", batch), ("length", length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise KitError(f"{name} is {value!r}: allowed is a whole number above 0")
    if batch * length > MOST_TOKENS:
        raise KitError(f"batch {batch} x length {length} is beyond any GPU: allowed are {MOST_TOKENS:,} tokens a step")
