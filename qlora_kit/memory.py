"""Memory: known before the run, measured after it.

`plan` says what a training step will take, part by part, without weights and without a GPU: it runs one step of the
experiment's real model on shapes alone (`qlora_kit.tape`) and replays what was allocated. `measure` trains for a few
steps and says what it took. `fits` asks the plan how far a GPU's memory reaches.

    print(qk.memory.plan(experiment, batch=8, length=128, device="T4"))
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from . import models, training
from .anatomy import anatomy
from .errors import KitError, unknown
from .experiment import Experiment
from .models import bnb
from .tape import Block, Peak, Stage, Tape, parameters_of, replay

MIB, GIB = 1024**2, 1024**3

WEIGHTS = ("base, linear layers", "base, embeddings", "base, norms and biases", "head as it was")
PARTS = (*WEIGHTS, "adapters and head", "gradients", "optimizer", "batch", "activations", "workspace", "cuBLAS")
"""Where memory goes. `activations` is what the forward pass keeps for the backward pass, and what a checkpointed
layer keeps while it runs again; `workspace` is what lives for the length of an operation: the dequantized weight,
gradients on their way down, the optimizer's intermediate values; `cuBLAS` is that library's own."""


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU as the plan needs to know it, or the CPU.

    Args:
        name: Its name.
        bytes: Memory that a process can allocate on it (what `torch.cuda.mem_get_info` shows on an empty one, less
            the CUDA context); 0 for the CPU, whose memory is whatever the machine has.
        capability: Compute capability.
    """

    name: str
    bytes: int
    capability: tuple[int, int]

    @property
    def kind(self) -> str:
        """`cpu` or `cuda`."""
        return "cuda" if self.bytes else "cpu"

    @property
    def precision(self) -> str:
        """What `auto` computes in there."""
        if self.kind == "cpu":
            return "fp32"
        return "bf16" if models.bf16_in_hardware(self.capability) else "fp16"

    @property
    def cublas(self) -> int:
        """Bytes that cuBLAS takes through torch's allocator.

        One workspace for the thread that runs the forward pass and one for autograd's: 32 MiB each on Hopper,
        8.125 on other GPUs, unless `CUBLAS_WORKSPACE_CONFIG` says otherwise (aten/src/ATen/cuda/CublasHandlePool.cpp).
        """
        if self.kind == "cpu":
            return 0
        chosen = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")
        sizes = [int(text) for text in chosen.split(":") if text.isdigit()]
        if len(sizes) >= 2:
            each = sum(size * count for size, count in zip(sizes[::2], sizes[1::2], strict=False)) * 1024
        else:
            each = 32 * MIB if self.capability[0] == 9 else 8 * MIB + 128 * 1024
        return 2 * each


CONTEXT = 450 * MIB
DEVICES = {
    # Memory as torch.cuda.get_device_properties shows it on each.
    "T4": Device("T4", 15_095 * MIB - CONTEXT, (7, 5)),
    "L4": Device("L4", 22_563 * MIB - CONTEXT, (8, 9)),
    "3090": Device("3090", 24_124 * MIB - CONTEXT, (8, 6)),
    "4090": Device("4090", 24_081 * MIB - CONTEXT, (8, 9)),
    "A100-40": Device("A100-40", 40_326 * MIB - CONTEXT, (8, 0)),
    "A100-80": Device("A100-80", 81_038 * MIB - CONTEXT, (8, 0)),
    "H100": Device("H100", 81_008 * MIB - CONTEXT, (9, 0)),
    "cpu": Device("cpu", 0, (0, 0)),
}
"""GPUs by name. `CONTEXT` is what CUDA itself takes of each: kernels, handles, stacks."""


def find_device(device: str | None = None) -> Device:
    """Return a device by name.

    Args:
        device: A name of `DEVICES`, or None for this machine's: its first GPU, or the CPU.

    Raises:
        KitError: For a name that is not known.
    """
    if device is None or (device == "cuda" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            return DEVICES["cpu"]
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, properties.total_memory - CONTEXT, (properties.major, properties.minor))
    names = {name.lower(): found for name, found in DEVICES.items()}
    if device.lower() not in names:
        raise unknown("device", device, DEVICES)
    return names[device.lower()]


# --- the plan ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training step takes.

    Args:
        experiment: What is trained.
        batch: Rows a step.
        length: Tokens a row, padding included.
        device: Where.
        precision: `fp32`, `fp16` or `bf16`.
        parts: Bytes at the moment when most is allocated, by name (`PARTS`).
        total: Their sum: most bytes allocated at once.
        reserved: What the allocator will have taken from the device by then.
        paged: Bytes of optimizer state outside of torch's allocator, in pages that CUDA moves to the host under
            pressure.
        phase: When the peak is: `forward`, `backward` or `optimizer`.
        details: Finer than the parts: activations and workspace by the operation that made them.
        parameters: Trained parameters, and all.
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
    details: dict[str, dict[str, int]]
    parameters: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON holds it: bytes."""
        return {
            "planned_bytes": self.total,
            "planned_reserved_bytes": self.reserved,
            "paged_bytes": self.paged,
            "parts": dict(self.parts),
            "details": self.details,
            "phase": self.phase,
            "batch": self.batch,
            "length": self.length,
            "device": self.device.name,
            "precision": self.precision,
            "parameters": {"trainable": self.parameters[0], "all": self.parameters[1]},
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
        if spec.lora and spec.quantization.scheme == "none":
            method = "LoRA on a base in " + ("32 bits" if self.precision == "fp32" else "16 bits")
        checkpointing = "with" if spec.training.gradient_checkpointing else "without"
        lines = [
            f"{spec.model.name}, {method}, batch {self.batch}, length {self.length}, {self.precision}, "
            f"{checkpointing} checkpointing, {self.device.name}"
        ]
        rows = self.rows()
        width = max(len(row["part"]) for row in rows)
        lines += [f"  {row['part']:{width}}  {row['MiB']:>10} MiB  {row['share']:>4}" for row in rows]
        lines.append(f"  most is allocated in the {self.phase} pass" if self.phase != "optimizer" else
                     "  most is allocated in the optimizer's step")  # fmt: skip
        if self.device.bytes:
            lines.append(
                f"  the allocator will have reserved about {self.reserved / MIB:,.0f} MiB of "
                f"{self.device.bytes / MIB:,.0f}: it {'fits' if self.reserved <= self.device.bytes else 'does not fit'}"
            )
        return "\n".join(lines)

    def draw(self) -> Any:
        """Draw the parts as one stacked bar."""
        return draw_parts({"planned": self.parts})


def plan(
    experiment: Experiment,
    *,
    batch: int | None = None,
    length: int | None = None,
    device: str | Device | None = None,
    labels: int = 77,
    padded: bool = True,
) -> Plan:
    """Say what a training step will take, without weights and without a GPU.

    The experiment's real model is built on the meta device and one step of it run there: forward, loss, backward,
    clipping, optimizer. Every storage that this would allocate is noted and, for a GPU, replayed through a model of
    CUDA's caching allocator.

    Args:
        experiment: What is to be trained.
        batch: Rows a step; by default the experiment's.
        length: Tokens a row; by default `data.max_length`.
        device: A name of `DEVICES`, or None for this machine's.
        labels: Number of classes.
        padded: Whether batches have padding; without it attention needs no mask.

    Returns:
        The plan.

    Raises:
        KitError: For a device, model or shape that cannot be.
    """
    where = device if isinstance(device, Device) else find_device(device)
    batch, length = batch or experiment.training.batch_size, length or experiment.data.max_length
    _check_shape(batch, length)
    precision = _precision(experiment, where)
    model = _skeleton(experiment, precision, labels)
    _check_positions(model, experiment, length)
    stage = Stage(where.kind, where.capability, models.COMPUTE_DTYPES[precision] if precision != "fp32" else None, padded)
    tape = Tape("meta", _inside(where))
    tape.on_operation = stage.forget_casts
    step = _Step(experiment, model, tape, torch.device("meta"), where)
    with torch.autograd.set_multithreading_enabled(False), _autocast_flag(stage.dtype), tape, stage:
        step.hold_weights()
        paged = step.hold_optimizer()
        step.run(_batch(model, batch, length, labels, torch.device("meta"), padded), stage.autocast())
    return _plan_of(experiment, batch, length, where, precision, tape, paged, models.trainable_parameters(model))


def _plan_of(
    experiment: Experiment,
    batch: int,
    length: int,
    where: Device,
    precision: str,
    tape: Tape,
    paged: int,
    parameters: tuple[int, int],
) -> Plan:
    peak = replay(tape.events, caching=where.kind == "cuda")
    parts, details = _sum_up(peak)
    if where.cublas:
        parts["cuBLAS"] = where.cublas
    return Plan(
        experiment=experiment,
        batch=batch,
        length=length,
        device=where,
        precision=precision,
        parts=parts,
        total=sum(parts.values()),
        reserved=peak.reserved + where.cublas,
        paged=paged,
        phase=peak.phase,
        details=details,
        parameters=parameters,
    )


def _sum_up(peak: Peak) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
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


def _check_shape(batch: int, length: int) -> None:
    for name, value in (("batch", batch), ("length", length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise KitError(f"{name} is {value!r}: allowed is a whole number above 0")


def _check_positions(model: nn.Module, experiment: Experiment, length: int) -> None:
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    most = getattr(getattr(inner, "config", None), "max_position_embeddings", None)
    if most and length > most:
        raise KitError(f"length is {length}: {experiment.model.name} has {most} positions")


def _precision(experiment: Experiment, where: Device) -> str:
    wanted = experiment.training.precision
    if where.kind == "cpu":
        return "fp32"
    if wanted == "auto":
        return where.precision
    if wanted == "bf16" and where.precision != "bf16":
        raise KitError(f"a {where.name} has no bf16 in hardware: use training.precision fp16 or auto")
    return wanted


def _skeleton(experiment: Experiment, precision: str, labels: int) -> nn.Module:
    """Build the experiment's model on the meta device: every shape and dtype, no weight."""
    changed = experiment.override({"training.precision": precision, "model.random_weights": True})
    names = [f"label {place}" for place in range(labels)]
    rng = torch.get_rng_state()
    try:
        model = models.build(changed, names, device=torch.device("meta"), pad_token_id=0)
    finally:
        torch.set_rng_state(rng)
    model = model.to("meta")
    if experiment.training.gradient_checkpointing:
        training.enable_checkpointing(model, experiment.training.use_reentrant)
    return model


@contextlib.contextmanager
def _autocast_flag(dtype: torch.dtype | None) -> Iterator[None]:
    """Let PEFT see autocast as switched on, as it is while the Trainer runs a step on a GPU."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)


def _batch(
    model: nn.Module, batch: int, length: int, labels: int, device: torch.device, padded: bool
) -> dict[str, torch.Tensor]:
    """Return a batch of random tokens, the first row full and the others three quarters full."""
    inner: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if device.type == "meta":
        return {
            "input_ids": torch.empty(batch, length, dtype=torch.int64, device=device),
            "attention_mask": torch.empty(batch, length, dtype=torch.int64, device=device),
            "labels": torch.empty(batch, dtype=torch.int64, device=device),
        }
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, inner.config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.int64)
    if padded:
        if batch == 1:
            mask[0, -max(length // 8, 1) :] = 0
        else:
            mask[1:, -max(length // 4, 1) :] = 0
        ids[mask == 0] = inner.config.pad_token_id or 0
    target = torch.randint(0, labels, (batch,), generator=generator)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": target.to(device)}


class _Step:
    """One training step as the Trainer makes it, on a tape."""

    def __init__(
        self, experiment: Experiment, model: nn.Module, tape: Tape, device: torch.device, where: Device
    ) -> None:
        self.spec, self.experiment = experiment.training, experiment
        self.model, self.tape, self.device, self.where = model, tape, device, where
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer: Any = None

    def hold_weights(self) -> None:
        """Count the weights, by kind."""
        kinds = _kinds(self.model)
        for tensor in parameters_of(self.model):
            self.tape.hold(tensor, kinds.get(tensor.untyped_storage()._cdata, "base, norms and biases"))

    def hold_optimizer(self) -> int:
        """Make the optimizer's state, and return how much of it lies outside of torch's allocator."""
        self.tape.phase = "before"
        tensors, paged, self.optimizer = _optimizer_state(self.spec, self.trained, self.where)
        for tensor in tensors:
            self.tape.hold(tensor, "optimizer")
        self._state = tensors
        if self.spec.gradient_accumulation > 1:
            for parameter in self.trained:
                parameter.grad = torch.empty_like(parameter)
                self.tape.hold(parameter.grad, "gradients")
        return paged

    def run(self, batch: dict[str, torch.Tensor], autocast: Any) -> None:
        """Run forward, backward, clipping and the optimizer."""
        tape = self.tape
        for tensor in batch.values():
            tape.hold(tensor, "batch")
        before = {id(block) for block in tape.alive()}
        tape.phase = "forward"
        with autocast:
            loss = self.model(**batch).loss
        for block in tape.alive():
            if id(block) not in before:
                block.kind = "activations"
        tape.phase = "backward"
        scale = torch.empty((), device=self.device) if self.device.type == "meta" else torch.ones((), device=self.device)
        if self.spec.gradient_accumulation > 1:
            loss = loss / self.spec.gradient_accumulation
        # Not loss.backward(): a function mode is off inside of what it handles, and layers that run again need it.
        loss = loss * scale
        torch.autograd.graph._engine_run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
        del loss
        for parameter in self.trained:
            if parameter.grad is not None:
                block = tape.block_of(parameter.grad)
                if block is not None:
                    block.kind = "gradients"
        tape.phase = "optimizer"
        if self.spec.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.trained, self.spec.max_grad_norm)
        if self.optimizer is not None:
            self.optimizer.step()
        for parameter in self.trained:
            parameter.grad = None


def _kinds(model: nn.Module) -> dict[int, str]:
    """Name what each storage of a model is for."""
    from .anatomy import _part

    heads = [] if isinstance(model, peft.PeftModel) else models.head_modules(model)
    kinds: dict[int, str] = {}
    for name, module in model.named_modules():
        for leaf, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            part = _part(f"{name}.{leaf}", module, heads, leaf)
            if part in ("adapters", "head"):
                part = "adapters and head"
            elif part == "base, buffers":
                part = "base, norms and biases"
            for storage in _storages(tensor, module):
                kinds.setdefault(storage, part)
    return kinds


def _storages(tensor: torch.Tensor, module: nn.Module) -> list[int]:
    from .tape import _tables

    held = [tensor, *_tables(getattr(tensor, "quant_state", None))]
    state = getattr(module, "state", None)
    held += [
        extra
        for extra in (getattr(state, "CB", None), getattr(state, "SCB", None), getattr(tensor, "SCB", None))
        if isinstance(extra, torch.Tensor)
    ]
    return [item.untyped_storage()._cdata for item in held]


# bitsandbytes, optim/optimizer.py: smaller tensors keep their state in 32 bits, and outside of pages.
_MIN_8BIT, _MIN_PAGED = 4096, 100_000


def _optimizer_state(
    spec: Any, trained: Sequence[torch.Tensor], where: Device
) -> tuple[list[torch.Tensor], int, Any]:
    """Make an optimizer's state on the meta device.

    Returns:
        Its tensors, the bytes of it that lie in pages outside of torch's allocator, and the optimizer where its step
        is to be run (bitsandbytes' steps run in place and allocate nothing).
    """
    name = spec.optimizer
    if where.kind == "cpu":
        name = training.UNPAGED.get(name, name)

    def empty(shape: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tensors: list[torch.Tensor] = []
    if name in ("adamw_torch", "adamw_torch_fused"):
        fused = name == "adamw_torch_fused"
        optimizer = torch.optim.AdamW(trained, lr=1e-3, foreach=where.kind == "cuda" and not fused)
        for parameter in trained:
            state = optimizer.state[parameter]
            state["step"] = torch.tensor(1.0)
            state["exp_avg"], state["exp_avg_sq"] = empty(parameter.shape), empty(parameter.shape)
            tensors += [state["exp_avg"], state["exp_avg_sq"]]
        # The fused step runs in place.
        return tensors, 0, None if fused else optimizer
    if name == "sgd":
        return [], 0, torch.optim.SGD(trained, lr=1e-3, foreach=where.kind == "cuda")
    if name == "adafactor":
        for parameter in trained:
            shape = parameter.shape
            if len(shape) >= 2:
                tensors += [empty(shape[:-1]), empty((*shape[:-2], shape[-1]))]
            else:
                tensors.append(empty(shape))
        return tensors, 0, None
    eight, paged = "8bit" in name, "paged" in name
    outside = 0
    if eight:
        tensors += [empty(256), empty(256)]
    for parameter in trained:
        size = parameter.numel()
        small = not eight or size < _MIN_8BIT
        dtype = torch.float32 if small else torch.uint8
        if paged and size >= _MIN_PAGED:
            outside += 2 * size * dtype.itemsize
        else:
            tensors += [empty(parameter.shape, dtype), empty(parameter.shape, dtype)]
        if not small:
            tensors += [empty(-(-size // 256)), empty(-(-size // 256))]
    return tensors, outside, None


# --- what operations allocate inside ----------------------------------------------------------------------------


def _inside(where: Device) -> dict[Any, Any]:
    """Return what to run on the meta device in place of bitsandbytes' operations, to see what they allocate inside.

    The bodies are those of bitsandbytes' own kernels (backends/default/ops.py and backends/cuda/ops.py, 0.50).
    """
    ops = torch.ops.bitsandbytes

    def gemm_4bit(
        a: Any, b: Any, shape: Any, absmax: Any, blocksize: int, quant_type: str, bias: Any = None,
        absmax_8bit: Any = None, absmax_code: Any = None, absmax_offset: Any = None,
    ) -> Any:  # fmt: skip
        if where.kind == "cuda" and a.numel() // a.shape[-1] <= 32:
            return NotImplemented  # few rows: one fused kernel, nothing dequantized
        if absmax_8bit is not None:
            absmax = ops.dequantize_blockwise.default(absmax_8bit, absmax, absmax_code, 256, torch.float32)
            absmax = absmax + absmax_offset
        weight = ops.dequantize_4bit.default(b, absmax, blocksize, quant_type, shape, a.dtype)
        return torch.nn.functional.linear(a, weight, bias)

    def vectorwise_quant(a: Any, threshold: float = 0.0) -> Any:
        stats = torch.empty(a.numel() // a.shape[-1], device=a.device, dtype=torch.float32)
        out = torch.empty(a.shape, device=a.device, dtype=torch.int8)
        columns = None
        if threshold > 0.0:
            outliers = a.abs() >= threshold
            outliers.any()
            columns = torch.empty(0, device=a.device, dtype=torch.int64)
            del outliers
        return out, stats, columns

    def scaled_mm(a: Any, b: Any, row_stats: Any, col_stats: Any, bias: Any = None, dtype: Any = None) -> Any:
        product = ops.int8_linear_matmul.default(a, b)
        out = torch.empty_like(product, dtype=torch.float16)
        return out.to(dtype or torch.float16)

    def mixed_scaled_mm(
        a: Any, ca: Any, cb: Any, sca: Any, scb: Any, outlier_cols: Any = None, bias: Any = None
    ) -> Any:
        return scaled_mm(ca, cb, sca, scb, bias, a.dtype), torch.empty(0, device=a.device, dtype=a.dtype)

    return {
        ops.gemm_4bit.default: gemm_4bit,
        ops.int8_vectorwise_quant.default: vectorwise_quant,
        ops.int8_scaled_mm.default: scaled_mm,
        ops.int8_mixed_scaled_mm.default: mixed_scaled_mm,
    }
