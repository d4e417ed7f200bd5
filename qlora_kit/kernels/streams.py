"""CUDA streams: one to capture on, and one for kernels that run in parallel."""

from __future__ import annotations

import functools

import torch

# Streams that are free for captures, and for each stream the second one that its branches run on.
_idle: dict[torch.device, list[torch.cuda.Stream]] = {}
_second: dict[torch.cuda.Stream, torch.cuda.Stream] = {}


def _capturing_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream that no other `Graphs` captures on.

    Deleting a graph also frees cuBLAS' workspaces for the stream that the graph was captured on (torch 2.13,
    `CUDAGraph::reset`). Other graphs captured on that stream would then write into freed memory. Idle streams are
    reused, because cuBLAS keeps up to 32 MiB for each stream and thread that it has ever seen.
    """
    if idle := _idle.get(device):
        return idle.pop()
    first = torch.cuda.Stream(device)
    _second[first] = _branching_stream(device)
    return first


@functools.cache
def _branching_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one for all: no capture begins on it


class Branch:
    """Run the enclosed kernels on a second stream until `join()`: a branch of the graph that is captured.

    A step's kernels are short and leave much of a GPU idle, so two independent kernels take hardly longer than one.
    Outside of `Graphs` everything runs on one stream, in order.

    Memory is allocated and freed on one and the same stream. Each branch begins after all earlier launches, and is
    joined before the work that needs its results. So no result has to be kept longer than that work.

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
        """Make all later launches wait for the branch."""
        if self._streams is not None and self._done is not None:
            self._streams[0].wait_event(self._done)
