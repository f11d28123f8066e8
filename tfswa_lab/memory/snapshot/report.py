"""What a snapshot comes to: who holds the memory, what is fragmented, and why it ran out.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tfswa_lab.memory.sizes import (
    OWN_SEGMENT,
    SEGMENT_QUANTUM,
    SMALL,
    format_bytes,
    rounded,
    segment_size,
)
from tfswa_lab.memory.snapshot.history import Lives, parts
from tfswa_lab.memory.snapshot.schema import Segment


@dataclass(frozen=True)
class Holder:
    """A line and what it allocated.

    Args:
        line: innermost line that is not torch's.
        size: bytes.
        blocks: how many.
    """

    line: str
    size: int
    blocks: int

    def __str__(self) -> str:
        return f"{format_bytes(self.size):>12}  {self.blocks:>6} blocks  {self.line}"


def holders(lives: Lives, event: int, lines: Sequence[str]) -> list[Holder]:
    """What is alive right after an event, by line, largest first.

    Args:
        lives: of one device.
        event: when.
        lines: the user's line of each stack, by its number.
    """
    alive = lives.alive(event)
    by_stack = np.zeros(len(lines), np.int64)
    np.add.at(by_stack, lives.stack[alive], lives.size[alive])
    counts = np.bincount(lives.stack[alive], minlength=len(lines))
    size, blocks = Counter(), Counter()
    for stack in np.flatnonzero(counts):
        size[lines[stack]] += int(by_stack[stack])
        blocks[lines[stack]] += int(counts[stack])
    return [Holder(line, held, blocks[line]) for line, held in size.most_common()]


@dataclass(frozen=True)
class Change:
    """A line, and what it held in two snapshots.

    Args:
        line: innermost line that is not torch's.
        before: bytes in the first.
        after: bytes in the second.
        blocks_before: how many blocks in the first.
        blocks_after: in the second.
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
        return f"{format_bytes(self.growth):>12}  {blocks:>+6} blocks  {self.line}"


def changes(before: Sequence[Holder], after: Sequence[Holder]) -> list[Change]:
    """Lines that hold more or less than before, the largest change first."""
    old: Mapping[str, Holder] = {holder.line: holder for holder in before}
    new: Mapping[str, Holder] = {holder.line: holder for holder in after}
    found = []
    for line in dict.fromkeys([*old, *new]):
        a, b = (side.get(line, Holder(line, 0, 0)) for side in (old, new))
        if (a.size, a.blocks) != (b.size, b.blocks):
            found.append(Change(line, a.size, b.size, a.blocks, b.blocks))
    return sorted(found, key=lambda change: -abs(change.growth))


@dataclass(frozen=True)
class Fragmentation:
    """How the reserved memory is used at the end of a snapshot; all in bytes.

    Args:
        reserved: of all segments.
        allocated: in blocks in use.
        pending: in blocks that were freed while another stream still used them.
        rounding: of the allocated, what nobody asked for.
        releasable: in segments with nothing in use; `empty_cache` would give them back.
        inactive_split: free, but in segments that are in use.
        largest_free: the largest request that a cached block would serve.
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
    """The state of one device's segments."""
    active, free = parts(segments, "active"), parts(segments, "inactive")
    idle = [one for one in segments if all(part.state == "inactive" for part in one.parts)]
    releasable = sum(part.size for part in parts(idle, "inactive"))
    allocated = sum(part.size for part in active)
    return Fragmentation(
        reserved=sum(segment.size for segment in segments),
        allocated=allocated,
        pending=sum(part.size for part in parts(segments, "pending")),
        rounding=allocated - sum(part.requested for part in active),
        releasable=releasable,
        inactive_split=sum(part.size for part in free) - releasable,
        largest_free=max((part.size for part in free), default=0),
    )


@dataclass(frozen=True)
class OutOfMemoryReport:
    """A request that failed, and what there was; all in bytes.

    Args:
        event: of the trace; right after the failure.
        requested: what was asked for.
        allocated: in blocks in use.
        reserved: of segments.
        largest_free: the largest free stretch within one segment.
        device_free: what the device had left outside of segments.
        holders: by line, largest first.
    """

    event: int
    requested: int
    allocated: int
    reserved: int
    largest_free: int
    device_free: int
    holders: list[Holder]

    @property
    def free(self) -> int:
        """All that was not in use, in however many pieces."""
        return self.reserved - self.allocated + self.device_free

    @property
    def fits(self) -> int:
        """The largest request that would have been served."""
        new = self.device_free // SEGMENT_QUANTUM * SEGMENT_QUANTUM
        if new < OWN_SEGMENT:  # room for segments of the small pool at most
            new = min(new, SMALL) if self.requested <= SMALL else 0
        return max(self.largest_free, new)

    @property
    def is_fragmentation(self) -> bool:
        """Whether the free memory would have held it in one piece."""
        return rounded(self.requested) <= self.free

    @property
    def largest_batch(self) -> float:
        """The share of the batch that can fit at best: as if all that is held grew with it.

        Parameters do not, and the step may have wanted more later: the truth lies below.
        """
        return (self.allocated + self.free) / (self.allocated + self.requested)

    def __str__(self) -> str:
        cause = (
            "The free memory would have held it, had it been in one piece: fragmentation. Clips of "
            "one length, or PYTORCH_ALLOC_CONF=expandable_segments:True, help."
            if self.is_fragmentation
            else f"It was short of {format_bytes(self.requested - self.free)}, and at best "
            f"{self.largest_batch:.0%} of this batch fits: less if parameters are a large part of "
            "what is held, or if the step was not at its peak yet."
        )
        return "\n".join(
            [
                f"{format_bytes(self.requested)} asked for, a segment of "
                f"{format_bytes(segment_size(rounded(self.requested)))} if not from the cache.",
                f"{format_bytes(self.allocated)} were allocated, "
                f"{format_bytes(self.reserved)} reserved; "
                f"{format_bytes(self.device_free)} were left on the device, and the largest free "
                f"stretch of the cache was {format_bytes(self.largest_free)}.",
                f"A request of {format_bytes(self.fits)} would have fitted. {cause}",
                "Held then, by line:",
                *(str(holder) for holder in self.holders[:10]),
            ]
        )
