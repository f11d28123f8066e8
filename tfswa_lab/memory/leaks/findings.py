"""All that the rules of `verdicts` look at.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tfswa_lab.memory.gauges import DeviceSignals
from tfswa_lab.memory.leaks.suspects import Culprit
from tfswa_lab.memory.leaks.traced_steps import NOTHING, Ending
from tfswa_lab.memory.trace.stacks import Frame


@dataclass(frozen=True)
class HostGrowth:
    """What grows in host memory.

    Args:
        kind: `nodes` of graphs, `python`, or `process`.
        per_step: nodes or bytes.
        size: bytes per step, for nodes as far as the process tells.
        line: that allocates, if it is known.
        holder: what a program would write for the object that holds it, if it is known.
        where: the name that this begins with is found.
    """

    kind: str
    per_step: float
    size: float
    line: Frame | None = None
    holder: str = ""
    where: str = ""


@dataclass(frozen=True)
class Hooks:
    """A list of hooks that grows.

    Args:
        name: of the list, such as `_forward_hooks`.
        owner: what a program would write for the module or tensor that it belongs to.
        count: how many there are at the end.
        per_step: how many are added.
        line: where the function that was added last is written, if that is known.
    """

    name: str
    owner: str
    count: int
    per_step: float
    line: Frame | None = None


@dataclass(frozen=True)
class Findings:
    """What is known of the steps that were run.

    Args:
        steps: how many were traced.
        settled: bytes allocated after each, once cycles were freed.
        peaks: most bytes allocated within each.
        rising: lines whose blocks become ever more, most bytes first.
        ending: lines whose blocks became more and then did not.
        lasting: lines that added something once, after the first step, which stayed.
        newest: lines whose blocks of the last step are alive, if an exception is, too.
        hooks: lists of hooks that grow.
        freed: bytes that only the collector of cycles freed after each step.
        circle: the objects that refer to each other in a circle.
        in_circle: the line that made most of what they keep, if it is known.
        device: what the CUDA device said after each step; empty without one.
        host: what grows in host memory.
        kernels: bytes per step that oneDNN kept on the host, for sizes that it had not met.
        limit: bytes that are to be enough for a step, None if nothing was said.
        at_peak: lines with most bytes at the highest peak, and these bytes.
        ended: why the run ended early, if it did.
        untraced: how many more steps were run without the trace.
    """

    steps: int
    settled: Sequence[int]
    peaks: Sequence[int]
    rising: Sequence[Culprit] = ()
    ending: Sequence[Culprit] = ()
    lasting: Sequence[Culprit] = ()
    newest: Sequence[Culprit] = ()
    hooks: Sequence[Hooks] = ()
    freed: Sequence[int] = ()
    circle: str = ""
    in_circle: Frame | None = None
    device: Sequence[DeviceSignals] = ()
    host: HostGrowth | None = None
    kernels: float = 0.0
    limit: int | None = None
    at_peak: Sequence[tuple[str, int]] = ()
    ended: Ending = NOTHING
    untraced: int = 0
