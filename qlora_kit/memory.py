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
import importlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Kineto, behind torch's profiler, would announce itself on the terminal.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# Before anything that imports bitsandbytes by itself.
from . import _bnb  # noqa: F401  # isort: skip
import peft
import torch
from torch import nn

from . import graphs, models, training
from .errors import KitError, unknown
from .experiment import Experiment, LoraSpec, ModelSpec, TrainingSpec, preset, presets
from .fused import use_cpu_attention_
from .tape import Peak, Stage, Tape, parameters_of, replay, tables_of

MIB = 1024**2

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
        evaluation: Most bytes allocated at once by an evaluation between two steps, of `evaluation_rows` rows.
        evaluation_rows: Rows a forward pass there.
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
    evaluation: int
    evaluation_rows: int
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
            "evaluation_bytes": self.evaluation,
            "evaluation_rows": self.evaluation_rows,
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
        lines.append(f"  an evaluation of {self.evaluation_rows} rows takes {self.evaluation / MIB:,.1f} MiB")
        if self.device.bytes:
            reserved = max(self.reserved, self.evaluation)
            lines.append(
                f"  the allocator will have reserved about {reserved / MIB:,.0f} MiB of "
                f"{self.device.bytes / MIB:,.0f}: it {'fits' if reserved <= self.device.bytes else 'does not fit'}"
            )
        return "\n".join(lines)

    def draw(self) -> Any:
        """Draw the parts as one stacked bar."""
        from . import plots

        return plots.memory_parts([{"label": "planned", "parts": self.parts}], self.device.bytes or None)


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
    """Say what a training step will take, without weights and without a GPU.

    The experiment's real model is built on the meta device and one step of it run there: forward, loss, backward,
    clipping, optimizer. Every storage that this would allocate is noted and, for a GPU, replayed through a model of
    CUDA's caching allocator.

    Args:
        experiment: What is to be trained.
        batch: Rows a step; by default the experiment's.
        length: Tokens a row; by default `data.max_length`.
        evaluation_length: Tokens a row in evaluation; by default `length`.
        device: A name of `DEVICES`, or None for this machine's.
        labels: Number of classes.
        padded: Whether batches have padding; without it attention needs no mask.

    Returns:
        The plan.

    Raises:
        KitError: For a device, model or shape that cannot be.
    """
    where = device if isinstance(device, Device) else find_device(device)
    spec = experiment.training
    batch = spec.batch_size if batch is None else batch
    length = experiment.data.max_length if length is None else length
    evaluation_length = length if evaluation_length is None else evaluation_length
    _check_shape(batch, length)
    _check_shape(batch, evaluation_length)
    precision = _precision(experiment, where)
    model = _skeleton(experiment, precision, labels, where)
    peak, paged, cublas = _train(experiment, model, batch, length, where, padded)
    rows = training.evaluation_rows(experiment, where.kind, batch)
    evaluation = _evaluate(experiment, model, rows, evaluation_length, where, padded)
    parts, details = _sum_up(peak)
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
        reserved=peak.reserved + cublas,
        paged=paged,
        phase=peak.phase,
        evaluation=evaluation,
        evaluation_rows=rows,
        details=details,
        parameters=models.trainable_parameters(model),
    )


@contextlib.contextmanager
def _recorded(
    experiment: Experiment, model: nn.Module, length: int, where: Device, padded: bool
) -> Iterator[tuple[_Step, Any]]:
    """Lend a step of a skeleton on a tape, and what stands for autocast in there."""
    precision = _precision(experiment, where)
    models.check_length(model, experiment.model.name, length)
    dtype = None if precision == "fp32" else models.COMPUTE_DTYPES[precision]
    stage = Stage(where.kind, where.capability, dtype, padded, experiment.model.fused)
    tape = Tape("meta", _inside(where))
    tape.on_operation = stage.forget_casts
    step = _Step(experiment, model, tape, where)
    with torch.autograd.set_multithreading_enabled(False), _autocast_flag(stage.dtype), _int8_of(where), tape, stage:
        step.hold_weights()
        yield step, stage.autocast()


def _train(
    experiment: Experiment, model: nn.Module, batch: int, length: int, where: Device, padded: bool = True
) -> tuple[Peak, int, int]:
    """Run one training step of a skeleton: its peak, the paged bytes, and what cuBLAS takes."""
    with _recorded(experiment, model, length, where, padded) as (step, autocast):
        paged = step.hold_optimizer()
        step.run(_batch(batch, length), autocast)
    return replay(step.tape.events, caching=where.kind == "cuda"), paged, step.cublas


def _evaluate(
    experiment: Experiment, model: nn.Module, rows: int, length: int, where: Device, padded: bool = True
) -> int:
    """Run one forward pass of a skeleton as the Trainer does between two steps: most bytes allocated at once."""
    with _recorded(experiment, model, length, where, padded) as (step, autocast), torch.no_grad():
        step.hold_optimizer()
        batch = _batch(rows, length)
        for tensor in batch.values():
            step.tape.hold(tensor, "batch")
        step.tape.phase = "forward"
        model.eval()
        with autocast:
            model(**batch)
        model.train()
    return sum(size for _, size in replay(step.tape.events, caching=where.kind == "cuda").alive) + step.cublas


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


def _precision(experiment: Experiment, where: Device) -> str:
    wanted = experiment.training.precision
    if where.kind == "cpu":
        return models.precision_of(experiment, torch.device("cpu"))
    if wanted == "auto":
        return where.precision
    if wanted == "bf16" and where.precision != "bf16":
        raise KitError(f"a {where.name} has no bf16 in hardware: use training.precision fp16 or auto")
    return wanted


def _skeleton(experiment: Experiment, precision: str, labels: int, where: Device) -> nn.Module:
    """Build the experiment's model on the meta device: every shape and dtype, no weight."""
    # A CPU stores in fp32 what is not quantized (`models.build_classifier`).
    stored = "fp32" if where.kind == "cpu" else precision
    # How long texts are, each plan says of its own; 2 fits any model.
    changed = experiment.override({"training.precision": stored, "model.random_weights": True, "data.max_length": 2})
    # Not another's in its place: RoBERTa and its kin have positions by it.
    config: Any = models.load_config(experiment.model)
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    names = [f"label {place}" for place in range(labels)]
    meta = torch.device("meta")
    with models.generators_kept(meta):
        model = models.build(changed, names, device=meta, pad_token_id=pad or 0)
    model = model.to("meta")
    if where.kind == "cpu" and experiment.model.fused:
        use_cpu_attention_(model)
    if experiment.training.gradient_checkpointing:
        training.enable_checkpointing(model, experiment.training.use_reentrant)
    return model


@contextlib.contextmanager
def _autocast_flag(dtype: torch.dtype | None) -> Iterator[None]:
    """Let PEFT and `fused` see autocast as switched on, as it is while the Trainer runs a step in 16 bits."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or before[1])
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@contextlib.contextmanager
def _int8_of(where: Device) -> Iterator[None]:
    """Let bitsandbytes' int8 layers take the CPU's way where the plan is for a CPU."""
    functions: Any = importlib.import_module("bitsandbytes.autograd._functions")
    level = logging.getLogger(functions.__name__).level
    logging.getLogger(functions.__name__).setLevel(logging.ERROR)
    before = functions.MatMul8bitLt
    if where.kind == "cpu":
        functions.MatMul8bitLt = functions.MatMul8bitFp
    try:
        yield
    finally:
        functions.MatMul8bitLt = before
        logging.getLogger(functions.__name__).setLevel(level)


def _batch(batch: int, length: int) -> dict[str, torch.Tensor]:
    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")

    return {
        "input_ids": integers(batch, length),
        "attention_mask": integers(batch, length),
        "labels": integers(batch),
    }


class _Step:
    """One training step as the Trainer makes it, on shapes, on a tape."""

    def __init__(self, experiment: Experiment, model: nn.Module, tape: Tape, where: Device) -> None:
        self.spec = experiment.training
        self.model, self.tape, self.where = model, tape, where
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer: Any = None
        self.gradients: graphs.Gradients | None = None
        self.graphs = graphs.obstacle(experiment.training, model, where.kind) is None
        # It keeps workspaces for each stream: graphs are captured on one of their own, beside that of all the rest, and
        # the backward pass of adapted layers on a second.
        branches = self.graphs and experiment.model.fused and experiment.lora is not None
        self.cublas = where.cublas * (2 if self.graphs else 1) + (where.cublas // 2 if branches else 0)

    def hold_weights(self) -> None:
        """Count the weights, by kind."""
        kinds = _kinds(self.model)
        for tensor in parameters_of(self.model):
            self.tape.hold(tensor, kinds.get(tensor.untyped_storage()._cdata, "base, norms and biases"))

    def hold_optimizer(self) -> int:
        """Make the optimizer's state, and return how much of it lies outside of torch's allocator."""
        self.tape.phase = "before"
        tensors, paged, self.optimizer = _optimizer_state(self.spec, self.model, self.where)
        for tensor in tensors:
            self.tape.hold(tensor, "optimizer")
        self._state = tensors
        if self.graphs:
            self.gradients = graphs.Gradients(self.trained)
            self.tape.hold(self.gradients.flat, "gradients")
            if self.gradients.twice:
                for parameter in self.trained:
                    parameter.grad = None
        elif self.spec.gradient_accumulation > 1:
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
        scale = torch.empty((), device="meta")
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
                tape.name(parameter.grad, "gradients")
        tape.phase = "optimizer"
        if self.spec.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.trained, self.spec.max_grad_norm)
        if self.optimizer is not None:
            self.optimizer.step()
        for parameter in self.trained:
            parameter.grad = None


def _kinds(model: nn.Module) -> dict[int, str]:
    """Name what each storage of a model is for."""
    from .anatomy import part_of

    heads = [] if isinstance(model, peft.PeftModel) else models.head_modules(model)
    kinds: dict[int, str] = {}
    for name, module in model.named_modules():
        for leaf, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            part = part_of(f"{name}.{leaf}", module, heads, leaf)
            if part in ("adapters", "head"):
                part = "adapters and head"
            elif part == "base, buffers":
                part = "base, norms and biases"
            for held in (tensor, *tables_of(tensor, module)):
                kinds.setdefault(held.untyped_storage()._cdata, part)
    return kinds


# bitsandbytes, optim/optimizer.py: smaller tensors keep their state in 32 bits, and outside of pages.
_MIN_8BIT, _MIN_PAGED = 4096, 100_000


def _optimizer_state(spec: Any, model: nn.Module, where: Device) -> tuple[list[torch.Tensor], int, Any]:
    """Make the state of an optimizer of a model's trained parameters, on the meta device.

    Returns:
        Its tensors, the bytes of it that lie in pages outside of torch's allocator, and the optimizer where its step
        is to be run (bitsandbytes' steps run in place and allocate nothing).
    """
    name = spec.optimizer
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
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
    embeddings = {id(module.weight) for module in training.trained_embeddings(model)}
    whole = [not eight or parameter.numel() < _MIN_8BIT or id(parameter) in embeddings for parameter in trained]
    if not all(whole):
        tensors += [empty(256), empty(256)]  # the codes' tables, shared by all
    for parameter, in_32_bits in zip(trained, whole, strict=True):
        size = parameter.numel()
        dtype = torch.float32 if in_32_bits else torch.uint8
        if paged and size >= _MIN_PAGED:
            outside += 2 * size * dtype.itemsize
        else:
            tensors += [empty(parameter.shape, dtype), empty(parameter.shape, dtype)]
        if not in_32_bits:
            tensors += [empty(-(-size // 256)), empty(-(-size // 256))]
    return tensors, outside, None


# --- how far a GPU reaches ---------------------------------------------------------------------------------------


METHODS = (
    ("full", "none", True),
    ("lora", "none", True),
    ("qlora", "int8", True),
    ("qlora", "nf4", True),
)
"""Method, scheme, double quantization: what `fits` compares."""

LLAMA = ("llama-1.1b", "llama-3b", "llama-7b", "llama-13b", "llama-30b", "llama-65b")


def with_method(experiment: Experiment, method: str, scheme: str = "none", nested: bool = True) -> Experiment:
    """Return an experiment trained another way, all else equal, and eagerly.

    Args:
        experiment: The experiment; where it trains every weight, adapters as in `LoraSpec()` are added.
        method: `full`, `lora` or `qlora`.
        scheme: How the base is stored, for `qlora`.
        nested: Whether its scales are quantized too.

    Raises:
        KitError: For a method that there is not.
    """
    if method not in ("full", "lora", "qlora"):
        raise unknown("method", method, ("full", "lora", "qlora"))
    changes: dict[str, Any] = {"quantization.scheme": scheme if method == "qlora" else "none"}
    if changes["quantization.scheme"] in ("none", "int8"):
        changes["quantization.block_size"] = 64
    changes["quantization.double_quantization"] = nested
    changes["training.graphs"] = "none"  # as `measure` has it
    if method == "full":
        changes["lora"] = None
    elif experiment.lora is None:
        changes["lora"] = dataclasses.asdict(LoraSpec())
    return experiment.override(changes)


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
    models.find_base(spec)
    return Experiment("plan", spec, training=TrainingSpec(batch_size=8, optimizer="paged_adamw_8bit"))


class Estimate:
    """Memory of a model of many layers, from plans of two shallow ones: each layer adds the same.

    Args:
        experiment: What is trained.
        device: Where.
        labels: Number of classes.
    """

    def __init__(self, experiment: Experiment, device: Device, labels: int = 77) -> None:
        self.device = device
        self.layers = models.layers_of(experiment.model)
        precision = _precision(experiment, device)
        counts = (2, 5) if self.layers > 6 else (self.layers,)
        self._plans = [experiment.override({"model.layers": count}) for count in counts]
        self._models = [_skeleton(each, precision, labels, device) for each in self._plans]
        self.positions = models.positions_of(self._models[0])
        self._known: dict[tuple[int, int], int] = {}

    @property
    def parameters(self) -> int:
        """Parameters of the model, adapters not counted."""
        counted = [models.trainable_parameters(model) for model in self._models]
        adapted = isinstance(self._models[0], peft.PeftModel)
        return self._whole([everything - adapted * trained for trained, everything in counted])

    def _whole(self, values: list[int]) -> int:
        return values[0] if len(values) == 1 else round(values[0] + (self.layers - 2) * (values[1] - values[0]) / 3)

    def bytes(self, batch: int, length: int) -> int:
        """Return what the allocator will have reserved, within about 2% of the plan."""
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
        """Return the most bytes that an evaluation of so many rows a forward pass allocates at once."""
        return self._whole(
            [
                _evaluate(each, model, rows, length, self.device)
                for each, model in zip(self._plans, self._models, strict=True)
            ]
        )

    def _reserved(self, experiment: Experiment, model: nn.Module, batch: int, length: int) -> int:
        peak, _, cublas = _train(experiment, model, batch, length, self.device)
        return peak.reserved + cublas


def fits(
    model: str | Experiment,
    *,
    device: str | Device = "T4",
    length: int = 512,
    checkpointing: Sequence[bool] = (True, False),
    methods: Sequence[tuple[str, str, bool]] = METHODS,
    most: int = 4096,
) -> list[dict[str, Any]]:
    """Say how far a GPU's memory reaches for a model.

    Args:
        model: An experiment, or what `of_model` takes.
        device: A name of `DEVICES`.
        length: Tokens a row, for the largest batch.
        checkpointing: With, without, or both.
        methods: Method, scheme and double quantization of each row.
        most: Largest batch to try.

    Returns:
        A row a method: `method`, `scheme`, `double_quantization`, `checkpointing`, `length`, `batch` (the largest at
        that length; 0 where not even one row fits), `longest` (the largest length at batch 1; 0 where none fits),
        and `planned_bytes` at one row.

    Raises:
        KitError: For the CPU, whose memory is whatever the machine has, and for a device or model that there is not.
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
    """Return the largest multiple of `grain` (and at most `most`) whose size has room, or 0."""
    low, high = 0, most // grain + 1
    if high < 2 or size(grain) > room:
        return 0
    # Sizes grow nearly evenly: aim at where a straight line through two of them says that there is no more room.
    low, far = 1, min(9, high - 1)
    slope = max((size(far * grain) - size(grain)) / max(far - 1, 1), 1)
    aim, tries = 1 + (room - size(grain)) / slope, 0
    while high - low > 1:
        if tries > 3:  # not so even after all
            aim = (low + high) / 2
        value = round(min(max(aim, low + 1), high - 1))
        left = room - size(value * grain)
        low, high = (value, high) if left >= 0 else (low, value)
        aim, tries = value + left / slope, tries + 1
    return low * grain


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
        batch: Rows a step.
        length: Tokens a row.
        checkpointing: Whether layers are recomputed.
        shapes: Models of one family, the smallest first; see `qlora_kit/shapes`.
        methods: As for `fits`.

    Returns:
        `rows`: a model and method each, with `parameters`, `planned_bytes` and `fits`. `limits`: for each method the
        number of parameters at which its memory reaches the device's (between two models on a straight line; None
        where even the largest fits). `device_bytes`.
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


def same_shape(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Return the batch and length that all rows of a comparison have.

    Memory at unequal shapes says nothing about methods: activations grow with the shape.

    Args:
        rows: Each with `batch` and `length`.

    Raises:
        KitError: When they differ, naming those that do.
    """
    found = {(row["batch"], row["length"]) for row in rows}
    if len(found) != 1:
        raise KitError(
            "these rows cannot be compared: they have "
            + " and ".join(f"batch {batch} x length {length}" for batch, length in sorted(found))
            + ". Measure all of them at one shape"
        )
    return found.pop()


# --- what operations allocate inside ----------------------------------------------------------------------------


def _inside(where: Device) -> dict[Any, Any]:
    """Return what to run on the meta device in place of some operations, to see what they allocate inside.

    The bodies are those of bitsandbytes' own kernels (backends/default/ops.py and backends/cuda/ops.py, 0.50), and of
    torch's for a CPU, where a mask of booleans is made a number for a product (a GPU reads it as one).
    """
    ops, aten = torch.ops.bitsandbytes, torch.ops.aten

    def native_dropout(a: Any, p: float, train: bool | None) -> Any:
        kept = torch.empty(a.shape, device=a.device, dtype=torch.bool)
        return a * kept.to(a.dtype), kept

    def native_dropout_backward(a: Any, kept: Any, scale: float) -> Any:
        return a * kept.to(a.dtype) * scale

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

    on_cpu = {
        aten.native_dropout.default: native_dropout,
        aten.native_dropout_backward.default: native_dropout_backward,
    }
    return {
        **(on_cpu if where.kind == "cpu" else {}),
        ops.gemm_4bit.default: gemm_4bit,
        ops.int8_vectorwise_quant.default: vectorwise_quant,
        ops.int8_scaled_mm.default: scaled_mm,
        ops.int8_mixed_scaled_mm.default: mixed_scaled_mm,
    }


# --- the measurement --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measured:
    """What training steps really took.

    Args:
        experiment: What was trained.
        batch: Rows a step.
        length: Tokens a row, padding included.
        device: Name of the device.
        precision: `fp32`, `fp16` or `bf16`.
        fits: Whether the steps ran; False where the GPU's memory did not suffice, and the sizes are then None.
        total: Most bytes allocated at once. On CUDA by the allocator's own count (`max_memory_allocated`); on the CPU
            by torch's memory profiler, which sees what operations take inside as well.
        reserved: On CUDA `max_memory_reserved`; on the CPU the same as `total`.
        parts: Bytes by name (`PARTS`) at the moment when most is allocated, counted storage by storage on the real
            tensors of one step.
        paged: Bytes of optimizer state in pages outside of torch's allocator.
        step_seconds: Median of the steps that nothing watched.
        losses: Loss of every step.
        parameters: Trained parameters, and all.
        phase: When the peak of `parts` was.
        details: Finer than the parts, as in `Plan`.
    """

    experiment: Experiment
    batch: int
    length: int
    device: str
    precision: str
    fits: bool
    total: int | None
    reserved: int | None
    parts: dict[str, int]
    paged: int
    step_seconds: float | None
    losses: list[float]
    parameters: tuple[int, int]
    phase: str = ""
    details: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)

    @property
    def counted(self) -> int:
        """Sum of the parts: what storages of tensors account for."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement as JSON holds it: bytes and seconds."""
        return {
            "fits": self.fits,
            "peak_bytes": self.total,
            "reserved_bytes": self.reserved,
            "paged_bytes": self.paged,
            "parts": dict(self.parts),
            "counted_bytes": self.counted,
            "step_seconds": self.step_seconds,
            "losses": self.losses,
            "batch": self.batch,
            "length": self.length,
            "device": self.device,
            "precision": self.precision,
            "phase": self.phase,
            "parameters": {"trainable": self.parameters[0], "all": self.parameters[1]},
        }


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
    """Train for a few steps and say what they took.

    The kit's own Trainer trains on random tokens of the given shape: one step to warm up, `steps` that are timed, and
    (for `parts`) one or two that are watched. Steps run eagerly; what CUDA graphs hold, `plan` and a run's
    `training.json` say. On CUDA, call it in a fresh process: the allocator counts per process.

    Args:
        experiment: What to train; `model.random_weights` where the weights do not matter.
        batch: Rows a step; by default the experiment's.
        length: Tokens a row; by default `data.max_length`.
        steps: Steps to time.
        labels: Number of classes.
        padded: Whether batches have padding, as in `plan`.
        parts: Whether to watch a step and count its storages.
        snapshot: File for CUDA's memory history; it opens in PyTorch's memory viewer (pytorch.org/memory_viz).

    Returns:
        What was measured. Out of memory is a result, not an error: `fits` is False.

    Raises:
        KitError: For shapes that cannot be, a snapshot without a GPU, or a current GPU that is not the first.
    """
    batch, length = batch or experiment.training.batch_size, length or experiment.data.max_length
    _check_shape(batch, length)
    device = training.trainers_device(models.default_device())
    cuda = device.type == "cuda"
    if snapshot is not None and not cuda:
        raise KitError("a snapshot is CUDA's memory history: there is no GPU here")
    watched = (2 if not cuda else 1) if parts else 0
    experiment = experiment.override(
        {
            "training.batch_size": batch,
            "training.gradient_accumulation": 1,
            "training.padding": "max_length",
            "training.max_steps": 1 + steps + watched,
            "training.logging_steps": 1,
            "training.keep_best": False,
            "training.early_stopping": None,
            "training.graphs": "none",
            "data.max_length": length,
        }
    )
    precision = models.precision_of(experiment, device)
    name = torch.cuda.get_device_name(device) if cuda else "cpu"
    common: dict[str, Any] = {
        "experiment": experiment,
        "batch": batch,
        "length": length,
        "device": name,
        "precision": precision,
    }
    gc.collect()
    if experiment.training.threads:
        torch.set_num_threads(experiment.training.threads)
    try:
        with models.quiet():
            model = models.build(experiment, [f"label {i}" for i in range(labels)], device=device, pad_token_id=0)
        if experiment.training.gradient_checkpointing:
            training.enable_checkpointing(model, experiment.training.use_reentrant)
        if cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            if snapshot is not None:
                torch.cuda.memory._record_memory_history(max_entries=200_000)
        watcher = _Watcher(experiment, model, device, precision, steps, watched, labels, padded)
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


def _rows(model: nn.Module, rows: int, batch: int, length: int, labels: int, padded: bool) -> Any:
    """Return a data set of random tokens: in each batch one row is full, the others three quarters."""
    from .data import TokenizedDataset

    inner: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, inner.config.get_text_config().vocab_size, (rows, length), generator=generator).tolist()
    short = max(length - max(length // 4, 1), 1)
    if padded:
        ids = [row if place % batch == 0 and batch > 1 else row[:short] for place, row in enumerate(ids)]
    return TokenizedDataset(ids, torch.randint(0, labels, (rows,), generator=generator).tolist())


class _Watcher:
    """Trains, times the steps in between, and counts the storages of the last."""

    def __init__(
        self,
        experiment: Experiment,
        model: nn.Module,
        device: torch.device,
        precision: str,
        steps: int,
        watched: int,
        labels: int,
        padded: bool,
    ) -> None:
        from .data import collator

        spec = experiment.training
        self.experiment, self.model, self.device = experiment, model, device
        self.steps, self.watched = steps, watched
        self.cuda = device.type == "cuda"
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.tape: Tape | None = None
        self.peak: Peak | None = None
        self.total: int | None = None
        self.reserved: int | None = None
        self.cublas = 0
        self._open = contextlib.ExitStack()
        watcher = self

        class Watched(training.KitTrainer):
            def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
                if watcher.tape is not None:
                    for tensor in inputs.values():
                        watcher.tape.hold(tensor, "batch")
                return super().training_step(model, inputs, *args, **kwargs)

            def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
                before = watcher.begin("forward")
                result = super().compute_loss(*args, **kwargs)
                watcher.end_of_forward(before)
                return result

        import tempfile

        self.folder = tempfile.TemporaryDirectory(prefix="qlora_kit-")
        arguments = training.training_arguments(
            spec,
            Path(self.folder.name),
            device=device,
            precision=precision,
            steps=spec.max_steps or 1,
            tracked=False,
            progress=False,
        )
        arguments.eval_strategy = arguments.save_strategy = "no"
        rows = _rows(model, spec.batch_size * (spec.max_steps or 1), spec.batch_size, experiment.data.max_length,
                     labels, padded)  # fmt: skip
        pad = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
        self.trainer = Watched(
            spec=spec,
            lengths=rows.lengths,
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=collator(pad, "max_length", experiment.data.max_length),
        )
        self.trainer.add_callback(_steps_of(self))

    def train(self) -> None:
        """Run all steps."""
        with models.quiet(), self.folder, self._open:
            self.trainer.train()

    def begin(self, phase: str) -> set[int]:
        if self.tape is None:
            return set()
        self.tape.phase = phase
        return {id(block) for block in self.tape.alive()}

    def end_of_forward(self, before: set[int]) -> None:
        if self.tape is not None:
            for block in self.tape.alive():
                if id(block) not in before:
                    block.kind = block.kind or "activations"
            self.tape.phase = "backward"

    def step_begins(self, step: int) -> None:
        last = self.steps + self.watched
        if self.watched and not self.cuda and step == last - 1:
            self._profile()
        elif self.watched and step == last:
            self._watch()
        self._started = time.perf_counter()

    def before_optimizer(self) -> None:
        if self.tape is None:
            return
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                self.tape.name(parameter.grad, "gradients")
        self.tape.phase = "optimizer"

    def step_ends(self, step: int) -> None:
        training.wait()
        if 1 < step <= 1 + self.steps:
            self.seconds.append(time.perf_counter() - self._started)
        if self.cuda and step == 1 + self.steps:
            self.total = torch.cuda.max_memory_allocated(self.device)
            self.reserved = torch.cuda.max_memory_reserved(self.device)
            if self.watched:
                before = torch.cuda.memory_allocated(self.device)
                with contextlib.suppress(AttributeError):
                    torch._C._cuda_clearCublasWorkspaces()
                self.cublas = before - torch.cuda.memory_allocated(self.device)
        self._open.close()
        if self.tape is not None:
            self.peak = replay(self.tape.events, caching=self.cuda)
            self.tape = None

    def _held(self) -> list[tuple[torch.Tensor, str]]:
        kinds = _kinds(self.model)
        held = [
            (tensor, kinds.get(tensor.untyped_storage()._cdata, "base, norms and biases"))
            for tensor in parameters_of(self.model)
        ]
        return held + [(tensor, "optimizer") for tensor in self._state() if not getattr(tensor, "is_paged", False)]

    def _state(self) -> list[torch.Tensor]:
        optimizer: Any = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        found: dict[int, torch.Tensor] = {}
        for state in optimizer.state.values():
            for value in state.values():
                if not isinstance(value, torch.Tensor):
                    continue
                # Paged tensors are CPU tensors on memory that CUDA manages.
                if value.device.type == self.device.type or getattr(value, "is_paged", False):
                    found.setdefault(value.untyped_storage()._cdata, value)
        return list(found.values())

    def _watch(self) -> None:
        self.tape = Tape(self.device.type)
        for tensor, kind in self._held():
            self.tape.hold(tensor, kind)
        # On one thread, so that the tape sees the backward pass.
        self._open.enter_context(torch.autograd.set_multithreading_enabled(False))
        self._open.enter_context(self.tape)

    def _profile(self) -> None:
        held = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor, _ in self._held()}
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)

        def read() -> None:
            now = most = 0
            for _, change in sorted(_allocations(profiler)):
                now += change
                most = max(most, now)
            self.total = self.reserved = sum(held.values()) + most

        self._open.callback(read)
        self._open.enter_context(profiler)

    def result(self, common: dict[str, Any]) -> Measured:
        """Put together what was seen."""
        parts, details = _sum_up(self.peak) if self.peak is not None else ({}, {})
        if self.cublas:
            parts["cuBLAS"] = self.cublas
        ordered = sorted(self.seconds)
        paged = sum(tensor.untyped_storage().nbytes() for tensor in self._state() if getattr(tensor, "is_paged", False))
        losses = [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]
        return Measured(
            **common,
            fits=True,
            total=self.total,
            reserved=self.reserved,
            parts={name: parts[name] for name in PARTS if parts.get(name)},
            paged=paged,
            step_seconds=ordered[len(ordered) // 2] if ordered else None,
            losses=losses,
            parameters=models.trainable_parameters(self.model),
            phase=self.peak.phase if self.peak is not None else "",
            details=details,
        )


def _steps_of(watcher: _Watcher) -> Any:
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watcher.step_begins(state.global_step)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watcher.before_optimizer()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watcher.step_ends(state.global_step)

    return Steps()


def _allocations(profiler: Any) -> Iterator[tuple[int, int]]:
    """Yield when the CPU's allocator took (or, negative, gave back) how many bytes."""
    from torch._C._profiler import _EventType

    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        kind, extra = event.typed
        if kind == _EventType.Allocation and extra.device.type == "cpu":
            yield event.start_time_ns, extra.alloc_size


# --- a comparison -----------------------------------------------------------------------------------------------


def compare(
    experiment: Experiment,
    ways: Mapping[str, tuple[str, str, Mapping[str, Any]]],
    *,
    batch: int | None = None,
    length: int | None = None,
    steps: int = 3,
) -> Iterator[dict[str, Any]]:
    """Plan, then measure, the same model trained in several ways, at one shape of a batch.

    Args:
        experiment: The model, and what the ways do not change.
        ways: By label the method and the scheme, as `with_method` takes them, and changes on top of these.
        batch: Rows a step; by default the experiment's.
        length: Tokens a row, padding included; by default `data.max_length`.
        steps: Steps to time, for each way.

    Yields:
        A row a way, as soon as it is measured, for tables, `plots.memory_parts` and `plots.memory_against_time`:
        `label`, `method`, `scheme`, `changes`, `batch`, `length`; in bytes `parts` and `planned` of the plan, and
        `measured`, `counted`, `measured_parts`, `reserved` and `paged` of the measurement; `step_seconds`. Where the
        GPU's memory did not suffice, `measured`, `reserved` and `step_seconds` are None.
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
