"""What is alive at the end of each step, told from a trace.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from tfswa_lab.memory.diagnosis.device_signals import DeviceSignals
from tfswa_lab.memory.diagnosis.own_lines import in_short, line_of
from tfswa_lab.memory.tracing.blocks import Block, Frame, Timeline, top


@dataclass(frozen=True)
class Boundary:
    """The end of a step.

    Args:
        before: the last event of the step.
        after: the last event once the collector of cycles had been called.
        hooks: as `hook_counts` counts them, after every second step.
        device: as `device_signals` reads them.

    Notebook: 06_leak_diagnosis
    """

    before: int
    after: int
    hooks: dict[tuple[int, str], int] | None = None
    device: DeviceSignals | None = None


class Census:
    """Levels and lives of blocks, by steps.

    Args:
        timelines: of each device; the first one's levels and peaks are given.
        start: the event before the first step.
        boundaries: the end of each step.

    Attributes:
        settled: bytes allocated after each step, once cycles were freed.
        peaks: most bytes allocated within each step, the one that failed included.
        blocks: those of all devices that were born in a step and alive at the end of one.

    Notebook: 06_leak_diagnosis
    """

    def __init__(self, timelines: list[Timeline], start: int, boundaries: list[Boundary]):
        self.boundaries = boundaries
        self._ends = [end.after for end in boundaries]
        self._timeline = timelines[0] if timelines else Timeline([], start)
        levels = self._timeline.allocated()
        self.settled = [levels[end.after] for end in boundaries] or [levels[start]]
        limits = pairwise([start, *self._ends, len(levels)])
        self.peaks = [max(levels[begin : end + 1]) for begin, end in limits]
        self.blocks = [
            block
            for timeline in timelines
            for block in timeline.blocks
            if block.born > start and self._crosses(block)
        ]

    @property
    def steps(self) -> int:
        """How many there were."""
        return len(self.boundaries)

    def birth(self, block: Block) -> int:
        """The step that it was born in."""
        return bisect_left(self._ends, block.born)

    def death(self, block: Block) -> int:
        """The first step at whose end it was gone; `steps` if it is alive."""
        return self.steps if block.died is None else bisect_left(self._ends, block.died)

    def at_peak(self, count: int = 2) -> list[tuple[str, int]]:
        """The lines that hold most bytes when most are allocated, and how many."""
        _, event = self._timeline.peak()
        held = self._timeline.held_by(event, lambda block: in_short(line_of(block.frames)))
        return [(line, size) for line, size in top(held, count) if line != "others"]

    def freed_by_gc(self) -> list[int]:
        """Bytes that nothing but the collector of cycles freed, after each step."""
        return [sum(b.rounded for b in self.garbage(step)) for step in range(self.steps)]

    def garbage(self, step: int) -> list[Block]:
        """Blocks that nothing but the collector of cycles freed, after a step."""
        end = self.boundaries[step]
        return [each for each in self.blocks if end.before < (each.died or 0) <= end.after]

    def line_of_garbage(self) -> Frame | None:
        """The line that made most of it after the last step that left any, if it is known."""
        found = next(filter(None, (self.garbage(at) for at in reversed(range(self.steps)))), [])
        sizes = Counter()
        for block in found:
            sizes[line_of(block.frames)] += block.rounded
        return max(sizes, key=sizes.get, default=None)

    def levels(self, blocks: list[Block], age: int = 0) -> list[int]:
        """Bytes after each step in some blocks that are at least `age` steps old by then."""
        change = [0] * (self.steps + 1)
        for block in blocks:
            first, end = self.birth(block) + age, self.death(block)
            if first < end:
                change[first] += block.rounded
                change[end] -= block.rounded
        levels, level = [], 0
        for each in change[:-1]:
            level += each
            levels.append(level)
        return levels

    def _crosses(self, block: Block) -> bool:
        """Whether it outlived the code of the step that it was born in."""
        birth = self.birth(block)
        if birth >= self.steps:
            return False
        return block.died is None or block.died > self.boundaries[birth].before
