"""What is alive at the end of each step, told from a trace.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from tfswa_lab.memory.gauges import DeviceSignals
from tfswa_lab.memory.leaks.trend import grows, slope, slows
from tfswa_lab.memory.trace.stacks import Frame, in_short, user_frame
from tfswa_lab.memory.trace.timeline import Block, Timeline, top


@dataclass(frozen=True)
class Boundary:
    """The end of a step.

    Args:
        before: the last event of the step.
        after: the last event once the collector of cycles had been called.
        hooks: as `hook_counts` counts them, after every second step.
        device: as `device_signals` reads them.
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
        event = self._timeline.peak().event
        held = self._timeline.held_by(event, lambda block: in_short(user_frame(block.frames)))
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
            sizes[user_frame(block.frames)] += block.rounded
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


SETTLED = 2  # steps after which a block is no longer that of the current or the previous one
JOINING = ("aten.cat", "aten.stack", "aten.constant_pad")  # operators that make longer ones


@dataclass
class Site:
    """All blocks that one line makes with one operator, and that outlive a step.

    Args:
        blocks: in the order of their births.
        levels: bytes after each step in those that are older than the previous step.
        totals: bytes after each step in all of them.
        births: steps that made those which are alive at the end, each once.
    """

    blocks: list[Block]
    levels: list[int]
    totals: list[int]
    births: list[int]

    @property
    def line(self) -> Frame | None:
        """That makes them, None if it is not known."""
        return user_frame(self.blocks[0].frames)

    @property
    def alive(self) -> list[Block]:
        """Those that are there at the end."""
        return [block for block in self.blocks if block.died is None]

    @property
    def joins(self) -> bool:
        """Whether each block replaces a shorter one that it was made from."""
        return self.blocks[-1].op.startswith(JOINING) and grows(self.totals)

    @property
    def rises(self) -> bool:
        """Whether more and more bytes are held."""
        stairs = len(self.births) > 2 and all(a <= b for a, b in pairwise(self.levels))
        return self.joins or stairs or grows(self.levels)

    @property
    def ends(self) -> bool:
        """Whether the rise comes to its end."""
        return slows(self.totals) or (slows(self.levels) and not self.joins)

    @property
    def per_step(self) -> float:
        """Bytes by which it grows."""
        return slope(self.totals if self.joins else self.levels)

    @property
    def collects(self) -> bool:
        """Whether blocks of several steps are alive, and not of the last ones only."""
        return len(self.births) > 1 and self.births[-1] - self.births[0] > SETTLED

    @property
    def lasts(self) -> bool:
        """Whether something was added after the first step, and stayed for the last third."""
        late = 2 * len(self.totals) // 3
        stays = min(self.totals[late:]) > self.totals[0]
        return stays and any(0 < birth < late for birth in self.births)


def replaces(site: Site, others: Iterable[Site]) -> bool:
    """Whether its blocks only take the places of those that another line made, of the same size.

    A pool is filled by one line and refreshed by another.
    """
    sizes = {block.size for block in site.blocks}
    falling = [each for each in others if each is not site and max(each.totals) > each.totals[-1]]
    alike = [each.totals for each in falling if sizes & {block.size for block in each.blocks}]
    together = [sum(totals) for totals in zip(site.totals, *alike, strict=True)]
    return bool(alike) and (not grows(together) or slows(together))


def sites(census: Census) -> list[Site]:
    """All lines whose blocks outlive a step, those that grow most first."""
    groups: dict[tuple, list[Block]] = {}
    for block in census.blocks:
        groups.setdefault((user_frame(block.frames), block.op, block.phase), []).append(block)
    found = [_site(blocks, census) for blocks in groups.values()]
    return sorted(found, key=lambda site: -site.per_step)


def _site(blocks: list[Block], census: Census) -> Site:
    births = sorted({census.birth(block) for block in blocks if block.died is None})
    return Site(blocks, census.levels(blocks, SETTLED), census.levels(blocks), births)


def is_open(census: Census) -> bool:
    """Whether more steps would tell more: something may be growing, or has just begun to."""
    late = census.steps // 2
    for site in sites(census):
        fresh = site.births and late <= site.births[0] <= census.steps - 1 - SETTLED
        if site.rises or site.collects or fresh:
            return True
    return False
