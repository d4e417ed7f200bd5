"""Capture training steps and forward passes as CUDA graphs, and replay them.

A training step of a small model is some thousand short kernels. Launching them one by one from Python takes several
times as long as running them, and the GPU waits. A CUDA graph is the recorded list of launches of one step; replaying
it is a single launch (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). A graph has fixed shapes and
fixed addresses. So there is one for each shape of batch, inputs are copied into tensors that stay where they are, and
gradients stay where they are. Loss scale and random numbers live on the GPU and differ from replay to replay.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from ..quantization.backend import backend_of_layer
from .host_copies import Copies, HostCopies
from .randomness import _checkpoints_counted, _default_generator, _index, _random_states
from .side_by_side import side_by_side
from .streams import _capturing_stream, _idle

if TYPE_CHECKING:
    from ..config.sections import TrainingSpec

logger = logging.getLogger(__name__)

aten = torch.ops.aten

Inputs = Mapping[str, torch.Tensor]
Work = Callable[[dict[str, torch.Tensor]], Any]


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, torch.Tensor]
    copies: Copies  # the graph reads them
    outputs: Any


class _FirstPass(NamedTuple):
    layers: int  # how many checkpointed layers ran
    copies: Copies


class Graphs:
    """CUDA graphs of work that is repeated, one for each shape of its inputs.

    All graphs share one memory pool. They are never replayed at the same time, so their temporary tensors use the same
    memory. If the largest graph is captured first, the pool is only as large as that graph needs.

    Args:
        device: The CUDA device.

    Attributes:
        seconds: How long `prepare` took.
        bytes: How much more memory the allocator holds after `prepare`: the pool.
        device_bytes: How much less memory is free on the device after `prepare`: the pool, what the driver keeps for
            each graph, and kernels that were loaded for the first time.
        problem: Why nothing is captured any more, or None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self.bytes = self.device_bytes = 0
        self.problem: str | None = None
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        self._seen: dict[tuple[Any, ...], _FirstPass] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._stream = _capturing_stream(device)
        weakref.finalize(self, _idle.setdefault(device, []).append, self._stream)
        _living.add(self)

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, kind: str, work: Work, inputs: Inputs) -> Any:
        """Run some work: eagerly the first time that its inputs have these shapes, as a graph after that.

        Args:
            kind: Name of the work. What is done must depend only on this name and on the inputs' shapes.
            work: Takes the inputs and returns tensors, nested in any way, all on the device. It must not
                synchronise with the host.
            inputs: Tensors, on the device or not.

        Returns:
            What `work` returns, in tensors that no replay overwrites.
        """
        key = _key(kind, inputs)
        known = self._captured.get(key)
        if known is None and key in self._seen and self.problem is None:
            self._release()  # memory that the first pass took
            self._capture(key, work, inputs, self._seen[key])
            known = self._captured.get(key)
        if known is None:
            given = {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}
            with _checkpoints_counted() as count, HostCopies(self.device) as copies:
                result = work(given)
            self._seen[key] = _FirstPass(count(), copies.noted)
            return result
        for name, held in known.inputs.items():
            held.copy_(inputs[name], non_blocking=True)
        known.graph.replay()
        # Copies, because the next replay of any graph overwrites these.
        return tree_map_only(torch.Tensor, torch.Tensor.clone, known.outputs)

    def _record(self, graph: torch.cuda.CUDAGraph, work: Callable[[], Any]) -> Any:
        """Capture some work on the current stream; after a failure the device works as before."""
        # Other threads (pinning memory, logging) may go on calling CUDA.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            outputs = work()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the error has made the capture invalid
                graph.capture_end()
            self._leave_capture()
            raise
        try:
            graph.capture_end()
        except BaseException:
            self._leave_capture()
            raise
        return outputs

    def _leave_capture(self) -> None:
        # `capture_end` stops at its first error, before it tells the allocator and the generator that the capture is
        # over (torch 2.13, ATen/cuda/CUDAGraph.cpp). Both would then refuse to work.
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(_index(self.device), self._pool)
        fresh = torch.Generator(self.device)
        _default_generator(self.device).graphsafe_set_state(fresh.graphsafe_get_state())

    def prepare(self, kind: str, work: Work, shapes: Iterable[Inputs]) -> None:
        """Capture graphs before their first use. Give the largest inputs first.

        Args:
            kind: As for `run`.
            work: As for `run`. It runs once for each shape. The random state is restored afterwards; whatever
                else the work changes (gradients), the caller must undo.
            shapes: Inputs of each shape, on the device.
        """
        torch.cuda.empty_cache()
        began, free = time.perf_counter(), torch.cuda.mem_get_info(self.device)[0]
        held = torch.cuda.memory_reserved(self.device)
        todo = {key: inputs for inputs in shapes if (key := _key(kind, inputs)) not in self._captured}
        # Warm up all shapes before the first capture, so that memory for warming up is never held beside the pool.
        # Release memory after each shape, so that it is never held beside what another shape needs.
        first = {}
        for key, inputs in todo.items():
            if self.problem is None:
                first[key] = self._warm_up(work, inputs)
                self._release()
        for key, inputs in todo.items():
            if self.problem is None:
                self._capture(key, work, inputs, first[key])
        self._release()
        self.bytes += torch.cuda.memory_reserved(self.device) - held
        self.device_bytes += free - torch.cuda.mem_get_info(self.device)[0]
        self.seconds += time.perf_counter() - began

    def _release(self) -> None:
        """Release the memory that the allocator caches outside the pool."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Run the block on the capture stream; store an error in `problem`, and restore the random state."""
        random_state = torch.cuda.get_rng_state(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                yield
        except Exception as error:
            self.problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            logger.warning("This step cannot be captured as a CUDA graph (%s); steps run eagerly.", self.problem)
        finally:
            torch.cuda.set_rng_state(random_state, self.device)
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def _warm_up(self, work: Work, inputs: Inputs) -> _FirstPass:
        """Run the work once, to load kernels and libraries' workspaces: a capture must not load them."""
        first = _FirstPass(0, [])
        with self._aside(), _checkpoints_counted() as count:
            given = {name: value.to(self.device, copy=True) for name, value in inputs.items()}
            with HostCopies(self.device) as copies:
                work(given)
            first = _FirstPass(count(), copies.noted)
        return first

    def _capture(self, key: tuple[Any, ...], work: Work, inputs: Inputs, first: _FirstPass) -> None:
        held = {name: value.to(self.device, copy=True) for name, value in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        self._graphs.append(graph)  # failed ones too: deleting one would free the others' workspaces
        collecting = gc.isenabled()
        with self._aside():
            # Garbage collection could free another graph, and then this capture would fail.
            gc.disable()
            try:
                taken = HostCopies(self.device, first.copies) if first.copies else contextlib.nullcontext()
                with _random_states(graph, self.device, first.layers), taken:
                    outputs = self._record(graph, lambda: work(dict(held)))
            finally:
                if collecting:
                    gc.enable()
            self._captured[key] = _Captured(graph, held, first.copies, outputs)


# Up to this many trained weights, gradients may exist twice for a moment: 64 MiB.
MOST_HELD_TWICE = 2**24


class Gradients:
    """Gradients at fixed addresses in one flat tensor, so that all are cleared and clipped at once.

    Args:
        trained: The trained weights, all of one dtype and on one device; their `grad` is set.
    """

    def __init__(self, trained: Sequence[torch.nn.Parameter]) -> None:
        self.trained = list(trained)
        self.twice = sum(weight.numel() for weight in self.trained) <= MOST_HELD_TWICE
        self.flat, self.parts = side_by_side(self.trained, self.trained[0].dtype)
        self.flat.zero_()
        for weight, part in zip(self.trained, self.parts, strict=True):
            weight.grad = part

    @contextlib.contextmanager
    def summed(self) -> Iterator[None]:
        """Accumulate the gradients of a backward pass in the block, in few launches, not in one for each weight."""
        if not self.twice:
            yield
            return
        for weight in self.trained:
            weight.grad = None
        try:
            yield
            fresh = [(part, w.grad) for part, w in zip(self.parts, self.trained, strict=True) if w.grad is not None]
            torch._foreach_add_([part for part, _ in fresh], [gradient for _, gradient in fresh])
        finally:
            for weight, part in zip(self.trained, self.parts, strict=True):
                weight.grad = part

    def clip_(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients to a norm of at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does.

        Returns:
            The norm before clipping.
        """
        norm = torch.linalg.vector_norm(self.flat)
        self.flat.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm


_living: weakref.WeakSet[Graphs] = weakref.WeakSet()


def clear_workspaces() -> None:
    """Free the workspaces that cuBLAS keeps for every stream it has seen, unless there are graphs that use them.

    torch 2.11 keeps a stream's workspaces after its graphs are deleted: 64 MiB on Hopper for each of the `Graphs` that
    a process ever had at the same time.
    """
    if not _living:
        torch._C._cuda_clearCublasWorkspaces()


def _key(kind: str, inputs: Inputs) -> tuple[Any, ...]:
    return (kind, *((name, value.shape, value.dtype) for name, value in inputs.items()))


def obstacle(spec: TrainingSpec, model: torch.nn.Module, device: str) -> str | None:
    """Return why a model's training steps will not be captured, or None if nothing known beforehand prevents it.

    Args:
        spec: How it is trained.
        model: On any device, the meta device included.
        device: What it is trained on: `cuda` or `cpu`.
    """
    if spec.graphs == "none":
        return "training.graphs is none"
    if device != "cuda":
        return "CUDA graphs need a CUDA device"
    if asks_the_host(model):
        return "bitsandbytes' 8-bit layers look for outliers on the host"
    if spec.gradient_checkpointing and spec.use_reentrant:
        return "checkpointing with use_reentrant puts random states back from the host"
    if len({(weight.dtype, weight.device) for weight in model.parameters() if weight.requires_grad}) != 1:
        return "the trained weights are of several dtypes or on several devices"
    return None


def asks_the_host(model: torch.nn.Module) -> bool:
    """Return whether a forward pass waits for a value from the device, which cannot be captured in a graph."""
    return any(
        backend.waits_for_the_device(module)
        for module in model.modules()
        if (backend := backend_of_layer(module)) is not None
    )


def pad_rows(inputs: Inputs, rows: int) -> dict[str, torch.Tensor]:
    """Pad a batch with rows that the loss ignores, so that it uses the graph of full batches.

    Args:
        inputs: `input_ids` and `attention_mask` `[rows, width]`, and `labels` `[rows]` where there are any.
        rows: Rows that are wanted.

    Returns:
        A batch of at least that many rows. Each new row has one token and the label -100, which cross-entropy leaves
        out of its sum and of its count.
    """
    missing = rows - len(inputs["input_ids"])
    if missing <= 0:
        return dict(inputs)
    made = {name: torch.cat([value, value.new_zeros(missing, *value.shape[1:])]) for name, value in inputs.items()}
    made["attention_mask"][-missing:, 0] = 1
    if "labels" in made:
        made["labels"][-missing:] = -100
    return made


@contextlib.contextmanager
def without_cudnn_attention(device: torch.device) -> Iterator[None]:
    """Switch cuDNN's attention off for a block; other attention kernels stay on or off as they are.

    cuDNN makes a plan for each shape, which takes longer than capturing the whole step. For short texts torch's own
    kernels are as fast.
    """
    before = device.type == "cuda" and torch.backends.cuda.cudnn_sdp_enabled()
    if before:
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        if before:
            torch.backends.cuda.enable_cudnn_sdp(True)


_of_models: weakref.WeakKeyDictionary[torch.nn.Module, Graphs] = weakref.WeakKeyDictionary()


def graphs_of_model(model: torch.nn.Module, device: torch.device) -> Graphs:
    """Return a model's graphs, which are deleted with the model.

    Args:
        model: The model whose forward passes are captured. Its weights may change in place, but not be replaced.
        device: The CUDA device that the model is on.
    """
    if model not in _of_models:
        _of_models[model] = Graphs(device)
    return _of_models[model]


def forget(model: torch.nn.Module) -> None:
    """Delete a model's graphs and free their memory.

    Args:
        model: Any model, with graphs or without.
    """
    _of_models.pop(model, None)
