"""What was allocated and reserved at any time of a history, counted backwards from its end.

The history is a ring buffer, so its oldest entries may be lost. The segments describe the end
completely; that is why everything is counted from there. Time is counted in entries: event 1 is
right after the first entry, event 0 is before it.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tfswa_lab.memory.sizes import rounded
from tfswa_lab.memory.snapshot.schema import ACTIONS, CODES, History, RecordedPart, Segment

GROWTH = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}


@dataclass(frozen=True, eq=False)
class Allocations:
    """Allocations as columns of the same length, in the order of their births.

    Args:
        address: where it begins.
        size: bytes that it takes: as in the segments if it is alive at the end, otherwise the
            request rounded up to 512. (The allocator may have given up to 1 MiB more.)
        requested: bytes requested.
        born: the event of its allocation, 0 if that is older than the first entry.
        died: the event of its release, one more than the last event if it is alive at the end.
        stack: number of the stack that allocated it, 0 if unknown.
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
        """A mask of the allocations that are alive right after an event."""
        return (self.born <= event) & (event < self.died)


@dataclass(frozen=True, eq=False)
class OverTime:
    """Bytes right after each event, from event 0 on.

    Args:
        allocated: in blocks in use.
        active: the same, and in blocks that were freed while another stream still used them.
        reserved: in segments.
        time_us: microseconds; event 0 has the time of the first entry.
    """

    allocated: np.ndarray
    active: np.ndarray
    reserved: np.ndarray
    time_us: np.ndarray


@dataclass(slots=True)
class _Allocation:
    """A row of `Allocations`."""

    address: int
    size: int
    requested: int
    born: int
    died: int
    stack: int
    text: int


def allocations_of(history: History, segments: Sequence[Segment]) -> tuple[Allocations, int]:
    """Match allocations and releases of one device, and count releases without a record."""
    never = len(history) + 1
    rows, there, unrecorded = _matched(history, never)
    if segments:
        at_end = {part.address: part for part in parts_in_state(segments, "active")}
        for address, row in there.items():
            if address in at_end:
                row.size = at_end[address].size
                row.stack = row.stack or at_end[address].stack
            else:
                row.died = len(history)
                unrecorded += 1
        older = [part for address, part in at_end.items() if address not in there]
        rows += [_Allocation(p.address, p.size, p.requested, 0, never, p.stack, 0) for p in older]
    rows.sort(key=lambda row: row.born)
    columns = ([getattr(row, name) for row in rows] for name in _Allocation.__slots__)
    return Allocations(*(np.array(column, np.int64) for column in columns)), unrecorded


def _matched(history: History, never: int) -> tuple[list[_Allocation], dict[int, _Allocation], int]:
    """All allocations, those not released by address, and how many releases have no record."""
    rows, there, unrecorded = [], {}, 0
    release = release_of(history)
    columns = (history.action, history.address, history.size, history.stack, history.text)
    plain = zip(*(column.tolist() for column in columns), strict=True)
    for event, (action, address, size, stack, text) in enumerate(plain, start=1):
        if action == CODES["alloc"]:
            if address in there:  # its release was not recorded
                there[address].died = event
                unrecorded += 1
            there[address] = _Allocation(address, rounded(size), size, event, never, stack, text)
            rows.append(there[address])
        elif action == release:
            row = there.pop(address, None)
            if row is None:  # its allocation is older than the history
                row = _Allocation(address, rounded(size), size, 0, event, 0, 0)
                rows.append(row)
            row.died = event
    return rows, there, unrecorded


def release_of(history: History) -> int:
    """The action that ends an allocation: the request, or its completion where only that exists."""
    requested = CODES["free_requested"]
    return requested if requested in history.action else CODES["free_completed"]


def parts_in_state(segments: Iterable[Segment], state: str) -> list[RecordedPart]:
    """The parts of segments that have this state."""
    return [part for segment in segments for part in segment.parts if part.state == state]


def over_time(history: History, segments: Sequence[Segment], allocations: Allocations) -> OverTime:
    """Bytes allocated, active and reserved on one device, after each event."""
    change = np.zeros(len(history) + 2, np.int64)
    np.add.at(change, allocations.born, allocations.size)
    np.subtract.at(change, allocations.died, allocations.size)
    allocated = np.cumsum(change)[:-1]
    requested, completed = map(history.where, ("free_requested", "free_completed"))
    pending = rounded(history.size) * (requested.astype(int) - completed)
    if not (requested.any() and completed.any()):  # only one of the two was recorded
        pending[:] = 0
    growth = history.size * history.where("segment_alloc", "segment_map")
    growth -= history.size * history.where("segment_free", "segment_unmap")
    waiting = sum(part.size for part in parts_in_state(segments, "pending"))
    reserved = sum(segment.size for segment in segments)
    return OverTime(
        allocated,
        allocated + np.maximum(_back_from(waiting, pending), 0),
        _back_from(reserved, growth),
        np.concatenate([history.time_us[:1], history.time_us]),
    )


def _back_from(end: int, change: np.ndarray) -> np.ndarray:
    """The level before the first change and after each change, given the level at the end."""
    total = np.concatenate([[0], np.cumsum(change)])
    level = end + total - total[-1]
    return level - min(level.min(), 0)  # without segments, the end is unknown


def reserved_at(event: int, history: History, segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """The ranges of addresses, from and to, that were reserved right after an event."""
    ranges = [(segment.address, segment.address + segment.size) for segment in segments]
    for entry in range(len(history) - 1, event - 1, -1):
        grown = GROWTH.get(ACTIONS[history.action[entry]])
        start = int(history.address[entry])
        stop = start + int(history.size[entry])
        if grown == 1:
            ranges = subtract(ranges, [(start, stop)])
        elif grown == -1:
            ranges.append((start, stop))
    return ranges


def subtract(ranges: list[tuple[int, int]], taken: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges of addresses without those that are taken.

    >>> subtract([(0, 10), (10, 15), (20, 30)], [(8, 12), (2, 4), (9, 25)])
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
    """Sorted ranges; overlapping ones are merged, neighbours are not."""
    joined = []
    for start, end in sorted(ranges):
        if joined and start < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined
