"""CUDA's caching allocator without CUDA: what is reserved, and why, for a given order of requests.

The rules of torch 2.13 (`c10/cuda/CUDACachingAllocator.cpp`, `c10/core/AllocatorConfig.h`) for one
stream and the default settings: no expandable segments, no `max_split_size_mb`.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np

from tfswa_lab.memory.sizes import (
    LARGE_SEGMENT,
    OWN_SEGMENT,
    QUANTUM,
    SEGMENT_QUANTUM,
    SMALL,
    SMALL_SEGMENT,
    format_bytes,
    rounded,
    segment_size,
)
from tfswa_lab.memory.trace.timeline import Block, Timeline

Watch = Callable[[str, int, int], None]


@dataclass(eq=False, slots=True)
class Piece:
    """A part of a segment, in use or free; torch calls it a block.

    Args:
        address: where it begins.
        size: bytes of the segment that it covers.
        small: which pool it belongs to.
        requested: bytes asked for, 0 if it is free.
        before: its neighbour at lower addresses in the same segment.
        after: its neighbour at higher ones.
    """

    address: int
    size: int
    small: bool
    requested: int = 0
    before: Piece | None = None
    after: Piece | None = None

    @property
    def is_split(self) -> bool:
        """Whether it is less than its segment."""
        return self.before is not None or self.after is not None


class OutOfMemory(RuntimeError):
    """A request that did not fit, after all cached segments had been given back.

    Args:
        requested: bytes asked for.
        segment: bytes that the device was asked for.
        fits: the largest request that would have been served.
        allocator: as it was then.
        event: of the timeline that was being replayed; None outside of a replay.
    """

    def __init__(self, requested: int, segment: int, fits: int, allocator: CachingAllocator):
        super().__init__(
            f"out of memory: {format_bytes(requested)} asked for, "
            f"a segment of {format_bytes(segment)} tried; "
            f"of {format_bytes(allocator.limit)}, {format_bytes(allocator.reserved)} reserved, "
            f"{format_bytes(allocator.allocated)} of it allocated; "
            f"the largest request that would have fitted is {format_bytes(fits)}"
        )
        self.requested, self.segment, self.fits = requested, segment, fits
        self.allocator = allocator
        self.event: int | None = None


def ignore(_action: str, _address: int, _size: int) -> None:
    """Watch nothing."""


class CachingAllocator:
    """Best fit in two pools of cached segments, split on the way out and merged on the way back.

    New segments lie above all older ones. That decides which of two free pieces of the same size
    is taken; a driver may place them otherwise.

    Args:
        limit: bytes of segments that the device has for us; None for no limit.
        watch: is told of every action, named as in snapshots, with the address and the size; with
            `oom`, what the device had left in place of the address.

    >>> allocator = CachingAllocator()
    >>> address = allocator.malloc(5 * 2**20)
    >>> format_bytes(allocator.allocated), format_bytes(allocator.reserved)
    ('5.00 MiB', '20.00 MiB')
    """

    def __init__(self, limit: int | None = None, watch: Watch = ignore):
        self.limit, self.watch = limit, watch
        self.allocated = self.reserved = self.requested = 0
        self.peak_allocated = self.peak_reserved = 0
        self.num_alloc_retries = self.num_ooms = 0
        self._pieces: dict[int, Piece] = {}
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # by size, address
        self._next_address = 0x7F00_0000_0000

    def malloc(self, requested: int) -> int:
        """Take memory and return its address.

        Raises:
            ValueError: fewer than one byte is asked for (torch allocates nothing then).
            OutOfMemory: it does not fit, even after all cached segments were given back.
        """
        if requested < 1:
            raise ValueError(f"requested={requested} bytes; the allocator serves 1 and more")
        size = rounded(requested)
        small = size <= SMALL
        piece = self._best_fit(size, small) or self._new_segment(requested, segment_size(size))
        spare = piece.size - size
        if spare >= QUANTUM if small else spare > SMALL:
            self._split(piece, size)
        piece.requested = requested
        self.requested += requested
        self.allocated += piece.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.watch("alloc", piece.address, requested)
        return piece.address

    def free(self, address: int) -> None:
        """Give memory back to the cache.

        Raises:
            ValueError: nothing was allocated there.
        """
        piece = self._pieces.get(address)
        if piece is None or not piece.requested:
            raise ValueError(f"nothing is allocated at address {address:#x}")
        self.watch("free_requested", address, piece.requested)
        self.watch("free_completed", address, piece.requested)
        self.allocated -= piece.size
        self.requested -= piece.requested
        piece.requested = 0
        if piece.after is not None and not piece.after.requested:
            self._forget(piece.after)
            self._absorb(piece, piece.after)
        if piece.before is not None and not piece.before.requested:
            self._forget(piece.before)
            piece = piece.before
            self._absorb(piece, piece.after)
        insort(self._free[piece.small], (piece.size, piece.address))

    def empty_cache(self) -> int:
        """Give segments in which nothing is allocated back to the device; returns their bytes."""
        before = self.reserved
        for small in (False, True):
            for size, address in list(self._free[small]):
                if not self._pieces[address].is_split:
                    self._forget(self._pieces.pop(address))
                    self.reserved -= size
                    self.watch("segment_free", address, size)
        return before - self.reserved

    def segments(self) -> Iterator[list[Piece]]:
        """The pieces of each segment, by rising address."""
        for address in sorted(a for a, piece in self._pieces.items() if piece.before is None):
            piece, pieces = self._pieces[address], []
            while piece is not None:
                pieces.append(piece)
                piece = piece.after
            yield pieces

    @property
    def inactive_split(self) -> int:
        """Free bytes that cannot be given back: something else is allocated in their segment."""
        return self._free_bytes(lambda piece: piece.is_split)

    def largest_fitting(self) -> int:
        """The largest request that would be served now; with no limit, there is none (ValueError).

        A free piece serves it, or a new segment in what the device has left once all cached
        segments are given back.
        """
        if self.limit is None:
            raise ValueError("the allocator has no limit, so every request fits")
        cached = max((size for size, _ in self._free[False]), default=0)
        room = self.limit - self.reserved + self._free_bytes(lambda piece: not piece.is_split)
        own = room // SEGMENT_QUANTUM * SEGMENT_QUANTUM
        shared = OWN_SEGMENT - QUANTUM if room >= LARGE_SEGMENT else 0
        large = max(cached, own if own >= OWN_SEGMENT else shared)
        if large > SMALL:
            return large
        pool = max((size for size, _ in self._free[True]), default=0)
        return min(SMALL, max(pool, own))

    def _free_bytes(self, counts: Callable[[Piece], bool]) -> int:
        free = [*self._free[True], *self._free[False]]
        return sum(size for size, address in free if counts(self._pieces[address]))

    def _best_fit(self, size: int, small: bool) -> Piece | None:
        """The smallest free piece that is large enough, taken from the pool."""
        free = self._free[small]
        place = bisect_left(free, (size, 0))
        return self._pieces[free.pop(place)[1]] if place < len(free) else None

    def _new_segment(self, requested: int, size: int) -> Piece:
        if not self._has_room(size):
            self.empty_cache()
            self.num_alloc_retries += 1
            if not self._has_room(size):
                self.num_ooms += 1
                self.watch("oom", self.limit - self.reserved, requested)
                raise OutOfMemory(requested, size, self.largest_fitting(), self)
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        piece = Piece(self._next_address, size, small=size == SMALL_SEGMENT)
        self._pieces[piece.address] = piece
        self._next_address += -(-size // SEGMENT_QUANTUM) * SEGMENT_QUANTUM
        self.watch("segment_alloc", piece.address, size)
        return piece

    def _has_room(self, size: int) -> bool:
        return self.limit is None or self.reserved + size <= self.limit

    def _split(self, piece: Piece, size: int) -> None:
        """Keep the first bytes and put the others back as a free neighbour."""
        spare = Piece(piece.address + size, piece.size - size, piece.small)
        spare.before, spare.after, piece.after = piece, piece.after, spare
        if spare.after is not None:
            spare.after.before = spare
        piece.size = size
        self._pieces[spare.address] = spare
        insort(self._free[spare.small], (spare.size, spare.address))

    def _absorb(self, piece: Piece, neighbour: Piece) -> None:
        """Two free neighbours become one."""
        piece.size += neighbour.size
        piece.after = neighbour.after
        if piece.after is not None:
            piece.after.before = piece
        del self._pieces[neighbour.address]

    def _forget(self, piece: Piece) -> None:
        free = self._free[piece.small]
        free.pop(bisect_left(free, (piece.size, piece.address)))


@dataclass(frozen=True, eq=False)
class Replay:
    """What a timeline does to the allocator.

    Args:
        allocated: bytes in use right after each event, as `torch.cuda.memory_allocated` counts
            them: a piece too large by up to 1 MiB is handed out unsplit, and counts whole.
        reserved: bytes of segments right after each event.
        allocator: as it was left.
    """

    allocated: np.ndarray
    reserved: np.ndarray
    allocator: CachingAllocator

    @property
    def peak_allocated(self) -> tuple[int, int]:
        """Most bytes allocated, and the first event at which they are."""
        return int(self.allocated.max()), int(self.allocated.argmax())

    @property
    def peak_reserved(self) -> tuple[int, int]:
        """Most bytes reserved, and the first event at which they are."""
        return int(self.reserved.max()), int(self.reserved.argmax())


def replay(
    timeline: Timeline, limit: int | None = None, empty_cache_after: Collection[int] = ()
) -> Replay:
    """Run a trace's births and deaths through the allocator.

    Args:
        timeline: of any device; only sizes and the order count.
        limit: bytes of segments that the device has.
        empty_cache_after: events after which `torch.cuda.empty_cache` would be called.

    Raises:
        OutOfMemory: it does not fit; its `event` says when.
    """
    allocator = CachingAllocator(limit)
    allocated, reserved = np.zeros((2, timeline.events + 1), np.int64)
    flushes = frozenset(empty_cache_after)
    births, deaths = by_event(timeline)
    addresses: dict[Block, int] = {}
    for event in range(timeline.events + 1):
        for block in deaths[event]:
            allocator.free(addresses.pop(block))
        for block in births[event]:
            addresses[block] = malloc_at(event, allocator, block.size)
        if event in flushes:
            allocator.empty_cache()
        allocated[event], reserved[event] = allocator.allocated, allocator.reserved
    return Replay(allocated, reserved, allocator)


def by_event(timeline: Timeline) -> tuple[dict[int, list[Block]], dict[int, list[Block]]]:
    """Blocks by the event of their birth and by that of their death; empty ones take no memory."""
    births, deaths = defaultdict(list), defaultdict(list)
    for block in timeline.blocks:
        if block.size:
            births[block.born].append(block)
            deaths[block.died].append(block)
    return births, deaths


def malloc_at(event: int, allocator: CachingAllocator, size: int) -> int:
    """`CachingAllocator.malloc`, whose failure knows the event."""
    try:
        return allocator.malloc(size)
    except OutOfMemory as error:
        error.event = event
        raise
