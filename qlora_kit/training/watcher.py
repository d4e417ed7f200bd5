"""Watch real training steps: time them, measure their peak memory, count the tensor storages of one."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..config.experiment import Experiment
from ..data.batches import TokenizedDataset, collator
from ..memory.allocator import Peak, replay
from ..memory.plan import PARTS, sum_up
from ..memory.step import kinds_of_memory
from ..memory.tape import Tape, parameters_of
from ..models.adapters import trainable_parameters
from ..system.devices import quiet, wait
from ..system.safe_peft import peft
from .arguments import training_arguments
from .prepare import PreparedModel
from .trainer import KitTrainer

# Keep Kineto, the library behind torch's profiler, from printing to the terminal.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@dataclasses.dataclass(frozen=True)
class Measured:
    """Measured memory and time of training steps.

    Args:
        experiment: What was trained.
        batch: Rows per step.
        length: Tokens per row, padding included.
        device: Name of the device.
        precision: `fp32`, `fp16` or `bf16`.
        fits: Whether the steps ran. False if the GPU had too little memory; the sizes are then None.
        total: Peak of allocated bytes. On CUDA by the allocator's own count (`max_memory_allocated`); on the CPU by
            torch's memory profiler, which also sees what operations allocate internally.
        reserved: On CUDA `max_memory_reserved`; on the CPU the same as `total`.
        parts: Bytes by name (`PARTS`) at the peak, counted storage by storage on the real tensors of one step.
        paged: Bytes of paged optimizer state, outside torch's allocator.
        step_seconds: Median over the steps that were not watched.
        losses: Loss of every step.
        parameters: Number of trained parameters, and of all.
        phase: Phase of the step in which `parts` peaked.
        details: The parts in finer detail, as in `Plan`.
        step_seconds_each: Seconds of each step that was not watched.
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
    step_seconds_each: list[float] = dataclasses.field(default_factory=list)

    @property
    def counted(self) -> int:
        """Sum of the parts: the bytes found in tensor storages."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement as a dict for JSON, in bytes and seconds."""
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


def random_rows(experiment: Experiment, model: nn.Module, labels: int, padded: bool) -> TokenizedDataset:
    """Return rows of random tokens for every step of an experiment.

    Args:
        experiment: Gives the number of rows (`training.max_steps` batches) and their length (`data.max_length` tokens).
        model: Tokens are drawn from its vocabulary.
        labels: Number of classes.
        padded: If True, one row of each batch is full, and the others have three quarters of its length.
    """
    batch, length = experiment.training.batch_size, experiment.data.max_length
    rows = batch * (experiment.training.max_steps or 1)
    inner: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, inner.config.get_text_config().vocab_size, (rows, length), generator=generator).tolist()
    short = max(length - max(length // 4, 1), 1)
    if padded:
        ids = [row if place % batch == 0 and batch > 1 else row[:short] for place, row in enumerate(ids)]
    return TokenizedDataset(ids, torch.randint(0, labels, (rows,), generator=generator).tolist())


def _steps_of(watcher: _Watcher) -> TrainerCallback:
    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watcher.step_begins(state.global_step)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watcher.before_optimizer()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watcher.step_ends(state.global_step)

    return Steps()


def _allocations(profiler: Any) -> Iterator[tuple[int, int]]:
    """Yield the time (ns) and the bytes of each CPU allocation; freed bytes are negative."""
    from torch._C._profiler import _EventType

    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        kind, extra = event.typed
        if kind == _EventType.Allocation and extra.device.type == "cpu":
            yield event.start_time_ns, extra.alloc_size


class _Watcher:
    """Run the steps: time the middle ones, and count the tensor storages of the last."""

    def __init__(
        self, experiment: Experiment, prepared: PreparedModel, rows: TokenizedDataset, steps: int, watched: int
    ) -> None:
        spec, model = experiment.training, prepared.model
        self.model, self.device = model, prepared.device
        self.steps, self.watched = steps, watched
        self.cuda = self.device.type == "cuda"
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.tape: Tape | None = None
        self.peak: Peak | None = None
        self.total: int | None = None
        self.reserved: int | None = None
        self.cublas = 0
        self._open = contextlib.ExitStack()
        watcher = self

        class Watched(KitTrainer):
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

        self.folder = tempfile.TemporaryDirectory(prefix="qlora_kit-")
        arguments = training_arguments(
            spec,
            Path(self.folder.name),
            device=self.device,
            precision=prepared.precision,
            steps=spec.max_steps or 1,
            progress=False,
        )
        arguments.eval_strategy = arguments.save_strategy = "no"
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
        with quiet(), self.folder, self._open:
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
        wait()
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
        kinds = kinds_of_memory(self.model)
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
                # Paged tensors are CPU tensors in memory that CUDA manages.
                if value.device.type == self.device.type or getattr(value, "is_paged", False):
                    found.setdefault(value.untyped_storage()._cdata, value)
        return list(found.values())

    def _watch(self) -> None:
        self.tape = Tape(self.device.type)
        for tensor, kind in self._held():
            self.tape.hold(tensor, kind)
        # Keep the backward pass on this thread, so that the tape sees it.
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
        """Return the measurement."""
        parts, details = sum_up(self.peak) if self.peak is not None else ({}, {})
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
            parameters=trainable_parameters(self.model),
            phase=self.peak.phase if self.peak is not None else "",
            details=details,
            step_seconds_each=list(self.seconds),
        )
