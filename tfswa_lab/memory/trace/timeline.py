"""Blocks of memory, each with a birth, a death and an origin, and the timeline of all of them.

Time is counted in events: every allocation and every release is one. Sizes are in bytes.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from tfswa_lab.memory.display import Shown, page
from tfswa_lab.memory.sizes import format_bytes
from tfswa_lab.memory.trace.stacks import Frame, in_short, user_frame

CATEGORIES = (
    "parameter",
    "buffer",
    "gradient",
    "optimizer state",
    "input",
    "activation",
    "temporary",
)


@dataclass(eq=False, repr=False)
class Block(Shown):
    """One storage, from its allocation to its release.

    Args:
        size: bytes requested.
        rounded: bytes that the allocator gives.
        born: the event of its allocation; 0 for blocks that are older than the trace.
        died: the event of its release, None if it was alive at the end.
        category: one of `CATEGORIES`.
        module: path of the module that made it or that it belongs to, such as `blocks.0.time`;
            empty outside of modules.
        op: the operator that made it, such as `aten.mm.default`; empty if it is older.
        phase: `forward`, `backward`, `recompute` (of checkpointed activations), `optimizer` or
            `outside`.
        step: the step in which it was allocated, counted from 0; -1 before the first.
        frames: the lines that allocated it, innermost first. In the backward pass, the lines of
            the forward operation whose gradient is computed.
        shape: of the tensor that it was made for.
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

    @property
    def brief(self) -> str:
        """Bytes, category, operator and line."""
        operator = f" by {self.op}" if self.op else ""
        where = f" at {in_short(user_frame(self.frames))}"
        return f"{format_bytes(self.size)} {self.category}{operator}{where}"

    def alive_at(self, event: int) -> bool:
        """Whether it is allocated right after an event."""
        return self.born <= event and (self.died is None or event < self.died)


@dataclass(repr=False)
class Timeline(Shown):
    """All blocks of a trace on one device.

    Args:
        blocks: in the order of their births.
        events: the number of allocations and releases.
        steps: the event with which each step began.
        device: where, such as `cpu` or `cuda:0`.
    """

    blocks: list[Block]
    events: int
    steps: list[int] = field(default_factory=list)
    device: str = "cpu"

    @property
    def brief(self) -> str:
        """How much there is of it, and the peak."""
        peak = format_bytes(max(self.allocated()))
        return f"{len(self.blocks)} blocks, {self.events} events, peak {peak} on {self.device}"

    def _repr_html_(self) -> str:
        return page(self.brief, self.peak().tables, {})

    def allocated(self) -> list[int]:
        """Bytes allocated right after each event, from event 0 on."""
        change = [0] * (self.events + 1)
        for block in self.blocks:
            change[block.born] += block.rounded
            if block.died is not None:
                change[block.died] -= block.rounded
        return list(accumulate(change))

    def peak(self, start: int = 0, stop: int | None = None) -> Peak:
        """The first event at which the most bytes are allocated.

        Args:
            start: the first event to look at.
            stop: the event to stop before, None for all.
        """
        allocated = self.allocated()[start:stop]
        most = max(allocated)
        return Peak(self, start + allocated.index(most), most)

    def alive(self, event: int) -> Iterator[Block]:
        """The blocks that are allocated right after an event."""
        return (block for block in self.blocks if block.alive_at(event))

    def held_by(self, event: int, key: Callable[[Block], str]) -> Counter[str]:
        """Bytes right after an event, grouped by a property of the blocks.

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
    """A key of `Timeline.held_by`: module paths, cut after `depth` parts.

    >>> by_module(2)(Block(1, 512, 0, module="blocks.0.time.norm"))
    'blocks.0'
    """
    return lambda block: ".".join(block.module.split(".")[:depth]) or "(outside)"


def by_line(block: Block) -> str:
    """A key of `Timeline.held_by`: the user's line."""
    return str(user_frame(block.frames) or "(unknown)")


def top(held: Counter[str], count: int) -> Sequence[tuple[str, int]]:
    """The largest groups, and the sum of the rest as `others`."""
    largest = held.most_common(count)
    rest = sum(held.values()) - sum(size for _, size in largest)
    return [*largest, ("others", rest)] if rest else largest


@dataclass(frozen=True, repr=False)
class Moment(Shown):
    """Who holds the memory right after an event.

    Args:
        timeline: all blocks.
        event: when.
    """

    timeline: Timeline
    event: int

    @property
    def brief(self) -> str:
        """Bytes, and when."""
        held = sum(self.by_category().values())
        return f"{format_bytes(held)} on {self.timeline.device} after event {self.event}"

    def __str__(self) -> str:
        return f"{self.brief}\n{self.table()}"

    def by_category(self) -> dict[str, int]:
        """Bytes by category: activations, parameters, …"""
        return dict(self.timeline.held_by(self.event, by_category).most_common())

    def by_module(self, depth: int = 1, count: int = 10) -> dict[str, int]:
        """Bytes by the module that made them.

        Args:
            depth: parts of a module's path that make a group.
            count: rows; the rest is added up as `others`.
        """
        return dict(top(self.timeline.held_by(self.event, by_module(depth)), count))

    def by_line(self, count: int = 10) -> dict[str, int]:
        """Bytes by the line of Python that allocated them."""
        return dict(top(self.timeline.held_by(self.event, by_line), count))

    def table(self) -> str:
        """Bytes by category, one line each."""
        rows = self.by_category().items()
        return "\n".join(f"  {format_bytes(size):>12}  {name}" for name, size in rows)

    def _repr_html_(self) -> str:
        return page(self.brief, self.tables, {})

    @property
    def tables(self) -> dict[str, dict[str, int]]:
        """Bytes by name, by title."""
        return {
            "by category": self.by_category(),
            "by module": self.by_module(2, 8),
            "by line": self.by_line(8),
        }


@dataclass(frozen=True, repr=False)
class Peak(Moment):
    """The moment at which the most memory is allocated.

    Args:
        allocated: bytes at that moment.
    """

    allocated: int
