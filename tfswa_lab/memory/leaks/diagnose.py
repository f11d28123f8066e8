"""Does a step lose memory, which line makes what is lost, and who holds it?

Steps are run under a trace first. If tensors do not grow, some more are run without it, to see
whether the host's memory does.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from statistics import median
from types import ModuleType
from typing import Any
from weakref import ref

from torch import UntypedStorage, nn
from torch.optim import Optimizer

from tfswa_lab.memory.leaks.census import Census, Site, is_open, replaces, sites
from tfswa_lab.memory.leaks.cycles import circle_of_step
from tfswa_lab.memory.leaks.findings import Findings, Hooks, HostGrowth
from tfswa_lab.memory.leaks.holders import Holders
from tfswa_lab.memory.leaks.hooks import GLOBAL, line_of_last
from tfswa_lab.memory.leaks.host_steps import HostSteps
from tfswa_lab.memory.leaks.referrers import of_types
from tfswa_lab.memory.leaks.suspects import Culprit, culprits_of
from tfswa_lab.memory.leaks.traced_steps import OWNERS, Numbered, TracedSteps
from tfswa_lab.memory.leaks.trend import slope
from tfswa_lab.memory.leaks.verdicts import Diagnosis, bounded, judge
from tfswa_lab.memory.sizes import GIB
from tfswa_lab.memory.trace.timeline import Block

LINES = 6  # of each kind, whose holders are looked for


class Examination:
    """Looks for the holders of what a census tells of.

    Args:
        census: of the steps.
        storages: of all blocks that were alive at its end.
        named: objects with names, such as the step and the model.
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


FEWEST = 8  # steps that tell a leak from a warm-up
ENOUGH = GIB  # that may be lost to make sure that it is lost


def diagnose(
    step: Callable[..., Any],
    steps: int = 12,
    *,
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    longest: int = 40,
    limit: int | None = None,
) -> Diagnosis:
    """Run a step again and again, and tell whether memory is lost, by which line, and to whom.

    The steps are real: they train, draw random numbers and use up data. What they return is let go
    at once, and the collector of cycles rests while one runs. What happens less often than every
    few steps needs a `longest` that spans it several times: a cache that has not met all its keys
    by then grows as a leak does. On CUDA, the statistics of peaks are reset in each step.

    Args:
        step: anything that can be called, such as one training step; if it needs an argument, it
            gets the number of the step.
        steps: how many to run under a trace, and again without it.
        model: names its parts.
        optimizer: names its state.
        longest: how many steps to run if something may be growing, under the trace and without it.
            Finding the holder takes up to two dozen more.
        limit: bytes that are to be enough for a step.

    Returns:
        Verdict, cause, evidence and advice.

    Raises:
        ValueError: numbers make no sense, or `step` only makes a generator or coroutine.
        TypeError: `step` is nothing that can be called, `model` no module, `optimizer` none.
        Exception: whatever one of the first `steps` raises, unless it is want of memory. The steps
            after these may end early, such as at the end of the data.

    >>> import torch
    >>> history = []
    >>> diagnosis = diagnose(lambda: history.append(torch.zeros(1024)))
    >>> diagnosis.verdict, diagnosis.growth_per_step
    ('leak of tensors', 4096.0)
    """
    _check(steps, longest, limit, model, optimizer)
    call = Numbered(step)
    traced = TracedSteps(call, model)
    with traced.running():
        _run(traced, steps, longest)
        census, storages = traced.census(), traced.references()
        failed, owners = traced.has_tracebacks(), traced.owners()
    with closing(Examination(census, storages, _named(step, model, optimizer))) as examined:
        findings = replace(
            examined.findings(failed),
            limit=limit,
            ended=traced.ended,
        )
        # A cache of tensors that still grows makes the process grow, too.
        kinds = ("nodes", "python") if findings.rising else ("nodes", "python", "process")
        host = HostSteps(call, owners, kinds)
        return judge(_completed(findings, host, examined, traced, steps, longest))


def _check(steps: int, longest: int, limit: int | None, model: Any, optimizer: Any) -> None:
    if not (isinstance(steps, int) and isinstance(longest, int) and FEWEST <= steps <= longest):
        raise ValueError(
            f"steps={steps!r}, longest={longest!r}; expected {FEWEST} <= steps <= longest: fewer "
            "do not tell a leak from a warm-up, and for more raise longest"
        )
    if limit is not None and not (isinstance(limit, int) and limit > 0):
        raise ValueError(f"limit={limit!r}; expected bytes, such as 8 * 2**30, or None")
    for name, thing, kind in (("model", model, nn.Module), ("optimizer", optimizer, Optimizer)):
        if thing is not None and not isinstance(thing, kind):
            raise TypeError(f"{name}={thing!r}; expected a torch {kind.__name__}, or None")


def _named(step: Callable, model: nn.Module | None, optimizer: Optimizer | None) -> dict[str, Any]:
    """What holders can be called by, besides the names of globals and classes."""
    things = {"model": model, "optimizer": optimizer, "self": getattr(step, "__self__", None)}
    return {"step": step} | {name: thing for name, thing in things.items() if thing is not None}


def _run(traced: TracedSteps, steps: int, longest: int) -> None:
    """Run some steps, and more if these do not tell."""
    traced.run(steps)
    census = traced.census()
    if not traced.ended.words and is_open(census):
        traced.run(_enough(census, longest), may_fail=True)


def _enough(census: Census, longest: int) -> int:
    """How many steps to run, so that what is lost on the way is not too much."""
    growth = max(1.0, (census.settled[-1] - census.settled[0]) / census.steps)
    return min(longest, census.steps + int(ENOUGH / growth))


def _completed(
    findings: Findings,
    host: HostSteps,
    examined: Examination,
    traced: TracedSteps,
    steps: int,
    longest: int,
) -> Findings:
    """With what some more steps tell, if tensors do not grow."""
    leaks = any(not bounded(each, findings.steps) for each in findings.rising)
    if findings.hooks or findings.ended.words or leaks:
        return findings
    if sum(map(bool, findings.freed[2:])) > 1:
        line = examined.census.line_of_garbage()
        return replace(findings, circle=circle_of_step(host.call), in_circle=line)
    host.run(steps, longest)
    return replace(
        findings,
        host=_host_growth(host, examined, traced),
        kernels=host.kernels,
        ended=host.ended,
        untraced=host.call.count - findings.steps,
    )


def _host_growth(host: HostSteps, examined: Examination, traced: TracedSteps) -> HostGrowth | None:
    kind, line = host.growing, host.line
    if not kind:
        return None
    size = slope(host.levels[kind])
    if kind == "nodes":
        holder = host.deepest_tensor()
        line = traced.line_of_graph(holder)
        # The median, as others' memory is in the process's, too.
        size = max(0.0, median(b - a for a, b in pairwise(host.levels["process"])))
    else:
        holder = host.grown_container()
    spelled = examined.spell(holder) if holder is not None else ("", "")
    return HostGrowth(kind, slope(host.levels[kind]), size, line, *spelled)


class _Callable(ModuleType):
    __call__ = staticmethod(diagnose)


sys.modules[__name__].__class__ = _Callable  # `leaks.diagnose` is this file or its function
