"""Does a step lose memory, which line allocates it, and which object keeps it alive?

Steps run under a trace first. If tensors do not grow, more steps run without it, to see whether
host memory grows.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from inspect import signature
from itertools import pairwise
from statistics import median
from types import ModuleType
from typing import Any
from weakref import ref

import torch
from torch import UntypedStorage, nn
from torch.optim import Optimizer

from tfswa_lab.memory.leaks.advice import known_classes
from tfswa_lab.memory.leaks.census import Census, Site, is_open, replaces, sites, slope
from tfswa_lab.memory.leaks.children import children_of
from tfswa_lab.memory.leaks.holders import Holders, cycle_of_step
from tfswa_lab.memory.leaks.hooks import Hooks, growing_hooks
from tfswa_lab.memory.leaks.host_steps import LEAST, HostGrowth, HostSteps
from tfswa_lab.memory.leaks.referrers import of_types
from tfswa_lab.memory.leaks.suspects import Suspect, suspects_of
from tfswa_lab.memory.leaks.traced_steps import OWNERS, StepCaller, TracedSteps
from tfswa_lab.memory.leaks.verdicts import Diagnosis, Findings, judge
from tfswa_lab.memory.sizes import GIB, is_whole
from tfswa_lab.memory.trace.timeline import Block
from tfswa_lab.memory.trace.trace import check_types

FEWEST = 8  # steps that are needed to tell a leak from a warm-up
ENOUGH = GIB  # after the first `steps`, the traced run ends before a leak takes more than this


def diagnose(
    step: Callable[..., Any],
    steps: int = 12,
    *,
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    longest: int = 40,
    limit: int | None = None,
) -> Diagnosis:
    """Run a step repeatedly, and find memory that it loses, the allocation site and the holder.

    The steps are real: they train, draw random numbers and use up data. Their return values are
    dropped at once, and the garbage collector is off while a step runs. To find what happens only
    every n steps, set `longest` to several times n. A list or cache counts as bounded if its growth
    is seen to end, its keys come again, or Python enforces its limit (`deque`, `lru_cache`); one
    that reaches its limit only after `longest` steps counts as a leak. On CUDA, each step resets
    the peak statistics.

    Args:
        step: a callable, such as one training step; if it needs an argument, it gets the number
            of the step.
        steps: the number of steps under a trace, and again without it.
        model: gives names to its parts.
        optimizer: gives a name to its state.
        longest: the number of steps if something may be growing, under the trace and without it.
            The search for the holder takes up to two dozen more.
        limit: bytes that a step may need.

    Returns:
        Verdict, cause, evidence and advice.

    Raises:
        ValueError: the numbers make no sense, or `step` only makes a generator or coroutine.
        TypeError: `step` is not callable, `model` no module, or `optimizer` no optimizer.
        Exception: an error of one of the first `steps`, unless it is an out-of-memory error. Later
            steps may end early, such as at the end of the data.

    >>> import torch
    >>> history = []
    >>> diagnosis = diagnose(lambda: history.append(torch.zeros(1024)))
    >>> diagnosis.verdict, diagnosis.growth_per_step
    ('leak of tensors', 4096.0)
    """
    _check(steps, longest, limit, model, optimizer)
    call = StepCaller(step)
    traced = TracedSteps(call, model)
    with traced.running():
        _run(traced, steps, longest)
        census, storages = traced.census(), traced.references()
        failed, owners = traced.has_tracebacks(), traced.owners()
    cast = _kept_by_autocast(storages)
    with closing(Examination(census, storages, cast, _named(step, model, optimizer))) as examined:
        findings = replace(examined.findings(failed), limit=limit, outcome=traced.outcome)
        # While a cache of tensors still fills, the process grows: its level does not count then.
        kinds = [kind for kind in LEAST if not (findings.rising and kind == "process")]
        host = HostSteps(call, owners, kinds)
        return judge(_completed(findings, host, examined, traced, steps, longest))


def _check(steps: int, longest: int, limit: int | None, model: Any, optimizer: Any) -> None:
    if not (is_whole(steps) and is_whole(longest) and FEWEST <= steps <= longest):
        raise ValueError(
            f"steps={steps!r}, longest={longest!r}; expected whole numbers with {FEWEST} <= steps "
            "<= longest: fewer do not tell a leak from a warm-up, and for more raise longest"
        )
    if limit is not None and not (is_whole(limit) and limit > 0):
        raise ValueError(f"limit={limit!r}; expected bytes, such as 8 * 2**30, or None")
    check_types(model=(model, nn.Module), optimizer=(optimizer, Optimizer))


def _named(step: Callable, model: nn.Module | None, optimizer: Optimizer | None) -> dict[str, Any]:
    """Names for holders, besides those of globals and classes."""
    things = {"model": model, "optimizer": optimizer, "self": getattr(step, "__self__", None)}
    return {"step": step} | {name: thing for name, thing in things.items() if thing is not None}


def _run(traced: TracedSteps, steps: int, longest: int) -> None:
    """Run some steps, and more if these leave it open whether something grows."""
    traced.run(steps)
    census = traced.census()
    if not traced.outcome.error and is_open(census):
        traced.run(_enough(census, longest), may_fail=True)


def _kept_by_autocast(storages: dict[Block, ref[UntypedStorage]]) -> set[Block]:
    """Blocks that go when the cache of autocast is cleared: it was never left."""
    alive = [block for block, storage in storages.items() if storage() is not None]
    torch.clear_autocast_cache()
    return {block for block in alive if storages[block]() is None}


def _enough(census: Census, longest: int) -> int:
    """The number of steps to run, so that a leak does not take too much memory."""
    growth = max(1.0, (census.settled[-1] - census.settled[0]) / (census.steps - 1))
    return min(longest, census.steps + int(ENOUGH / growth))


def _completed(
    findings: Findings,
    host: HostSteps,
    examined: Examination,
    traced: TracedSteps,
    steps: int,
    longest: int,
) -> Findings:
    """Adds host-memory findings from extra steps when tensors do not grow."""
    leaks = any(not each.is_bounded(findings.steps) for each in findings.rising)
    if findings.hooks or findings.outcome.error or leaks:
        return findings
    if sum(map(bool, findings.freed[2:])) > 1:
        line = examined.census.line_of_garbage()
        return replace(findings, cycle=cycle_of_step(host.call), in_cycle=line)
    host.run(steps, longest)
    return replace(
        findings,
        host=_host_growth(host, examined, traced),
        kernels=host.kernels,
        outcome=host.outcome,
        untraced=host.call.count - findings.steps,
    )


def _host_growth(host: HostSteps, examined: Examination, traced: TracedSteps) -> HostGrowth | None:
    kind = host.growing
    if not kind:
        return None
    per_step = slope(host.levels[kind])
    if kind == "children":
        return HostGrowth(
            kind, per_step, per_step, children=children_of(*host.children, host.children_are_added)
        )
    if kind == "nodes":
        holder = host.deepest_tensor() or host.grown_container()
        line = traced.line_of_graph(holder)
        # Median: the process also holds memory of other libraries.
        size = max(0.0, median(b - a for a, b in pairwise(host.levels["process"])))
    else:
        holder, line, size = host.grown_container(), host.line, per_step
    held = (*examined.spell(holder), examined.known(holder)) if holder is not None else ()
    return HostGrowth(kind, per_step, size, line, *held)


LINES = 6  # of each kind: the search for holders takes time


class Examination:
    """Finds the holders of the blocks in a census.

    Args:
        census: of the steps.
        storages: of all blocks that were alive at its end.
        cast: those of them that autocast kept.
        named: objects with names of their own, such as the step and the model.
    """

    def __init__(
        self,
        census: Census,
        storages: dict[Block, ref[UntypedStorage]],
        cast: set[Block],
        named: dict[str, Any],
    ):
        self.census, self._storages, self._cast, self._named = census, storages, cast, named

    def findings(self, failed: bool) -> Findings:
        """All facts that the census has.

        Args:
            failed: whether an exception is stored, which may hold variables of the last step.
        """
        census, every = self.census, sites(self.census)
        largest = sorted(every, key=lambda site: -site.totals[-1])
        rising = [site for site in every if _rises(site, every)]
        resting = [site for site in largest if site not in rising]
        newest = [site for site in largest if census.steps - 1 in site.births]
        return Findings(
            steps=census.steps,
            settled=census.settled,
            peaks=census.peaks,
            rising=self._suspects(rising),
            stopped=self._suspects(site for site in resting if site.collects),
            lasting=self._suspects(s for s in resting if s.lasts and not s.collects),
            newest=self._suspects(newest) if failed else (),
            hooks=self._hooks(),
            freed=census.freed_by_gc(),
            device=[end.device for end in census.boundaries if end.device],
            at_peak=census.at_peak(),
        )

    def spell(self, thing: Any) -> tuple[str, str]:
        """An object as code, and where it is defined."""
        return self._holders.name(thing)

    def known(self, thing: Any) -> tuple[str, ...]:
        """Classes on the way to an object that are known to hold memory."""
        chain = self._holders.way_to(thing)
        return known_classes(chain, len(chain) - 1)

    def close(self) -> None:
        """Drop all objects that were looked at."""
        if "_holders" in vars(self):
            self._holders.paths.close()

    def _suspects(self, chosen: Iterable[Site]) -> list[Suspect]:
        few = list(chosen)[:LINES]
        if not few:
            return []
        return suspects_of(few, self.census, self._holders, self._storages, self._cast)

    def _hooks(self) -> list[Hooks]:
        counts = [end.hooks for end in self.census.boundaries if end.hooks is not None]
        found = growing_hooks(counts, lambda: of_types(OWNERS), lambda owner: self.spell(owner)[0])
        return list(found)

    @cached_property
    def _holders(self) -> Holders:
        return Holders(self._named)


def _rises(site: Site, others: list[Site]) -> bool:
    return site.per_step > 0 and site.rises and not site.ends and not replaces(site, others)


class _Callable(ModuleType):
    __call__ = staticmethod(diagnose)
    __signature__ = signature(diagnose)  # without it, the first parameter would be taken for `self`


sys.modules[__name__].__class__ = _Callable  # `leaks.diagnose` is this file or its function
