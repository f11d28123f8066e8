"""Does a step lose memory, which line makes what is lost, and who holds it?

Steps are run under a trace first. If tensors do not grow, some more are run without it, to see
whether the host's memory does.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
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

    What it returns is let go at once. The collector of cycles rests while a step runs.

    Args:
        step: anything that can be called, such as one training step; if it needs an argument, it
            gets the number of the step.
        steps: how many to run. As many again are run without the trace, and more if the first ones
            do not tell; these may end early with an error, such as the end of the data.
        model: names its parts.
        optimizer: names its state.
        longest: how many steps to run at most under the trace, and without it.
        limit: bytes that are to be enough for a step.

    Returns:
        Verdict, cause, evidence and advice.

    Raises:
        ValueError: there are too few steps to tell, or `step` only makes a generator or coroutine.
        Exception: whatever one of the first `steps` raises, unless it is want of memory.

    Notebook: 06_leak_diagnosis

    >>> import torch
    >>> history = []
    >>> diagnosis = diagnose(lambda: history.append(torch.zeros(1024)))
    >>> diagnosis.verdict, diagnosis.growth_per_step
    ('leak of tensors', 4096.0)
    """
    if not FEWEST <= steps <= longest:
        raise ValueError(f"steps={steps}, longest={longest}; expected {FEWEST} <= steps <= longest")
    call = Numbered(step)
    traced = TracedSteps(call, model)
    with traced.running():
        traced.run(steps)
        if not traced.ended and is_open(traced.census()):
            traced.run(_enough(traced.census(), longest), may_fail=True)
        census, storages = traced.census(), traced.references()
        failed, owners = traced.has_tracebacks(), traced.owners()
    with closing(Examination(census, storages, _named(step, model, optimizer))) as examined:
        findings = replace(
            examined.findings(failed),
            limit=limit,
            out_of_memory=traced.out_of_memory,
            ended=traced.ended,
        )
        # A cache of tensors that still grows makes the process grow, too.
        kinds = ("nodes", "python") if findings.rising else ("nodes", "python", "process")
        host = HostSteps(call, owners, kinds)
        return judge(_completed(findings, host, examined, steps, longest))


def _named(step: Callable, model: nn.Module | None, optimizer: Optimizer | None) -> dict[str, Any]:
    """What holders can be called by, besides the names of globals and classes."""
    things = {"model": model, "optimizer": optimizer, "self": getattr(step, "__self__", None)}
    return {"step": step} | {name: thing for name, thing in things.items() if thing is not None}


def _enough(census: Census, longest: int) -> int:
    """How many steps to run, so that what is lost on the way is not too much."""
    growth = max(1.0, (census.settled[-1] - census.settled[0]) / census.steps)
    return min(longest, census.steps + int(ENOUGH / growth))


def _completed(
    findings: Findings, host: HostSteps, examined: Examination, steps: int, longest: int
) -> Findings:
    """With what some more steps tell, if tensors do not grow."""
    if findings.hooks or findings.ended or not all(map(bounded, findings.rising)):
        return findings
    if sum(map(bool, findings.freed[2:])) > 1:
        line = examined.census.line_of_garbage()
        return replace(findings, circle=circle_of_step(host.call), in_circle=line)
    host.run(steps, longest)
    return replace(findings, host=_host_growth(host, examined), kernels=host.kernels)


def _host_growth(host: HostSteps, examined: Examination) -> HostGrowth | None:
    kind = host.growing
    if not kind:
        return None
    holder = host.deepest_tensor() if kind == "nodes" else host.grown_container()
    spelled = examined.spell(holder) if holder is not None else ("", "")
    size = slope(host.levels["process" if kind == "nodes" else kind])
    return HostGrowth(kind, slope(host.levels[kind]), max(0.0, size), host.line, *spelled)
