"""A trace backwards from what is there at its end: what was allocated and reserved at any time.

The history is a ring: the oldest entries may be lost. The end is known whole, from the segments, so
everything is counted from there. Time is counted in entries; right after the first is event 1, and
event 0 is before it.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tfswa_lab.memory.sizes import QUANTUM, rounded
from tfswa_lab.memory.snapshot.schema import ACTIONS, CODES, Part, Segment, Trace

GROWTH = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}


@dataclass(frozen=True, eq=False)
class Lives:
    """Allocations as columns of the same length, in the order of their births.

    Args:
        address: where.
        size: bytes that it takes: of those still there, as in the segments; of the others what was
            asked for, rounded up to 512. (The allocator may have given them up to 1 MiB more.)
        requested: bytes asked for.
        born: the event of its allocation, 0 if it was before the first entry.
        died: the event of its release, one more than the last if it never was.
        stack: number of the stack that asked for it, 0 if unknown.
        text: number of its `user_metadata`.
    """

    address: np.ndarray
    size: np.ndarray
    requested: np.ndarray
    born: np.ndarray
    died: np.ndarray
    stack: np.ndarray
    text: np.ndarray

    def alive(self, event: int) -> np.ndarray:
        """A mask of those that are there right after an event."""
        return (self.born <= event) & (event < self.died)


@dataclass(frozen=True, eq=False)
class OverTime:
    """Bytes right after each event, from event 0 on.

    Args:
        allocated: by blocks in use.
        active: and by those that were freed while another stream still used them.
        reserved: by segments.
        time_us: when, in microseconds; event 0 has the time of the first entry.
    """

    allocated: np.ndarray
    active: np.ndarray
    reserved: np.ndarray
    time_us: np.ndarray


@dataclass(slots=True)
class _Life:
    """A row of `Lives`."""

    address: int
    size: int
    requested: int
    born: int
    died: int
    stack: int
    text: int


def lives_of(trace: Trace, segments: Sequence[Segment]) -> tuple[Lives, int]:
    """Match allocations and releases of one device, and count releases without a record."""
    never = len(trace) + 1
    rows, there, unrecorded = _matched(trace, never)
    if segments:
        at_end = {part.address: part for part in parts(segments, "active")}
        for address, life in there.items():
            if address in at_end:
                life.size = at_end[address].size
                life.stack = life.stack or at_end[address].stack
            else:
                life.died = len(trace)
                unrecorded += 1
        older = [part for address, part in at_end.items() if address not in there]
        rows += [_Life(p.address, p.size, p.requested, 0, never, p.stack, 0) for p in older]
    rows.sort(key=lambda life: life.born)
    columns = ([getattr(life, name) for life in rows] for name in _Life.__slots__)
    return Lives(*(np.array(column, np.int64) for column in columns)), unrecorded


def _matched(trace: Trace, never: int) -> tuple[list[_Life], dict[int, _Life], int]:
    """Lives as far as the trace tells, those not released by address, and releases not recorded."""
    rows, there, unrecorded = [], {}, 0
    release = release_of(trace)
    columns = (trace.action, trace.address, trace.size, trace.stack, trace.text)
    plain = zip(*(column.tolist() for column in columns), strict=True)
    for event, (action, address, size, stack, text) in enumerate(plain, start=1):
        if action == CODES["alloc"]:
            if address in there:  # its release was not recorded
                there[address].died = event
                unrecorded += 1
            there[address] = _Life(address, rounded(size), size, event, never, stack, text)
            rows.append(there[address])
        elif action == release:
            life = there.pop(address, None)
            if life is None:  # its allocation is older than the trace
                life = _Life(address, rounded(size), size, 0, event, 0, 0)
                rows.append(life)
            life.died = event
    return rows, there, unrecorded


def release_of(trace: Trace) -> int:
    """The action that ends a life: the request, or its completion where only that was recorded."""
    requested = CODES["free_requested"]
    return requested if requested in trace.action else CODES["free_completed"]


def parts(segments: Iterable[Segment], state: str) -> list[Part]:
    """The parts of segments that are in a state."""
    return [part for segment in segments for part in segment.parts if part.state == state]


def over_time(trace: Trace, segments: Sequence[Segment], lives: Lives) -> OverTime:
    """Bytes allocated, active and reserved on one device, after each event."""
    change = np.zeros(len(trace) + 2, np.int64)
    np.add.at(change, lives.born, lives.size)
    np.subtract.at(change, lives.died, lives.size)
    allocated = np.cumsum(change)[:-1]
    taken = -(-trace.size // QUANTUM) * QUANTUM
    pending = taken * (
        trace.where("free_requested").astype(int) - trace.where("free_completed").astype(int)
    )
    if not (trace.where("free_requested").any() and trace.where("free_completed").any()):
        pending[:] = 0
    growth = trace.size * trace.where("segment_alloc", "segment_map")
    growth -= trace.size * trace.where("segment_free", "segment_unmap")
    waiting = sum(part.size for part in parts(segments, "pending"))
    reserved = sum(segment.size for segment in segments)
    return OverTime(
        allocated,
        allocated + np.maximum(_back_from(waiting, pending), 0),
        _back_from(reserved, growth),
        np.concatenate([trace.time_us[:1], trace.time_us]),
    )


def _back_from(end: int, change: np.ndarray) -> np.ndarray:
    """What there was before and after each change, if this is what there is in the end."""
    total = np.concatenate([[0], np.cumsum(change)])
    level = end + total - total[-1]
    return level - min(level.min(), 0)  # without segments, the end is not known


def reserved_at(event: int, trace: Trace, segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """The ranges of addresses, from and to, that were reserved right after an event."""
    ranges = [(segment.address, segment.address + segment.size) for segment in segments]
    for entry in range(len(trace) - 1, event - 1, -1):
        grown = GROWTH.get(ACTIONS[trace.action[entry]])
        start = int(trace.address[entry])
        stop = start + int(trace.size[entry])
        if grown == 1:
            ranges = without(ranges, [(start, stop)])
        elif grown == -1:
            ranges.append((start, stop))
    return ranges


def without(ranges: list[tuple[int, int]], taken: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What is left of ranges of addresses when others are taken out of them.

    >>> without([(0, 10), (10, 15), (20, 30)], [(8, 12), (2, 4), (9, 25)])
    [(0, 2), (4, 8), (25, 30)]
    """
    left, taken, at = [], _disjoint(taken), 0
    for start, end in _disjoint(ranges):
        while at < len(taken) and taken[at][1] <= start:
            at += 1
        near = at
        while near < len(taken) and taken[near][0] < end:
            if start < taken[near][0]:
                left.append((start, taken[near][0]))
            start = taken[near][1]
            near += 1
        if start < end:
            left.append((start, end))
    return left


def _disjoint(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order, those that overlap as one; neighbours stay two."""
    joined = []
    for start, end in sorted(ranges):
        if joined and start < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined
