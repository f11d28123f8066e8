"""Does a step lose memory, which line makes what is lost, and who holds it?

Steps are run under a trace first. If tensors do not grow, some more are run without it, to see
whether the host's memory does.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tfswa_lab.memory.diagnosis.census import Census
from tfswa_lab.memory.diagnosis.cycles import circle_of_step
from tfswa_lab.memory.diagnosis.examination import Examination
from tfswa_lab.memory.diagnosis.findings import Findings, HostGrowth
from tfswa_lab.memory.diagnosis.growth import is_open
from tfswa_lab.memory.diagnosis.host_steps import HostSteps
from tfswa_lab.memory.diagnosis.numbered import Numbered
from tfswa_lab.memory.diagnosis.traced_steps import TracedSteps
from tfswa_lab.memory.diagnosis.trend import slope
from tfswa_lab.memory.diagnosis.verdicts import Diagnosis, bounded, judge
from tfswa_lab.memory.sizes import GIB

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

    Notebook: 06_leak_diagnosis

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
