"""CUDA's caching allocator without CUDA: what a series of requests reserves, and why.

It follows the rules of torch 2.13 for one stream and the default settings: no expandable segments,
no `max_split_size_mb`.

Source: c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h of PyTorch 2.13.

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
class SegmentPart:
    """A part of a segment, in use or free; torch calls it a block.

    Args:
        address: where it begins.
        size: bytes of the segment that it covers.
        small: whether it belongs to the small pool.
        requested: bytes requested, 0 if it is free.
        before: its neighbour at the lower address in the same segment.
        after: its neighbour at the higher address.
    """

    address: int
    size: int
    small: bool
    requested: int = 0
    before: SegmentPart | None = None
    after: SegmentPart | None = None

    @property
    def is_split(self) -> bool:
        """Whether it is smaller than its segment."""
        return self.before is not None or self.after is not None


class OutOfMemory(RuntimeError):
    """A request that did not fit, even after the cached segments were released.

    Args:
        requested: bytes requested.
        segment: bytes that the allocator tried to take from the device.
        fits: the largest request that would have fitted.
        allocator: its state at the failure.
        event: the event of the replayed timeline; None outside of a replay.
    """

    def __init__(self, requested: int, segment: int, fits: int, allocator: CachingAllocator):
        super().__init__(
            f"out of memory: {format_bytes(requested)} requested, "
            f"which needs a segment of {format_bytes(segment)}; "
            f"of {format_bytes(allocator.limit)}, {format_bytes(allocator.reserved)} reserved, "
            f"{format_bytes(allocator.allocated)} of it allocated; "
            f"the largest request that would have fitted is {format_bytes(fits)}"
        )
        self.requested, self.segment, self.fits = requested, segment, fits
        self.allocator = allocator
        self.event: int | None = None


def ignore(_action: str, _address: int, _size: int) -> None:
    """Ignore an action."""


class CachingAllocator:
    """Best fit in two pools of cached segments; a request splits a part, a release merges parts.

    Each new segment lies above all older ones. This decides which of two free parts of the same
    size is taken; a real driver may place segments in another order.

    Args:
        limit: bytes that the device has for segments; None for no limit.
        watch: called for every action with its name in a snapshot, the address and the size; for
            `oom`, with the bytes left on the device in place of the address.

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
        self._parts: dict[int, SegmentPart] = {}
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # by size, address
        self._next_address = 0x7F00_0000_0000

    def malloc(self, requested: int) -> int:
        """Allocate memory and return its address.

        Raises:
            ValueError: the request is for less than one byte (torch allocates nothing then).
            OutOfMemory: it does not fit, even after the cached segments are released.
        """
        if requested < 1:
            raise ValueError(f"requested={requested} bytes; the allocator serves 1 and more")
        size = rounded(requested)
        small = size <= SMALL
        part = self._best_fit(size, small) or self._new_segment(requested, segment_size(size))
        spare = part.size - size
        if spare >= QUANTUM if small else spare > SMALL:
            self._split(part, size)
        part.requested = requested
        self.requested += requested
        self.allocated += part.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.watch("alloc", part.address, requested)
        return part.address

    def free(self, address: int) -> None:
        """Return memory to the cache.

        Raises:
            ValueError: nothing was allocated there.
        """
        part = self._parts.get(address)
        if part is None or not part.requested:
            raise ValueError(f"nothing is allocated at address {address:#x}")
        self.watch("free_requested", address, part.requested)
        self.watch("free_completed", address, part.requested)
        self.allocated -= part.size
        self.requested -= part.requested
        part.requested = 0
        if part.after is not None and not part.after.requested:
            self._forget(part.after)
            self._absorb(part, part.after)
        if part.before is not None and not part.before.requested:
            self._forget(part.before)
            part = part.before
            self._absorb(part, part.after)
        insort(self._free[part.small], (part.size, part.address))

    def empty_cache(self) -> int:
        """Release segments without allocations to the device and return their bytes."""
        before = self.reserved
        for small in (False, True):
            for size, address in list(self._free[small]):
                if not self._parts[address].is_split:
                    self._forget(self._parts.pop(address))
                    self.reserved -= size
                    self.watch("segment_free", address, size)
        return before - self.reserved

    def segments(self) -> Iterator[list[SegmentPart]]:
        """The parts of each segment, by rising address."""
        for address in sorted(a for a, part in self._parts.items() if part.before is None):
            part, parts = self._parts[address], []
            while part is not None:
                parts.append(part)
                part = part.after
            yield parts

    @property
    def inactive_split(self) -> int:
        """Free bytes that cannot be released, because their segment has an allocation."""
        return self._free_bytes(lambda part: part.is_split)

    def largest_fitting(self) -> int:
        """The largest request that would fit now, in a free part or in a new segment.

        A new segment may use all that the device has left once the cached segments are released.

        Raises:
            ValueError: the allocator has no limit.
        """
        if self.limit is None:
            raise ValueError("the allocator has no limit, so every request fits")
        cached = max((size for size, _ in self._free[False]), default=0)
        room = self.limit - self.reserved + self._free_bytes(lambda part: not part.is_split)
        own = room // SEGMENT_QUANTUM * SEGMENT_QUANTUM
        shared = OWN_SEGMENT - QUANTUM if room >= LARGE_SEGMENT else 0
        large = max(cached, own if own >= OWN_SEGMENT else shared)
        if large > SMALL:
            return large
        pool = max((size for size, _ in self._free[True]), default=0)
        return min(SMALL, max(pool, own))

    def _free_bytes(self, counts: Callable[[SegmentPart], bool]) -> int:
        free = [*self._free[True], *self._free[False]]
        return sum(size for size, address in free if counts(self._parts[address]))

    def _best_fit(self, size: int, small: bool) -> SegmentPart | None:
        """Take the smallest free part that is large enough from its pool."""
        free = self._free[small]
        place = bisect_left(free, (size, 0))
        return self._parts[free.pop(place)[1]] if place < len(free) else None

    def _new_segment(self, requested: int, size: int) -> SegmentPart:
        if not self._has_room(size):
            self.empty_cache()
            self.num_alloc_retries += 1
            if not self._has_room(size):
                self.num_ooms += 1
                self.watch("oom", self.limit - self.reserved, requested)
                raise OutOfMemory(requested, size, self.largest_fitting(), self)
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        part = SegmentPart(self._next_address, size, small=size == SMALL_SEGMENT)
        self._parts[part.address] = part
        self._next_address += -(-size // SEGMENT_QUANTUM) * SEGMENT_QUANTUM
        self.watch("segment_alloc", part.address, size)
        return part

    def _has_room(self, size: int) -> bool:
        return self.limit is None or self.reserved + size <= self.limit

    def _split(self, part: SegmentPart, size: int) -> None:
        """Keep the first bytes and return the rest to the pool as a free neighbour."""
        spare = SegmentPart(part.address + size, part.size - size, part.small)
        spare.before, spare.after, part.after = part, part.after, spare
        if spare.after is not None:
            spare.after.before = spare
        part.size = size
        self._parts[spare.address] = spare
        insort(self._free[spare.small], (spare.size, spare.address))

    def _absorb(self, part: SegmentPart, neighbour: SegmentPart) -> None:
        """Merge two free neighbours."""
        part.size += neighbour.size
        part.after = neighbour.after
        if part.after is not None:
            part.after.before = part
        del self._parts[neighbour.address]

    def _forget(self, part: SegmentPart) -> None:
        free = self._free[part.small]
        free.pop(bisect_left(free, (part.size, part.address)))


@dataclass(frozen=True, eq=False)
class Replay:
    """The allocator's memory over a timeline.

    Args:
        allocated: bytes in use right after each event, as `torch.cuda.memory_allocated` counts
            them: a part that is too large by at most 1 MiB is not split and counts as a whole.
        reserved: bytes of segments right after each event.
        allocator: its state at the end.
    """

    allocated: np.ndarray
    reserved: np.ndarray
    allocator: CachingAllocator

    @property
    def peak_allocated(self) -> tuple[int, int]:
        """The most bytes allocated, and the first event at which they are."""
        return int(self.allocated.max()), int(self.allocated.argmax())

    @property
    def peak_reserved(self) -> tuple[int, int]:
        """The most bytes reserved, and the first event at which they are."""
        return int(self.reserved.max()), int(self.reserved.argmax())


def replay(
    timeline: Timeline, limit: int | None = None, empty_cache_after: Collection[int] = ()
) -> Replay:
    """Run the allocations and releases of a timeline through the allocator.

    Args:
        timeline: of any device; only sizes and their order count.
        limit: bytes that the device has for segments.
        empty_cache_after: events after which `torch.cuda.empty_cache` is called.

    Raises:
        OutOfMemory: the timeline does not fit; the error's `event` says when.
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
            try:
                addresses[block] = allocator.malloc(block.size)
            except OutOfMemory as error:
                error.event = event
                raise
        if event in flushes:
            allocator.empty_cache()
        allocated[event], reserved[event] = allocator.allocated, allocator.reserved
    return Replay(allocated, reserved, allocator)


def by_event(timeline: Timeline) -> tuple[dict[int, list[Block]], dict[int, list[Block]]]:
    """Blocks by the events of their birth and of their death, without empty blocks."""
    births, deaths = defaultdict(list), defaultdict(list)
    for block in timeline.blocks:
        if block.size:
            births[block.born].append(block)
            deaths[block.died].append(block)
    return births, deaths
