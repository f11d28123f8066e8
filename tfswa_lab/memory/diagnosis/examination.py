"""From a census of steps to findings: who makes and who holds what grows.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any
from weakref import ref

from torch import UntypedStorage

from tfswa_lab.memory.diagnosis.census import Census
from tfswa_lab.memory.diagnosis.culprits import Culprit, culprits_of
from tfswa_lab.memory.diagnosis.findings import Findings, Hooks
from tfswa_lab.memory.diagnosis.growth import Site, replaces, sites
from tfswa_lab.memory.diagnosis.heap_objects import of_types
from tfswa_lab.memory.diagnosis.holders import Holders
from tfswa_lab.memory.diagnosis.hook_counts import GLOBAL, line_of_last
from tfswa_lab.memory.diagnosis.traced_steps import OWNERS
from tfswa_lab.memory.tracing.blocks import Block

LINES = 6  # of each kind, whose holders are looked for


class Examination:
    """Looks for the holders of what a census tells of.

    Args:
        census: of the steps.
        storages: of all blocks that were alive at its end.
        named: objects with names, such as the step and the model.

    Notebook: 06_leak_diagnosis
    """

    def __init__(
        self, census: Census, storages: dict[Block, ref[UntypedStorage]], named: dict[str, Any]
    ):
        self.census, self._storages, self._named = census, storages, named
        every = sites(census)
        self._rising = [site for site in every if _rises(site, every)]
        rising = set(map(id, self._rising))
        self._largest = sorted(every, key=lambda site: -site.totals[-1])
        self._resting = [site for site in self._largest if id(site) not in rising]

    def findings(self, failed: bool) -> Findings:
        """All that the census tells.

        Args:
            failed: whether an exception is kept, which may hold what the last step had.
        """
        census = self.census
        return Findings(
            steps=census.steps,
            settled=census.settled,
            peaks=census.peaks,
            rising=self.rising(),
            ending=self.ending(),
            lasting=self.lasting(),
            newest=self.newest() if failed else (),
            hooks=self.hooks(),
            freed=census.freed_by_gc(),
            device=[end.device for end in census.boundaries if end.device],
            at_peak=census.at_peak(),
        )

    def rising(self) -> list[Culprit]:
        """Lines whose blocks become ever more, those that grow most first."""
        return self._culprits(self._rising)

    def ending(self) -> list[Culprit]:
        """Lines of which some blocks are kept for several steps, and no longer more and more."""
        return self._culprits(site for site in self._resting if site.collects)

    def lasting(self) -> list[Culprit]:
        """Lines that added something after the first step, once, and it stayed."""
        return self._culprits(s for s in self._resting if s.lasts and not s.collects)

    def newest(self) -> list[Culprit]:
        """Lines whose blocks of the last step are alive."""
        last = self.census.steps - 1
        return self._culprits(site for site in self._largest if last in site.births)

    def hooks(self) -> list[Hooks]:
        """Lists of hooks that become longer in both halves of the run."""
        counts = [end.hooks for end in self.census.boundaries if end.hooks is not None]
        if len(counts) < 3:
            return []
        early, middle, late = (counts[at] for at in (0, len(counts) // 2, -1))
        found = []
        for key, count in late.items():
            if early.get(key, 0) < middle.get(key, 0) < count:
                per_step = (count - early.get(key, 0)) / (2 * len(counts) - 2)
                found.append(self._hooks_of(*key, count, per_step))
        return found

    def _hooks_of(self, identity: int, name: str, count: int, per_step: float) -> Hooks:
        of_torch = {id(module): module for module in GLOBAL}
        owner = of_torch.get(identity)
        spelled = "torch"
        if owner is None:
            owner = next((each for each in of_types(OWNERS) if id(each) == identity), None)
            spelled = self.spell(owner)[0]
        return Hooks(name, spelled, count, per_step, line_of_last(owner, name))

    def spell(self, thing: Any) -> tuple[str, str]:
        """What a program would write for an object, and where the name is found."""
        return self._holders.name(thing)

    def _culprits(self, chosen: Iterable[Site]) -> list[Culprit]:
        few = list(chosen)[:LINES]
        return culprits_of(few, self.census, self._holders, self._storages) if few else []

    def close(self) -> None:
        """Let go of all objects that were looked at."""
        if "_holders" in vars(self):
            self._holders.paths.close()

    @cached_property
    def _holders(self) -> Holders:
        return Holders(self._named)


def _rises(site: Site, others: list[Site]) -> bool:
    return site.per_step > 0 and site.rises and not site.ends and not replaces(site, others)
