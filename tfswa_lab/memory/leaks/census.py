"""How much memory is alive at the end of each step, line by line, and whether it goes on growing.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from tfswa_lab.memory.gauges import DeviceSignals
from tfswa_lab.memory.trace.stacks import Frame, in_short, user_frame
from tfswa_lab.memory.trace.timeline import Block, Timeline, top


@dataclass(frozen=True)
class Boundary:
    """The end of a step.

    Args:
        before: the last event of the step.
        after: the last event of the garbage collection that follows it.
        hooks: as `hook_counts` counts them, after every second step.
        device: as `device_signals` reads them.
    """

    before: int
    after: int
    hooks: dict[tuple[int, str], int] | None = None
    device: DeviceSignals | None = None


class Census:
    """Memory after each step, and the steps in which each block was allocated and freed.

    Args:
        timelines: of each device; `settled` and `peaks` are those of the first.
        start: the event before the first step.
        boundaries: the end of each step.

    Attributes:
        settled: bytes allocated after each step, once garbage was collected.
        peaks: most bytes allocated within each step, the one that failed included.
        blocks: blocks of all devices that were allocated in a step and alive at its end.
    """

    def __init__(self, timelines: list[Timeline], start: int, boundaries: list[Boundary]):
        self.boundaries = boundaries
        self._ends = [end.after for end in boundaries]
        self._timeline = timelines[0] if timelines else Timeline([], start)
        levels = self._timeline.allocated()
        self.settled = [levels[end.after] for end in boundaries] or [levels[start]]
        limits = pairwise([start, *self._ends, len(levels)])
        self.peaks = [max(levels[begin : end + 1]) for begin, end in limits]
        blocks = (block for timeline in timelines for block in timeline.blocks)
        self.blocks = [block for block in blocks if block.born > start and self._outlives(block)]

    @property
    def steps(self) -> int:
        """The number of steps."""
        return len(self.boundaries)

    def birth(self, block: Block) -> int:
        """The step in which a block was allocated."""
        return bisect_left(self._ends, block.born)

    def death(self, block: Block) -> int:
        """The first step at whose end a block was gone; `steps` if it is alive."""
        return self.steps if block.died is None else bisect_left(self._ends, block.died)

    def at_peak(self, count: int = 2) -> list[tuple[str, int]]:
        """The lines that hold most bytes at the highest peak, and these bytes."""
        event = self._timeline.peak().event
        held = self._timeline.held_by(event, lambda block: in_short(user_frame(block.frames)))
        return [(line, size) for line, size in top(held, count) if line != "others"]

    def freed_by_gc(self) -> list[int]:
        """Bytes that only the garbage collector freed, after each step."""
        return [sum(b.rounded for b in self._garbage(step)) for step in range(self.steps)]

    def line_of_garbage(self) -> Frame | None:
        """The line that made most of the last garbage, if it is known."""
        found = next(filter(None, map(self._garbage, reversed(range(self.steps)))), [])
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
        return list(accumulate(change[:-1]))

    def _garbage(self, step: int) -> list[Block]:
        """Blocks that only the garbage collector freed, after a step."""
        end = self.boundaries[step]
        return [each for each in self.blocks if end.before < (each.died or 0) <= end.after]

    def _outlives(self, block: Block) -> bool:
        """Whether a block was alive when the code of its step ended."""
        birth = self.birth(block)
        if birth >= self.steps:
            return False
        return block.died is None or block.died > self.boundaries[birth].before


SETTLED = 2  # steps after which a block belongs neither to the current step nor to the one before
JOINING = ("aten.cat", "aten.stack", "aten.constant_pad")  # operators that make longer tensors


@dataclass(eq=False)
class Site:
    """All blocks that one line allocates with one operator, and that outlive a step.

    Args:
        blocks: in the order of allocation.
        levels: bytes after each step in blocks that are older than the step before.
        totals: bytes after each step in all of them.
        births: the steps that made the blocks which are alive at the end, each step once.
    """

    blocks: list[Block]
    levels: list[int]
    totals: list[int]
    births: list[int]

    @property
    def line(self) -> Frame | None:
        """The line, None if it is not known."""
        return user_frame(self.blocks[0].frames)

    @property
    def alive(self) -> list[Block]:
        """The blocks that are alive at the end."""
        return [block for block in self.blocks if block.died is None]

    @property
    def joins(self) -> bool:
        """Whether each block replaces a shorter one that it was made from."""
        return self.blocks[-1].op.startswith(JOINING) and grows(self.totals)

    @property
    def rises(self) -> bool:
        """Whether more and more bytes are held."""
        return self.joins or grows(self.levels)

    @property
    def ends(self) -> bool:
        """Whether the growth ends."""
        return slows(self._deciding_levels)

    @property
    def per_step(self) -> float:
        """Growth in bytes per step."""
        return slope(self._deciding_levels)

    @property
    def _deciding_levels(self) -> list[int]:
        return self.totals if self.joins else self.levels

    @property
    def collects(self) -> bool:
        """Whether blocks of several steps are alive, not only those of the last steps."""
        return len(self.births) > 1 and self.births[-1] - self.births[0] > SETTLED

    @property
    def lasts(self) -> bool:
        """Whether something was added after the first step, and stayed for the last third."""
        late = 2 * len(self.totals) // 3
        stays = min(self.totals[late:]) > self.totals[0]
        return stays and any(0 < birth < late for birth in self.births)


def replaces(site: Site, others: Iterable[Site]) -> bool:
    """Whether the blocks of a line only take the places of blocks that another line made.

    One line fills a pool, and another one refreshes it with blocks of the same size.
    """
    sizes = {block.size for block in site.blocks}
    falling = [each for each in others if each is not site and max(each.totals) > each.totals[-1]]
    alike = [each.totals for each in falling if sizes & {block.size for block in each.blocks}]
    together = [sum(totals) for totals in zip(site.totals, *alike, strict=True)]
    return bool(alike) and (not grows(together) or slows(together))


def sites(census: Census) -> list[Site]:
    """All lines whose blocks outlive a step, fastest growth first."""
    groups: dict[tuple, list[Block]] = {}
    for block in census.blocks:
        groups.setdefault((user_frame(block.frames), block.op, block.phase), []).append(block)
    found = [_site(blocks, census) for blocks in groups.values()]
    return sorted(found, key=lambda site: -site.per_step)


def _site(blocks: list[Block], census: Census) -> Site:
    births = sorted({census.birth(block) for block in blocks if block.died is None})
    return Site(blocks, census.levels(blocks, SETTLED), census.levels(blocks), births)


def is_open(census: Census) -> bool:
    """Whether more steps are needed: something may be growing, or has just begun to."""
    late = census.steps // 2
    for site in sites(census):
        fresh = site.births and late <= site.births[0] <= census.steps - 1 - SETTLED
        if site.rises or site.collects or fresh:
            return True
    return False


# Levels, one after each step, are noisy (lengths vary), rise in stairs (validation every n-th
# step), fall back (lists are emptied) or stop growing (caches). So the rules below compare halves
# and quarters of a run, not neighbours.


def grows(levels: Sequence[float]) -> bool:
    """Whether all levels of the last quarter are above all of the second.

    >>> grows(range(12)), grows([3, 9, 5, 7, 4, 9, 6, 5, 8, 4, 7, 6])
    (True, False)
    """
    count = len(levels)
    early, late = levels[count // 4 : count // 2], levels[3 * count // 4 :]
    return bool(early) and min(late) > max(early)


def slows(levels: Sequence[float]) -> bool:
    """Whether growth ends: it halves and is not steady, or it pauses for long.

    >>> slows(range(12)), slows([0, 4, 6, 7, 8, 8, 8, 9, 9, 9, 9, 9])
    (False, True)
    >>> slows([0, 8, 16, 24, 32, 40, 48, 49, 50, 51, 52, 53])  # it goes on
    False
    """
    late, later = levels[len(levels) // 2 :], levels[3 * len(levels) // 4 :]
    if levels[-1] - late[0] < 0.5 * (late[0] - levels[0]):
        rising = sum(after > before for before, after in pairwise(late))
        steady = rising > 0.75 * (len(late) - 1)
        return not (steady and later[-1] - later[0] > 0.5 * (later[0] - late[0]))
    rises = [step for step, (before, after) in enumerate(pairwise(levels), 1) if after > before]
    if len(rises) < 2:
        return False
    longest = max(after - before for before, after in pairwise(rises))
    return len(levels) - 1 - rises[-1] > max(4, 2 * longest)


def slope(levels: Sequence[float]) -> float:
    """Growth per step, from the end of the first quarter to the end.

    >>> slope([5, 5, 5, 7, 9, 11, 13, 15])
    2.0
    """
    start = len(levels) // 4
    return (levels[-1] - levels[start]) / max(1, len(levels) - 1 - start)


def fills_up(births: Sequence[int], steps: int) -> bool:
    """Whether new things appear less and less often, as they do when keys come again.

    Two explanations are compared by their likelihood: each step brings something new with the
    same chance, or it draws from a fixed number of keys, of which fewer and fewer are new.

    Args:
        births: steps in which something new appeared.
        steps: the number of steps.

    >>> fills_up([0, 1, 2, 3, 5, 8, 9, 15], 20), fills_up([0, 3, 6, 9], 12)
    (True, False)
    """
    if len({after - before for before, after in pairwise(births)}) < 2:  # at regular intervals
        return False
    new = set(births)
    news = [step in new for step in range(births[0], steps)]
    before = [0, *accumulate(news)][:-1]
    count = len(births)
    same = [count / len(news)] * len(news)
    fewer = ([1 - seen / keys for seen in before] for keys in range(count, 8 * count + 1))
    return max(_likelihood(each, news) for each in fewer) > _likelihood(same, news)


def _likelihood(chances: Sequence[float], news: Sequence[bool]) -> float:
    """The logarithm of the probability that all steps went as they did."""
    pairs = zip(chances, news, strict=True)
    return sum(math.log(max(chance if new else 1 - chance, 1e-9)) for chance, new in pairs)
