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

from tfswa_lab.memory.display import Shown
from tfswa_lab.memory.sizes import rounded
from tfswa_lab.memory.snapshot.schema import ACTIONS, CODES, History, RecordedPart, Segment

GROWTH = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}


@dataclass(frozen=True, eq=False, repr=False)
class Allocations(Shown):
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

    @property
    def brief(self) -> str:
        """The number of allocations."""
        return f"{len(self.born):,} allocations"

    def alive(self, event: int) -> np.ndarray:
        """A mask of the allocations that are alive right after an event."""
        return (self.born <= event) & (event < self.died)


@dataclass(frozen=True, eq=False, repr=False)
class OverTime(Shown):
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

    @property
    def brief(self) -> str:
        """The number of events."""
        return f"{len(self.allocated):,} events"


def allocations_of(history: History, segments: Sequence[Segment]) -> tuple[Allocations, int]:
    """Match allocations and releases of one device, and count releases without a record."""
    births, died, releases, unrecorded = _matched(history)
    recorded = Allocations(
        history.address[births],
        rounded(history.size[births]),
        history.size[births],
        births + 1,
        died,
        history.stack[births],
        history.text[births],
    )
    older, missing = _compared(recorded, segments, len(history)) if segments else ([], 0)
    zeros = np.zeros(len(releases), np.int64)
    sizes = history.size[releases]
    released = (history.address[releases], rounded(sizes), sizes, zeros, releases + 1, zeros, zeros)
    alive = _alive_throughout(older, len(history))
    columns = zip(released, alive, vars(recorded).values(), strict=True)
    return Allocations(*map(np.concatenate, columns)), unrecorded + missing


def _matched(history: History) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Entries that allocate, when each of these dies, releases without one, and unrecorded ones.

    Sorted by address and time, an allocation ends with its neighbour, whatever that is.
    """
    born = history.where("alloc")
    entries = np.flatnonzero(born | (history.action == release_of(history)))
    entries = entries[np.argsort(history.address[entries], kind="stable")]
    address, is_birth = history.address[entries], born[entries]
    same = address[1:] == address[:-1]
    died = np.full(len(history), len(history) + 1)
    died[entries[:-1][same]] = entries[1:][same] + 1
    unrecorded = np.count_nonzero(same & is_birth[:-1] & is_birth[1:])
    older = ~is_birth
    older[1:] &= ~(same & is_birth[:-1])
    births = np.flatnonzero(born)
    return births, died[births], np.sort(entries[older]), unrecorded


def _compared(
    recorded: Allocations, segments: Sequence[Segment], end: int
) -> tuple[list[RecordedPart], int]:
    """Correct what is alive at the end by the segments.

    Returns:
        Parts in use that are older than the history, and how many releases are not recorded.
    """
    at_end = {part.address: part for part in parts_in_state(segments, "active")}
    alive = np.flatnonzero(recorded.died > end)
    missing = 0
    for row, address in zip(alive.tolist(), recorded.address[alive].tolist(), strict=True):
        if part := at_end.pop(address, None):
            recorded.size[row] = part.size
            recorded.stack[row] = recorded.stack[row] or part.stack
        else:
            recorded.died[row] = end
            missing += 1
    return list(at_end.values()), missing


def _alive_throughout(parts: list[RecordedPart], end: int) -> list[np.ndarray]:
    """Columns of allocations that are older than the history and still alive."""
    rows = [(p.address, p.size, p.requested, 0, end + 1, p.stack, 0) for p in parts]
    return list(np.array(rows, np.int64).reshape(-1, 7).T)


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
    grows = np.flatnonzero(history.where(*GROWTH))
    for entry in grows[grows >= event][::-1].tolist():
        grown = GROWTH[ACTIONS[history.action[entry]]]
        start = int(history.address[entry])
        stop = start + int(history.size[entry])
        if grown == 1:
            ranges = subtract(ranges, [(start, stop)])
        else:
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
