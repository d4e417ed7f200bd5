"""Steps as replayed CUDA graphs: the host says once what the GPU is to do, then only that it do it again.

A training step of a small model is some thousand short kernels. Launching them one by one from Python takes several
times as long as running them, and the GPU waits. A CUDA graph is the recorded list of launches of one step; replaying
it is a single launch (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). It has fixed shapes and
fixed addresses, so there is one for each shape of batch, its inputs are copied into tensors that stay where they are,
and so are gradients. Loss scale and random numbers live on the GPU and differ from replay to replay.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

# Before anything that imports bitsandbytes by itself.
from ._bnb import bnb  # isort: skip
import torch
from torch.utils._pytree import tree_map_only

from .flat import side_by_side

if TYPE_CHECKING:
    from .experiment import TrainingSpec

logger = logging.getLogger(__name__)

Inputs = Mapping[str, torch.Tensor]
Work = Callable[[dict[str, torch.Tensor]], Any]


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, torch.Tensor]
    outputs: Any


class Graphs:
    """CUDA graphs of pieces of work that are done again and again, one for each shape of their inputs.

    All share one pool of memory, in which one graph's temporary tensors take the place of another's: they are never
    replayed at the same time. The pool is as large as the largest needs if that is captured first.

    Args:
        device: The CUDA device.

    Attributes:
        seconds: How long `prepare` took.
        bytes: How much more the allocator holds after it: the pool.
        device_bytes: How much less memory the device has free after it: the pool, what the driver keeps of each graph,
            and kernels that were loaded for the first time.
        problem: Why nothing is captured any more, or None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self.bytes = self.device_bytes = 0
        self.problem: str | None = None
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        self._seen: dict[tuple[Any, ...], int] = {}  # and how many checkpointed layers the work has
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._stream = _capturing_stream(device)
        weakref.finalize(self, _idle.setdefault(device, []).append, self._stream)

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, kind: str, work: Work, inputs: Inputs) -> Any:
        """Do some work, as a graph from the second time on that inputs of such shapes are given.

        Args:
            kind: Name of the work: what is done must depend on it and on the inputs' shapes alone.
            work: Takes the inputs and returns tensors (nested as you like), all on the device; without a
                host synchronisation.
            inputs: Tensors, on the device or not.

        Returns:
            What `work` returns, in tensors of its own.
        """
        key = _key(kind, inputs)
        known = self._captured.get(key)
        if known is None and key in self._seen and self.problem is None:
            self._release()  # what the first pass took
            self._capture(key, work, inputs, self._seen[key])
            known = self._captured.get(key)
        if known is None:
            with _checkpoints_counted() as count:
                result = work({name: value.to(self.device, non_blocking=True) for name, value in inputs.items()})
                self._seen[key] = count()
            return result
        for name, held in known.inputs.items():
            held.copy_(inputs[name], non_blocking=True)
        known.graph.replay()
        # The next replay of any graph writes over these.
        return tree_map_only(torch.Tensor, torch.Tensor.clone, known.outputs)

    def _record(self, graph: torch.cuda.CUDAGraph, work: Callable[[], Any]) -> Any:
        """Capture a piece of work on the current stream; what fails leaves the device as it was."""
        # Other threads (pinning memory, logging) may go on as they like.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            outputs = work()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # of the capture that the error made invalid
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
        # `capture_end` stops at the first error that it finds, before it has told the allocator and the generator that
        # nothing is captured any more (torch 2.13, ATen/cuda/CUDAGraph.cpp); each of them would refuse to work.
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(_index(self.device), self._pool)
        fresh = torch.Generator(self.device)
        _default_generator(self.device).graphsafe_set_state(fresh.graphsafe_get_state())

    def prepare(self, kind: str, work: Work, shapes: Iterable[Inputs]) -> None:
        """Capture graphs ahead of their first use: hand over the largest inputs first.

        Args:
            kind: As for `run`.
            work: As for `run`. It is done once for each of the shapes, with the random state as it was
                afterwards; what else it changes (gradients) is the caller's to undo.
            shapes: Inputs of each shape, on the device.
        """
        torch.cuda.empty_cache()
        began, free = time.perf_counter(), torch.cuda.mem_get_info(self.device)[0]
        held = torch.cuda.memory_reserved(self.device)
        todo = {key: inputs for inputs in shapes if (key := _key(kind, inputs)) not in self._captured}
        # All of them before the first is captured, so that what warming up takes never stands beside the pool.
        layers = {key: self._warm_up(work, inputs) for key, inputs in todo.items() if self.problem is None}
        self._release()
        for key, inputs in todo.items():
            if self.problem is None:
                self._capture(key, work, inputs, layers[key])
        self._release()
        self.bytes += torch.cuda.memory_reserved(self.device) - held
        self.device_bytes += free - torch.cuda.mem_get_info(self.device)[0]
        self.seconds += time.perf_counter() - began

    def _release(self) -> None:
        """Give back what the allocator keeps outside of the pool."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Work on the stream of captures; an error becomes `problem`, and the random state stays as it was."""
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

    def _warm_up(self, work: Work, inputs: Inputs) -> int:
        """Do the work once, which loads kernels and libraries' workspaces, as a capture must not.

        Returns:
            How many checkpointed layers it has.
        """
        layers = 0
        with self._aside(), _checkpoints_counted() as count:
            work({name: value.to(self.device, copy=True) for name, value in inputs.items()})
            layers = count()
        return layers

    def _capture(self, key: tuple[Any, ...], work: Work, inputs: Inputs, layers: int) -> None:
        held = {name: value.to(self.device, copy=True) for name, value in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        self._graphs.append(graph)  # also one that fails: going, it would take the workspaces of the others with it
        collecting = gc.isenabled()
        with self._aside():
            # A collection in the middle could free another graph, which no capture survives.
            gc.disable()
            try:
                with _random_states(graph, self.device, layers):
                    outputs = self._record(graph, lambda: work(dict(held)))
            finally:
                if collecting:
                    gc.enable()
            self._captured[key] = _Captured(graph, held, outputs)


# Weights whose gradients may exist twice for a moment: 64 MiB.
MOST_HELD_TWICE = 2**24


class Gradients:
    """Gradients that stay where they are, side by side in one tensor, so that they are cleared and clipped as one.

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
        """Add the gradients of the backward pass inside in few launches, not one for each weight."""
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
            The norm before.
        """
        norm = torch.linalg.vector_norm(self.flat)
        self.flat.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm


# Streams that captures may take, and the one that branches of each take.
_idle: dict[torch.device, list[torch.cuda.Stream]] = {}
_second: dict[torch.cuda.Stream, torch.cuda.Stream] = {}


def _capturing_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream that no other `Graphs` captures on.

    A graph that goes takes with it the workspaces that cuBLAS has for the stream it was captured on
    (torch 2.13, `CUDAGraph::reset`), and what else was captured there would write where they were. Streams are taken
    again all the same: cuBLAS keeps up to 32 MiB for each stream and thread that it has ever seen.
    """
    if idle := _idle.get(device):
        return idle.pop()
    first = torch.cuda.Stream(device)
    _second[first] = _branching_stream(device)
    return first


@functools.cache
def _branching_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one for all: nothing begins a capture there


class Branch:
    """What is done inside runs beside what comes after it, up to `join`: a branch of the graph that is captured.

    A step's kernels are short and leave much of a GPU idle; two that do not need each other take hardly longer than
    one. Outside of `Graphs` everything is done in its turn.

    Memory is taken and given back on the stream that it was taken on. As each branch begins after all that was launched
    before it, and is joined before the work that needs its results, none of them has to be kept longer than that work.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self._done: torch.cuda.Event | None = None
        if device.type == "cuda" and _second:
            first = torch.cuda.current_stream(device)
            if first in _second:
                self._streams = first, _second[first]

    def __enter__(self) -> Branch:
        if self._streams is not None:
            first, second = self._streams
            second.wait_stream(first)
            torch.cuda.set_stream(second)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._streams is not None:
            first, second = self._streams
            torch.cuda.set_stream(first)
            if kind is None:
                self._done = second.record_event()

    def join(self) -> None:
        """Let what is launched from now on wait for the branch."""
        if self._streams is not None and self._done is not None:
            self._streams[0].wait_event(self._done)


def _key(kind: str, inputs: Inputs) -> tuple[Any, ...]:
    return (kind, *((name, value.shape, value.dtype) for name, value in inputs.items()))


def obstacle(spec: TrainingSpec, model: torch.nn.Module, device: str) -> str | None:
    """Return why a model's training steps are not to be captured, as far as is known beforehand; None if they are.

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
    """Return whether a forward pass waits for a value from the device, which no graph can."""
    return any(isinstance(module, bnb.nn.Linear8bitLt) for module in model.modules())


def filled(inputs: Inputs, rows: int) -> dict[str, torch.Tensor]:
    """Fill a batch that is not full with rows that no loss counts, so that its graph is that of full ones.

    Args:
        inputs: `input_ids` and `attention_mask` `[rows, width]`, and `labels` `[rows]` where there are any.
        rows: Rows that are wanted.

    Returns:
        A batch of at least so many rows. Those that are new have one token, and the label -100: what cross-entropy
        leaves out of its sum and of its count.
    """
    missing = rows - len(inputs["input_ids"])
    if missing <= 0:
        return dict(inputs)
    made = {name: torch.cat([value, value.new_zeros(missing, *value.shape[1:])]) for name, value in inputs.items()}
    made["attention_mask"][-missing:, 0] = 1
    if "labels" in made:
        made["labels"][-missing:] = -100
    return made


def attending(device: torch.device) -> Any:
    """Return a context that leaves cuDNN's attention out, and on other devices none.

    cuDNN makes a plan for each shape, which takes longer than capturing the whole step; at the lengths of short texts
    torch's own kernels are as fast.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    kernels = torch.nn.attention.SDPBackend
    return torch.nn.attention.sdpa_kernel([kernels.FLASH_ATTENTION, kernels.EFFICIENT_ATTENTION, kernels.MATH])


_of_models: weakref.WeakKeyDictionary[torch.nn.Module, Graphs] = weakref.WeakKeyDictionary()


def of(model: torch.nn.Module, device: torch.device) -> Graphs:
    """Return the graphs that belong to a model and go when it does.

    Args:
        model: Whose forward passes are captured. Its weights may change in place, not be replaced.
        device: The CUDA device it is on.
    """
    if model not in _of_models:
        _of_models[model] = Graphs(device)
    return _of_models[model]


def forget(model: torch.nn.Module) -> None:
    """Let go of a model's graphs and of the memory that they hold.

    Args:
        model: Any.
    """
    _of_models.pop(model, None)


# --- recomputed dropout -----------------------------------------------------------------------------------------
#
# Gradient checkpointing computes a layer twice and must drop the same both times. Eagerly it puts the generator's
# state back. In a graph the generator's state is a place in memory that each replay moves on, so every layer gets two
# generators of one seed: one for its forward pass and one for the second, which move on alike.


class _Randomness:
    """The pairs of generators of the graph that is being captured, and how many layers asked for one."""

    def __init__(self) -> None:
        self.pairs: Iterator[tuple[torch.Generator, torch.Generator]] | None = None
        self.asked = 0


_randomness = _Randomness()


@contextlib.contextmanager
def _checkpoints_counted() -> Iterator[Callable[[], int]]:
    before = _randomness.asked
    yield lambda: _randomness.asked - before


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _default_generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[_index(device)]


@contextlib.contextmanager
def _random_states(graph: torch.cuda.CUDAGraph, device: torch.device, layers: int) -> Iterator[None]:
    generator = _default_generator(device)
    pairs = []
    for layer in range(layers):
        first = generator.clone_state()
        first.manual_seed((generator.initial_seed() + (generator.get_offset() << 16) + layer + 1) % 2**63)
        pairs.append((first, first.clone_state()))
        for state in pairs[-1]:
            graph.register_generator_state(state)
    _randomness.pairs = iter(pairs)
    try:
        yield
    finally:
        _randomness.pairs = None


@contextlib.contextmanager
def _drawing_from(generator: torch.Generator) -> Iterator[None]:
    default = _default_generator(generator.device)
    own = default.graphsafe_get_state()
    default.graphsafe_set_state(generator)
    try:
        yield
    finally:
        default.graphsafe_set_state(own)


def checkpoint_contexts() -> tuple[Any, Any]:
    """Return the two contexts of a checkpointed layer, in which dropout drops the same, captured or not.

    It is the `context_fn` of `torch.utils.checkpoint.checkpoint(use_reentrant=False, preserve_rng_state=False)`.
    """
    _randomness.asked += 1
    if torch.cuda.is_current_stream_capturing():
        if _randomness.pairs is None:
            raise RuntimeError("a checkpointed layer is captured outside of qlora_kit.graphs")
        first, second = next(_randomness.pairs)
        return _drawing_from(first), _drawing_from(second)
    state: list[torch.Tensor] = []
    return _noting(state), _again(state)


@contextlib.contextmanager
def _noting(state: list[torch.Tensor]) -> Iterator[None]:
    state.append(torch.cuda.get_rng_state())
    yield


@contextlib.contextmanager
def _again(state: list[torch.Tensor]) -> Iterator[None]:
    now = torch.cuda.get_rng_state()
    torch.cuda.set_rng_state(state[0])
    try:
        yield
    finally:
        torch.cuda.set_rng_state(now)
