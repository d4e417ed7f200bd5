"""A model of CUDA's caching allocator, which replays a tape.

It has blocks of 512 bytes, and segments that are split and cached, as in pytorch's
`c10/cuda/CUDACachingAllocator.cpp`.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable
from typing import Any

from .tape import Block

# --- CUDA's caching allocator -----------------------------------------------------------------------------------

_MIB = 1024 * 1024


@dataclasses.dataclass(eq=False, slots=True)
class _Piece:
    """A part of a segment."""

    size: int
    address: int
    small: bool
    free: bool = False
    before: _Piece | None = None
    after: _Piece | None = None

    def key(self) -> tuple[int, int]:
        return (self.size, self.address)


class Allocator:
    """CUDA's caching allocator without real memory: counts bytes allocated and reserved, and the peak of both.

    Requests are rounded up to 512 bytes. Those up to 1 MiB come from segments of 2 MiB, larger ones below 10 MiB from
    segments of 20 MiB, and those above from a segment of their own, rounded up to 2 MiB. The best fitting free piece is
    taken. It is split if enough is left over (512 bytes, or more than 1 MiB for large requests); what is not split off
    counts as allocated. Freed pieces are joined with free neighbours and kept. (`CUDACachingAllocator.cpp`:
    `round_size`, `get_allocation_size`, `should_split`.)
    """

    def __init__(self) -> None:
        self.allocated = self.reserved = self.peak = self.peak_reserved = 0
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self._pieces: dict[tuple[int, int], _Piece] = {}
        self._next = 0

    def take(self, size: int) -> _Piece:
        """Allocate `size` bytes."""
        size = max(512, -(-size // 512) * 512)
        small = size <= _MIB
        pool = self._free[small]
        place = bisect.bisect_left(pool, (size, -1))
        if place < len(pool):
            piece = self._pieces.pop(pool.pop(place))
        else:
            if small:
                segment = 2 * _MIB
            elif size < 10 * _MIB:
                segment = 20 * _MIB
            else:
                segment = -(-size // (2 * _MIB)) * 2 * _MIB
            piece = _Piece(segment, self._next, small)
            self._next += segment + 2 * _MIB
            self.reserved += segment
            self.peak_reserved = max(self.peak_reserved, self.reserved)
        left = piece.size - size
        if left >= 512 if small else left > _MIB:
            rest = _Piece(left, piece.address + size, small, True, piece, piece.after)
            if rest.after is not None:
                rest.after.before = rest
            piece.after, piece.size = rest, size
            self._add(rest)
        piece.free = False
        self.allocated += piece.size
        self.peak = max(self.peak, self.allocated)
        return piece

    def give_back(self, piece: _Piece) -> None:
        """Free what `take` returned."""
        self.allocated -= piece.size
        piece.free = True
        for other in (piece.before, piece.after):
            if other is None or not other.free:
                continue
            key = other.key()
            pool = self._free[piece.small]
            del pool[bisect.bisect_left(pool, key)]
            del self._pieces[key]
            if other is piece.before:
                piece.address, piece.before = other.address, other.before
                if piece.before is not None:
                    piece.before.after = piece
            else:
                piece.after = other.after
                if piece.after is not None:
                    piece.after.before = piece
            piece.size += other.size
        self._add(piece)

    def _add(self, piece: _Piece) -> None:
        bisect.insort(self._free[piece.small], piece.key())
        self._pieces[piece.key()] = piece


@dataclasses.dataclass(frozen=True)
class Peak:
    """The moment of a tape at which most was allocated.

    Args:
        bytes: Bytes allocated then.
        reserved: Most bytes reserved until the tape's end.
        phase: Phase of the step at that moment.
        alive: The blocks that lived then, and the bytes that each took.
    """

    bytes: int
    reserved: int
    phase: str
    alive: list[tuple[Block, int]]


def replay(events: Iterable[tuple[Block, bool]], *, caching: bool) -> Peak:
    """Find a tape's peak.

    Args:
        events: A tape's events.
        caching: Whether to allocate as CUDA's caching allocator does; otherwise each block takes its own bytes.

    Returns:
        The peak.
    """
    events = list(events)
    allocator = Allocator()
    pieces: dict[int, Any] = {}
    sizes: dict[int, int] = {}
    now = peak = place = 0
    for index, (block, made) in enumerate(events):
        if made:
            if caching:
                piece = pieces[id(block)] = allocator.take(block.bytes)
                sizes[id(block)] = piece.size
            else:
                sizes[id(block)] = block.bytes
            now += sizes[id(block)]
        else:
            now -= sizes[id(block)]
            if caching:
                allocator.give_back(pieces.pop(id(block)))
        if now > peak:
            peak, place = now, index
    alive = [
        (block, sizes[id(block)])
        for index, (block, made) in enumerate(events[: place + 1])
        if made and (block.died is None or block.died > place)
    ]
    phase = events[place][0].phase if events else "before"
    return Peak(peak, allocator.peak_reserved if caching else peak, phase, alive)
