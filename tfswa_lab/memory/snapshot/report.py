"""Findings in a snapshot: which lines allocated the memory, what is fragmented, why it ran out.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tfswa_lab.memory.display import Shown
from tfswa_lab.memory.sizes import (
    OWN_SEGMENT,
    SEGMENT_QUANTUM,
    SMALL,
    format_bytes,
    rounded,
    segment_size,
)
from tfswa_lab.memory.snapshot.groups import Groups
from tfswa_lab.memory.snapshot.history import Allocations, parts_in_state
from tfswa_lab.memory.snapshot.schema import Segment


@dataclass(frozen=True)
class AllocationSite:
    """A line, or another group, and the memory that it allocated.

    Args:
        line: innermost line of the user's code; of another grouping, the group's name.
        size: bytes.
        blocks: number of blocks.
    """

    line: str
    size: int
    blocks: int

    def __str__(self) -> str:
        stack = self.line.replace("\n", "\n" + " " * 29)  # its other lines, below the first
        return f"{format_bytes(self.size):>12}  {_blocks(self.blocks, '>6'):<13}  {stack}"


def _blocks(number: int, form: str) -> str:
    return f"{number:{form}} block{'' if abs(number) == 1 else 's'}"


def sites_of(groups: Groups, allocations: Allocations, event: int) -> list[AllocationSite]:
    """The groups that held memory right after an event, largest first."""
    alive = allocations.alive(event)
    size = np.zeros(len(groups.names), np.int64)
    np.add.at(size, groups.of[alive], allocations.size[alive])
    blocks = np.bincount(groups.of[alive], minlength=len(groups.names))
    order = np.argsort(-size, kind="stable")
    found = (at for at in order.tolist() if blocks[at])
    return [AllocationSite(groups.names[at], int(size[at]), int(blocks[at])) for at in found]


@dataclass(frozen=True)
class Change:
    """A line, and the memory that it had allocated in two snapshots.

    Args:
        line: innermost line of the user's code.
        before: bytes in the first.
        after: bytes in the second.
        blocks_before: number of blocks in the first.
        blocks_after: number of blocks in the second.
    """

    line: str
    before: int
    after: int
    blocks_before: int
    blocks_after: int

    @property
    def growth(self) -> int:
        """Bytes."""
        return self.after - self.before

    def __str__(self) -> str:
        blocks = self.blocks_after - self.blocks_before
        return f"{format_bytes(self.growth):>12}  {_blocks(blocks, '>+6'):<13}  {self.line}"


def changes(before: Sequence[AllocationSite], after: Sequence[AllocationSite]) -> list[Change]:
    """Lines whose memory grew or shrank, the largest change first."""
    old, new = ({site.line: site for site in side} for side in (before, after))
    found = []
    for line in old | new:
        a, b = (side.get(line, AllocationSite(line, 0, 0)) for side in (old, new))
        if (a.size, a.blocks) != (b.size, b.blocks):
            found.append(Change(line, a.size, b.size, a.blocks, b.blocks))
    return sorted(found, key=lambda change: -abs(change.growth))


@dataclass(frozen=True)
class Fragmentation:
    """The use of the reserved memory at the end of a snapshot; all in bytes.

    Args:
        reserved: in all segments.
        allocated: in blocks in use.
        pending: in blocks that were freed while another stream still used them.
        rounding: part of the allocated memory that was not requested.
        releasable: in segments with no block in use; `empty_cache` would release them.
        inactive_split: free, but in segments with a block in use.
        largest_free: the largest request that would fit in a cached block.
    """

    reserved: int
    allocated: int
    pending: int
    rounding: int
    releasable: int
    inactive_split: int
    largest_free: int

    def __str__(self) -> str:
        return (
            f"{format_bytes(self.reserved)} reserved: {format_bytes(self.allocated)} allocated "
            f"({format_bytes(self.rounding)} of it rounding), "
            f"{format_bytes(self.releasable)} cached in whole segments, "
            f"{format_bytes(self.inactive_split)} free between blocks in use, "
            f"the largest free block {format_bytes(self.largest_free)}"
        )


def fragmentation(segments: Sequence[Segment]) -> Fragmentation:
    """How one device's segments are used."""
    active, free = parts_in_state(segments, "active"), parts_in_state(segments, "inactive")
    idle = [one for one in segments if all(part.state == "inactive" for part in one.parts)]
    releasable = sum(part.size for part in parts_in_state(idle, "inactive"))
    allocated = sum(part.size for part in active)
    return Fragmentation(
        reserved=sum(segment.size for segment in segments),
        allocated=allocated,
        pending=sum(part.size for part in parts_in_state(segments, "pending")),
        rounding=allocated - sum(part.requested for part in active),
        releasable=releasable,
        inactive_split=sum(part.size for part in free) - releasable,
        largest_free=max((part.size for part in free), default=0),
    )


@dataclass(frozen=True, repr=False)
class OutOfMemoryReport(Shown):
    """A request that failed, and the memory at that time; all in bytes.

    Args:
        event: of the history, right after the failure.
        requested: size of the request.
        allocated: in blocks in use.
        reserved: in segments.
        largest_free: the largest free range within one segment.
        device_free: left on the device, outside of segments.
        allocation_sites: of the memory in use, largest first.
    """

    event: int
    requested: int
    allocated: int
    reserved: int
    largest_free: int
    device_free: int
    allocation_sites: list[AllocationSite]

    @property
    def free(self) -> int:
        """All memory that was not in use, in one part or many."""
        return self.reserved - self.allocated + self.device_free

    @property
    def fits(self) -> int:
        """The largest request that would have fitted."""
        new = self.device_free // SEGMENT_QUANTUM * SEGMENT_QUANTUM
        if new < OWN_SEGMENT:  # there is room for a segment of the small pool at most
            new = min(new, SMALL) if self.requested <= SMALL else 0
        return max(self.largest_free, new)

    @property
    def is_fragmentation(self) -> bool:
        """Whether the free memory, in one part, would have been large enough."""
        return rounded(self.requested) <= self.free

    @property
    def largest_batch(self) -> float:
        """The largest share of the batch that can fit, if all held memory grows with the batch.

        It is an upper bound: parameters do not grow, and the step may need more memory later.
        """
        return (self.allocated + self.free) / (self.allocated + self.requested)

    @property
    def brief(self) -> str:
        """The request, and what would have fitted."""
        asked, fits = map(format_bytes, (self.requested, self.fits))
        return f"{asked} requested, {fits} would have fitted"

    @property
    def sentences(self) -> list[str]:
        """The request, the memory at that time, and why it failed."""
        cause = (
            "The free memory was large enough, but not in one part: fragmentation. Segments of one "
            "length, or PYTORCH_ALLOC_CONF=expandable_segments:True, help."
            if self.is_fragmentation
            else f"It lacked {format_bytes(self.requested - self.free)}, and at most "
            f"{self.largest_batch:.0%} of this batch fits: less if parameters are a large part of "
            "the memory in use, or if the step had not reached its peak."
        )
        return [
            f"{format_bytes(self.requested)} requested, which needs a segment of "
            f"{format_bytes(segment_size(rounded(self.requested)))} if the cache has no room.",
            f"{format_bytes(self.allocated)} were allocated, "
            f"{format_bytes(self.reserved)} reserved; "
            f"{format_bytes(self.device_free)} were left on the device, and the largest free "
            f"range of the cache was {format_bytes(self.largest_free)}.",
            f"A request of {format_bytes(self.fits)} would have fitted. {cause}",
        ]

    def __str__(self) -> str:
        sites = map(str, self.allocation_sites[:10])
        return "\n".join([*self.sentences, "In use then, by line:", *sites])
