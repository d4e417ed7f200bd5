"""Random numbers of a captured step: a recomputed layer's dropout drops the same values again, as in an eager step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

# --- recomputed dropout -----------------------------------------------------------------------------------------
#
# Gradient checkpointing computes a layer twice, and dropout must drop the same values both times. An eager step
# restores the generator's state. In a graph the generator's state is memory that each replay advances. So every layer
# gets two generators of one seed, one for its forward pass and one for its recomputation, which advance alike.


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
    """Return the two contexts of a checkpointed layer; dropout drops the same values in both, captured or not.

    It is the `context_fn` of `torch.utils.checkpoint.checkpoint(use_reentrant=False, preserve_rng_state=False)`.
    """
    _randomness.asked += 1
    if torch.cuda.is_current_stream_capturing():
        if _randomness.pairs is None:
            raise RuntimeError("a checkpointed layer is captured outside of kernels.cuda_graphs")
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
