"""Which blocks pile up from step to step, by the line that makes them.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from tfswa_lab.memory.diagnosis.census import Census
from tfswa_lab.memory.diagnosis.own_lines import line_of
from tfswa_lab.memory.diagnosis.trend import grows, slope, slows
from tfswa_lab.memory.tracing.blocks import Block, Frame

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

    Notebook: 06_leak_diagnosis
    """

    blocks: list[Block]
    levels: list[int]
    totals: list[int]
    births: list[int]

    @property
    def line(self) -> Frame | None:
        """That makes them, None if it is not known."""
        return line_of(self.blocks[0].frames)

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

    Notebook: 06_leak_diagnosis
    """
    sizes = {block.size for block in site.blocks}
    falling = [each for each in others if each is not site and max(each.totals) > each.totals[-1]]
    alike = [each.totals for each in falling if sizes & {block.size for block in each.blocks}]
    together = [sum(totals) for totals in zip(site.totals, *alike, strict=True)]
    return bool(alike) and (not grows(together) or slows(together))


def sites(census: Census) -> list[Site]:
    """All lines whose blocks outlive a step, those that grow most first.

    Notebook: 06_leak_diagnosis
    """
    groups: dict[tuple, list[Block]] = {}
    for block in census.blocks:
        groups.setdefault((line_of(block.frames), block.op, block.phase), []).append(block)
    found = [_site(blocks, census) for blocks in groups.values()]
    return sorted(found, key=lambda site: -site.per_step)


def _site(blocks: list[Block], census: Census) -> Site:
    births = sorted({census.birth(block) for block in blocks if block.died is None})
    return Site(blocks, census.levels(blocks, SETTLED), census.levels(blocks), births)


def is_open(census: Census) -> bool:
    """Whether more steps would tell more: something may be growing, or has just begun to.

    Notebook: 06_leak_diagnosis
    """
    late = census.steps // 2
    for site in sites(census):
        fresh = site.births and late <= site.births[0] <= census.steps - 1 - SETTLED
        if site.rises or site.collects or fresh:
            return True
    return False
