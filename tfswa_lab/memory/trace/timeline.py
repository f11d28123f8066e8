"""What a trace is made of: blocks of memory, each with a birth, a death and an origin.

Time is counted in events: every allocation and every release is one. Sizes are bytes.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from tfswa_lab.memory.sizes import format_bytes

CATEGORIES = (
    "parameter",
    "buffer",
    "gradient",
    "optimizer state",
    "input",
    "activation",
    "temporary",
)


class Frame(NamedTuple):
    """A line of Python that was being executed."""

    filename: str
    line: int
    name: str  # of the function

    def __str__(self) -> str:
        return f"{self.filename}:{self.line} ({self.name})"


@dataclass(eq=False)
class Block:
    """One storage, from its allocation to its release.

    Args:
        size: bytes asked for.
        rounded: bytes that the allocator gives.
        born: the event of its allocation; 0 for all that were there when the trace began.
        died: the event of its release, None if it was alive at the end.
        category: one of `CATEGORIES`.
        module: path of the module that made it or that it belongs to, such as `blocks.0.time`;
            empty outside of modules.
        op: the operator that made it, such as `aten.mm.default`; empty if it was there before.
        phase: `forward`, `backward`, `recompute` (of checkpointed activations) or `outside`.
        step: the step it was born in, counted from 0; -1 before the first.
        frames: the lines that asked for it, innermost first. In the backward pass, those of the
            forward operation whose gradient is computed.
        shape: of the tensor it was made for.
        dtype: of that tensor, such as `float32`.
    """

    size: int
    rounded: int
    born: int
    died: int | None = None
    category: str = "temporary"
    module: str = ""
    op: str = ""
    phase: str = "outside"
    step: int = -1
    frames: tuple[Frame, ...] = ()
    shape: tuple[int, ...] = ()
    dtype: str = ""

    def alive_at(self, event: int) -> bool:
        """Whether it is there right after an event."""
        return self.born <= event and (self.died is None or event < self.died)


@dataclass
class Timeline:
    """All blocks of a trace on one device.

    Args:
        blocks: in the order of their births.
        events: how many allocations and releases there were.
        steps: the event with which each step began.
        device: where, such as `cpu` or `cuda:0`.
    """

    blocks: list[Block]
    events: int
    steps: list[int] = field(default_factory=list)
    device: str = "cpu"

    def allocated(self) -> list[int]:
        """Bytes allocated right after each event, from event 0 on."""
        change = [0] * (self.events + 1)
        for block in self.blocks:
            change[block.born] += block.rounded
            if block.died is not None:
                change[block.died] -= block.rounded
        return list(accumulate(change))

    def peak(self, start: int = 0, stop: int | None = None) -> tuple[int, int]:
        """Most bytes allocated, and the first event at which they are.

        Args:
            start: the first event to look at.
            stop: the event to stop before, None for all.
        """
        allocated = self.allocated()[start:stop]
        most = max(allocated)
        return most, start + allocated.index(most)

    def alive(self, event: int) -> Iterator[Block]:
        """Blocks that are there right after an event."""
        return (block for block in self.blocks if block.alive_at(event))

    def held_by(self, event: int, key: Callable[[Block], str]) -> Counter[str]:
        """Bytes right after an event, by anything that is known of a block.

        >>> blocks = [Block(400, 512, 1, category="input"), Block(100, 512, 2, 3)]
        >>> Timeline(blocks, 3).held_by(2, lambda block: block.category)
        Counter({'input': 512, 'temporary': 512})
        """
        held = Counter()
        for block in self.alive(event):
            held[key(block)] += block.rounded
        return held


def by_category(block: Block) -> str:
    """A key of `Timeline.held_by`."""
    return block.category


def by_module(depth: int) -> Callable[[Block], str]:
    """A key of `Timeline.held_by`: paths of modules, cut after some of their parts.

    >>> by_module(2)(Block(1, 512, 0, module="blocks.0.time.norm"))
    'blocks.0'
    """
    return lambda block: ".".join(block.module.split(".")[:depth]) or "(outside)"


def by_line(block: Block) -> str:
    """A key of `Timeline.held_by`: the innermost line."""
    return str(block.frames[0]) if block.frames else "(unknown)"


def top(held: Counter[str], count: int) -> Sequence[tuple[str, int]]:
    """The largest, and the sum of the others under the name `others`."""
    largest = held.most_common(count)
    rest = sum(held.values()) - sum(size for _, size in largest)
    return [*largest, ("others", rest)] if rest else largest


@dataclass(frozen=True)
class Fullest:
    """A moment of a timeline.

    Args:
        timeline: all blocks.
        event: the fullest moment.
        peak: bytes allocated then, with all that an allocator adds: a prediction's may be a little
            above the sum of its blocks, because large blocks are not split for less than 1 MiB.
    """

    timeline: Timeline
    event: int
    peak: int

    def by_category(self) -> dict[str, int]:
        """Bytes at the peak, by what they are: activations, parameters, …"""
        return dict(self.timeline.held_by(self.event, by_category).most_common())

    def by_module(self, depth: int = 1, count: int = 10) -> dict[str, int]:
        """Bytes at the peak, by who made them.

        Args:
            depth: parts of the path of a module that count.
            count: rows; the others are added up.
        """
        return dict(top(self.timeline.held_by(self.event, by_module(depth)), count))

    def by_line(self, count: int = 10) -> dict[str, int]:
        """Bytes at the peak, by the line of Python that asked for them."""
        return dict(top(self.timeline.held_by(self.event, by_line), count))

    def table(self) -> str:
        """What is there at the peak, a category per line."""
        rows = self.by_category().items()
        return "\n".join(f"  {format_bytes(size):>12}  {name}" for name, size in rows)
