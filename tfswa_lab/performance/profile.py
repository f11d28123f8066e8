"""Where the time of a step goes, and the one change that pays.

A step waits for data, or the host prepares and launches, or kernels compute; kernels are as fast as
the machine moves bytes, as fast as it multiplies, or neither.

Notebook: 09_running_lean
"""

from __future__ import annotations

import gzip
import statistics
import sys
import tempfile
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from tfswa_lab.durable import write_whole
from tfswa_lab.memory.display import Shown
from tfswa_lab.memory.sizes import format_bytes
from tfswa_lab.performance.events import (
    BACKWARD,
    DATA,
    MODULE,
    STEP,
    Event,
    Recording,
    is_waiting,
    marked_loaders,
    record,
)
from tfswa_lab.performance.rates import Rates, Work, measured_rates
from tfswa_lab.performance.timing import format_seconds, seconds_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OUTSIDE = "outside of modules"
WORTH_A_HINT = 0.25  # of a step's time
NEAR_THE_ROOF = 0.4  # of the rate of a copy or of a GEMM
LAUNCHES = 30  # the host's time for an operator, in launches of a tiny one; more is other work
TINY_CALLS = 200
CLOCK = 1e-4  # seconds by which a process's own clock may be wrong
MOST = 0.5  # of the kernels' time, without which their rates say little
ROWS = 6  # of each table that is printed


class OperatorRow(NamedTuple):
    """An operator in a step: own time (of its kernels on a GPU), calls, bytes read and written.

    The bytes are None where the step that was counted called it more or less often.
    """

    name: str
    seconds: float
    calls: float
    bytes: int | None


class ModuleRow(NamedTuple):
    """A module in a step, forward and backward: time with all modules inside, its own, calls."""

    name: str
    seconds: float
    own_seconds: float
    calls: float


class Shares(NamedTuple):
    """Parts of the time of a step, which add up to 1."""

    waiting: float  # for data, while no kernel runs
    host: float  # Python, dispatch and launches, while no kernel runs
    kernels: float


@dataclass(frozen=True, repr=False)
class Profile(Shown):
    """Where the time of a step goes.

    Args:
        seconds: of a step without the profiler, the median.
        overhead: how many times as long a step takes under the profiler.
        shares: waiting for data, host and launches, kernels.
        kernel_seconds: of the kernels that `bytes` and `flops` count, in a step that no other
            program disturbs.
        counted: their part of the time of all kernels.
        operators: a row for each, the slowest first. Seconds are those under the profiler.
        modules: the same.
        launches: operators that a step calls.
        launch_seconds: of a tiny operator on this machine.
        sleeps: whether the host spends most of its share asleep, as it does when it waits for data
            that no loader marks.
        bytes: that operators of a step read and write, where they can be counted.
        flops: of the matrix products and convolutions among them.
        best: the rates of a copy and of a GEMM on this machine.
        device: where the kernels run.
        dtype: that most of the FLOPs are in.
    """

    seconds: float
    overhead: float
    shares: Shares
    kernel_seconds: float
    counted: float
    operators: list[OperatorRow]
    modules: list[ModuleRow]
    launches: float
    launch_seconds: float
    sleeps: bool
    bytes: int
    flops: int
    best: Rates
    device: str
    dtype: torch.dtype
    _recording: Recording = field(repr=False)

    @property
    def bytes_per_second(self) -> float:
        """What the kernels move, 0 where there are none."""
        return self.bytes / self.kernel_seconds if self.kernel_seconds else 0.0

    @property
    def flops_per_second(self) -> float:
        """What the kernels multiply and add, 0 where there are none."""
        return self.flops / self.kernel_seconds if self.kernel_seconds else 0.0

    def hints(self) -> list[str]:
        """What to change, at most three sentences, the largest part of the time first."""
        told = [(self.shares.waiting, self._waiting), (self.shares.host, self._host)]
        told.append((self.shares.kernels, self._kernels))
        told.sort(key=lambda part: -part[0])
        return [hint() for share, hint in told if share >= WORTH_A_HINT]

    def _waiting(self) -> str:
        return (
            f"Data-bound: {self.shares.waiting:.0%} of a step waits for the data "
            f"({format_seconds(self.shares.waiting * self.seconds)}): give the DataLoader more "
            "num_workers, pin_memory on a GPU, or prepare less in each item"
        )

    def _host(self) -> str:
        spent = self.shares.host * self.seconds
        each = spent / max(1.0, self.launches)
        if self.sleeps:
            return (
                f"Data-bound, it seems: {self.shares.host:.0%} of a step ({format_seconds(spent)}) "
                "the program sleeps outside of operators: if it waits for data there, fetch them "
                "ahead with a DataLoader and num_workers; loading(batches) marks other iterables"
            )
        if not self.launches or each > LAUNCHES * self.launch_seconds:
            return (
                f"Host-bound: {self.shares.host:.0%} of a step is outside of operators, in Python "
                f"or libraries ({format_seconds(spent)} for {self.launches:.0f} operators): the "
                "own time of modules says where; move it to tensors or out of the step"
            )
        return (
            f"Launch-bound: {self.shares.host:.0%} of a step is Python and launches, for "
            f"{self.launches:.0f} operators of {format_seconds(each)} each: use torch.compile, a "
            "larger batch, foreach or fused optimizers, or CUDA graphs"
        )

    def _kernels(self) -> str:
        if self.counted < MOST:
            return (
                f"Kernels take {self.shares.kernels:.0%} of a step, but what most of them move and "
                f"multiply cannot be counted: look at {self.operators[0].name} "
                f"({format_seconds(self.operators[0].seconds)} a step)"
            )
        copy = self.bytes_per_second / self.best.bytes
        gemm = self.flops_per_second / self.best.flops
        rates = (
            f"the kernels take {self.shares.kernels:.0%} of a step and reach {copy:.0%} of a "
            f"copy's bytes per second and {gemm:.0%} of a GEMM's FLOPs per second"
        )
        if max(copy, gemm) < NEAR_THE_ROOF:
            worst = self.operators[0]
            return (
                f"Slow kernels: {rates}, so neither limits them: look at {worst.name} "
                f"({format_seconds(worst.seconds)} a step), its shapes, strides and dtype"
            )
        if copy > gemm:
            return (
                f"Memory-bound: {rates}: fuse operators (torch.compile), write in place, use half "
                "precision or channels_last"
            )
        return (
            f"Compute-bound: {rates}: use a lower precision (TF32, bfloat16) or a smaller model; "
            f"layout and fusion gain at most {max(0.0, 1 - gemm):.0%}"
        )

    # What is shown ------------------------------------------------------------------------------

    @property
    def brief(self) -> str:
        """Time and shares in one line."""
        return f"{format_seconds(self.seconds)} a step: {self._shares}"

    @property
    def _shares(self) -> str:
        parts = zip(("waiting for data", "host", "kernels"), self.shares, strict=True)
        return ", ".join(f"{share:.0%} {name}" for name, share in parts)

    def _head(self) -> list[str]:
        name = str(self.dtype).removeprefix("torch.")
        return [
            f"A step on {self.device} takes {format_seconds(self.seconds)}: {self._shares}.",
            f"Kernels move {self.bytes_per_second / 1e9:.3g} of {self.best.bytes / 1e9:.3g} "
            f"GB/s and do {self.flops_per_second / 1e9:.3g} of {self.best.flops / 1e9:.3g} "
            f"GFLOP/s ({name}; {self.counted:.0%} of them counted).",
            f"The profiler makes a step {self.overhead:.2f} times as long.",
        ]

    def _tables(self) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
        operators = [
            (row.name, format_seconds(row.seconds), f"{row.calls:.4g}", _size(row.bytes))
            for row in self.operators[:ROWS]
        ]
        modules = [
            (row.name, format_seconds(row.seconds), format_seconds(row.own_seconds))
            for row in self.modules[:ROWS]
        ]
        return [
            (("operator", "own time", "calls", "bytes"), operators),
            (("module", "time", "own time"), modules),
        ]

    def __str__(self) -> str:
        lines = self._head()
        for columns, rows in self._tables():
            for first, *others in (columns, *rows):
                lines.append(f"  {_cut(first):44}" + "".join(f"{text:>12}" for text in others))
        return "\n".join(lines + [f"→ {hint}." for hint in self.hints()])

    def _repr_html_(self) -> str:
        parts = [f"<p>{escape(' '.join(self._head()))}</p>"]
        for columns, rows in self._tables():
            cells = ["".join(f"<th>{escape(name)}</th>" for name in columns)]
            cells += ["".join(f"<td>{escape(text)}</td>" for text in row) for row in rows]
            body = "".join(f"<tr>{line}</tr>" for line in cells)
            parts.append(f"<table>{body}</table>")
        hints = "".join(f"<li>{escape(hint)}</li>" for hint in self.hints())
        return "\n".join([*parts, f"<ul>{hints}</ul>"])

    # Pictures and files -------------------------------------------------------------------------

    def flame(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw what runs inside of what: width is time, and each row is inside the one below.

        Calls of the same module or operator at the same place are one bar. Bars that are narrower
        than a thousandth of the step are left out.
        """
        import matplotlib.pyplot as plt

        fig, ax = plt.subplots(figsize=(10, 4)) if ax is None else (ax.figure, ax)
        tree = flame_tree(self._recording, self.device != "cpu")
        _draw(ax, tree, "", 0.0, 0, tree.milliseconds)
        ax.set(xlabel="time of a step under the profiler (ms)", ylabel="depth of the calls")
        ax.set_xlim(0, tree.milliseconds)
        ax.autoscale(axis="y")
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
        ax.legend(handles, COLOURS, loc="upper right", fontsize="small")
        return fig, ax

    def chrome_trace(self, path: str | Path) -> Path:
        """Write the trace for chrome://tracing or ui.perfetto.dev; `.gz` is compressed.

        Raises:
            OSError: the file cannot be written; what was there is still there.
        """
        path = Path(path)
        trace = gzip.compress(self._trace) if path.suffix == ".gz" else self._trace
        write_whole({path: [trace]})
        return path

    @cached_property
    def _trace(self) -> bytes:
        """torch can export a profile only once."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._recording.profiler.export_chrome_trace(str(path))
            return path.read_bytes()


def _size(size: int | None) -> str:
    return "?" if size is None else format_bytes(size)


def _cut(name: str, longest: int = 42) -> str:
    return name if len(name) <= longest else f"…{name[1 - longest :]}"


# The measurement ---------------------------------------------------------------------------------


def profile(step: Callable[[], Any], steps: int = 8, warm_up: int = 3) -> Profile:
    """Measure where the time of a step goes.

    `step` is called `warm_up` times, once to count bytes and FLOPs, `steps` times without and
    `steps + 1` times under the profiler. What it raises comes out, and nothing stays attached.
    A compiled step counts the bytes of its operators before they are fused.

    Args:
        step: is called without arguments, and gets its next batch itself. Batches of a `DataLoader`
            and those of `loading(batches)` are recognised as data.
        steps: that are measured.
        warm_up: steps before, for caches and `torch.compile`.

    Raises:
        ValueError: `steps` is below 1 or `warm_up` below 0; or the step's data ended; or it has
            tensors on a device that is neither a CPU nor a CUDA GPU.
        RuntimeError: the profiler cannot see the GPU's kernels, or another profiler runs.

    >>> weights = torch.randn(256, 256)
    >>> found = profile(lambda: weights @ weights, steps=2)
    >>> round(sum(found.shares)), found.operators[0].name
    (1, 'aten::mm')
    """
    if steps < 1 or warm_up < 0:
        raise ValueError(f"steps={steps}, warm_up={warm_up}; use at least 1 step and 0 to warm up")
    step = _endless(step, warm_up + 2 * steps + 2)
    for _ in range(warm_up):
        step()
    work = _work_of(step)
    seconds, awake = _seconds_of(step, steps)
    return _evaluate(record(step, steps), work, seconds, awake)


def _seconds_of(step: Callable[[], Any], steps: int) -> tuple[float, float]:
    """Seconds of a step without a profiler, and those of its process on any core; medians."""
    seconds, awake = [], []
    for _ in range(steps):
        began = time.process_time()
        seconds.append(seconds_of(step))
        awake.append(time.process_time() - began)
    return statistics.median(seconds), statistics.median(awake)


def _endless(step: Callable[[], Any], calls: int) -> Callable[[], Any]:
    """The step, which says so where it runs out of data."""

    def called() -> None:
        try:
            step()
        except StopIteration as error:
            raise ValueError(
                f"the step ran out of data (StopIteration), and a profile calls it {calls} times: "
                "let it begin anew at the end, or choose fewer steps"
            ) from error

    return called


def _work_of(step: Callable[[], Any]) -> Work:
    with Work(unless=is_waiting) as work, marked_loaders():
        step()
    if unknown := work.devices - {"cpu", "cuda", "meta"}:  # on meta, nothing is computed
        raise ValueError(
            f"the step has tensors on {', '.join(sorted(unknown))}; a profile knows cpu and cuda"
        )
    return work


def _evaluate(recording: Recording, work: Work, seconds: float, awake: float) -> Profile:
    count, on_gpu = len(recording.steps), "cuda" in work.devices
    if on_gpu and not recording.kernels:
        raise RuntimeError(
            "the step uses a GPU, but torch's profiler saw no kernel: another profiler may be "
            "running, or the driver keeps the GPU's counters for root"
        )
    costs, heads = measured_costs(), _heads(recording, work)
    waiting = _waiting_share(recording, costs)
    kernels, busy, whole = (_on_gpu if on_gpu else _on_cpu)(recording, heads, costs)
    operators = _operators(recording, heads, work, on_gpu)
    known = {row.name for row in operators if row.bytes is not None}
    counted = sum(seconds for name, seconds in kernels.items() if name in known)
    flops, dtype = _flops(work, known)
    under_profiler = statistics.median(step.stop - step.start for step in recording.steps)
    return Profile(
        seconds=seconds,
        overhead=under_profiler / seconds,
        shares=_shares(waiting, busy / whole),
        kernel_seconds=counted,
        counted=counted / (kernels.total() or 1.0),
        operators=operators,
        modules=_modules(recording, on_gpu),
        launches=sum(_is_outermost(event) for event in recording.events) / count,
        launch_seconds=costs.launch,
        sleeps=awake + CLOCK < (whole - busy) / 2,
        bytes=sum(row.bytes or 0 for row in operators),
        flops=flops,
        best=measured_rates("cuda" if on_gpu else "cpu", dtype),
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        dtype=dtype,
        _recording=recording,
    )


def _flops(work: Work, known: set[str]) -> tuple[int, torch.dtype]:
    """FLOPs of the known operators, and the dtype that most of them are in."""
    flops: Counter[torch.dtype] = Counter({torch.float32: 0})
    for (name, dtype), number in work.flops.items():
        flops[dtype] += number if name in known else 0
    return flops.total(), max(flops, key=flops.get)


def _shares(waiting: float, kernels: float) -> Shares:
    """Parts of a step, by that of the waiting, and by that of the kernels in the rest."""
    kernels = min(kernels, 1.0) * (1 - waiting)
    return Shares(waiting, 1 - waiting - kernels, kernels)


class Costs(NamedTuple):
    """Seconds of an operator that computes next to nothing, and what the profiler adds."""

    launch: float  # of the operator, as the profiler shows it
    operator: float  # added by the profiler to each operator
    module: float  # and to each call of a module


def measured_costs() -> Costs:
    """Measure them on this machine now, as busy as it is."""
    tiny, module = torch.zeros(1), nn.Identity()
    recording, operator = _added(tiny.neg_)
    _, of_module = _added(lambda: module(tiny))
    computing = [event.own_seconds for event in recording.events if event.is_operator]
    return Costs(statistics.median(computing), operator, of_module)


def _added(call: Callable[[], Any]) -> tuple[Recording, float]:
    """A recording of many calls, and the seconds that the profiler adds to each."""

    def step() -> None:
        for _ in range(TINY_CALLS):
            call()

    without = min(seconds_of(step) for _ in range(3))
    recording = record(step, 3)
    added = min(step.stop - step.start for step in recording.steps) - without
    return recording, max(0.0, added) / TINY_CALLS


def _profiler_seconds(events: Iterable[Event], costs: Costs) -> float:
    """What the profiler has added to these events."""
    return sum(costs.module if e.name.startswith(MODULE) else costs.operator for e in events)


def _waiting_share(recording: Recording, costs: Costs) -> float:
    """Of all steps together: with workers, some steps wait for long and others not at all."""
    waited = [(event.start, event.stop) for event in recording.events if event.name == DATA]
    waiting = _length([*recording.kernels, *waited]) - _length(recording.kernels)
    whole = sum(step.stop - step.start for step in recording.steps)
    added = _profiler_seconds((e for e in recording.events if not e.is_data), costs)
    return waiting / max(waiting, whole - added)


def _on_gpu(
    recording: Recording, heads: dict[int, Event], costs: Costs
) -> tuple[Counter[str], float, float]:
    """Seconds of kernels by operator, in which at least one runs, and all without the waiting.

    The last two are of the fastest step; the first are means.
    """
    kernels: Counter[str] = Counter()
    for event in recording.events:
        if id(event) in heads:
            kernels[heads[id(event)].label] += event.kernel_seconds / len(recording.steps)
    starts = [start for start, _ in recording.kernels]
    steps = zip(
        recording.steps,
        _by_step(recording, recording.kernels, starts),
        _events_by_step(recording),
        strict=True,
    )
    fastest = min((_gpu_step(*step, costs) for step in steps), key=lambda found: found[1])
    return kernels, *fastest


def _gpu_step(
    step: Event, kernels: list[tuple[float, float]], events: list[Event], costs: Costs
) -> tuple[float, float]:
    """Seconds in which at least one kernel runs, and all without the waiting."""
    busy = _length(kernels)
    waited = [(event.start, event.stop) for event in events if event.name == DATA]
    waiting = _length([*kernels, *waited]) - busy
    whole = step.stop - step.start - waiting - _profiler_seconds(events, costs)
    return busy, max(busy, whole)


def _on_cpu(
    recording: Recording, heads: dict[int, Event], costs: Costs
) -> tuple[Counter[str], float, float]:
    """Seconds of kernels by operator, of all of them, and all without the waiting.

    They are of a step that nobody disturbs. A kernel's time is that of its operator without its
    launch and without the operators inside.
    """
    whole, kernels = 0.0, Counter()
    for event, seconds in _undisturbed(recording):
        whole += seconds - _profiler_seconds([event], costs)
        if id(event) in heads:
            launches = costs.launch * (1 + event.children)
            kernels[heads[id(event)].label] += max(0.0, seconds - launches)
    return kernels, kernels.total(), max(kernels.total(), whole)


def _undisturbed(recording: Recording) -> list[tuple[Event, float]]:
    """The events of a step, each with its own time in the step in which it was the fastest.

    Another program that takes the core away in the middle of an operator makes it a thousand times
    as long, but not the same one in every step. Where the steps do not run the same operators, the
    fastest step stands for all.
    """
    steps = [[e for e in events if not e.is_data] for events in _events_by_step(recording)]
    if len({tuple(event.name for event in events) for events in steps}) > 1:
        steps = [min(steps, key=lambda events: sum(event.own_seconds for event in events))]
    return [(same[0], min(e.own_seconds for e in same)) for same in zip(*steps, strict=True)]


def _events_by_step(recording: Recording) -> list[list[Event]]:
    return _by_step(recording, recording.events, [event.start for event in recording.events])


def _by_step(recording: Recording, items: list, starts: list[float]) -> list[list]:
    steps: list[list] = [[] for _ in recording.steps]
    begins = [step.start for step in recording.steps]
    for item, start in zip(items, starts, strict=True):
        steps[bisect_right(begins, start) - 1].append(item)
    return steps


def _length(intervals: Iterable[tuple[float, float]]) -> float:
    """Seconds that are in at least one interval."""
    total = covered = 0.0
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, covered))
        covered = max(covered, stop)
    return total


def _is_outermost(event: Event) -> bool:
    """Whether the program called this operator, rather than another operator."""
    outer = event.parent
    inside = outer is not None and outer.is_operator
    return event.is_operator and not event.is_data and not inside


# Tables ------------------------------------------------------------------------------------------


def _heads(recording: Recording, work: Work) -> dict[int, Event]:
    """By the identity of each operator: the one that was counted, which it is a part of."""
    heads: dict[int, Event] = {}
    for event in recording.events:
        if event.is_operator and not event.is_data:
            outer = heads.get(id(event.parent))
            heads[id(event)] = outer if outer and outer.name in work.calls else event
    return heads


def _operators(
    recording: Recording, heads: dict[int, Event], work: Work, on_gpu: bool
) -> list[OperatorRow]:
    count = len(recording.steps)
    seconds, calls = Counter(), Counter()
    for event in recording.events:
        if head := heads.get(id(event)):
            seconds[head.label] += event.kernel_seconds if on_gpu else event.own_seconds
            calls[head.label] += head is event
    sizes = {n: work.bytes[n] for n, number in calls.items() if work.calls[n] * count == number}
    return [
        OperatorRow(name, spent / count, calls[name] / count, sizes.get(name))
        for name, spent in seconds.most_common()
    ]


def _modules(recording: Recording, on_gpu: bool) -> list[ModuleRow]:
    count = len(recording.steps)
    whole, own, calls = Counter(), Counter(), Counter()
    for event in recording.events:
        if event.is_data:
            continue
        spent = event.kernel_seconds if on_gpu else event.own_seconds
        inside = event.modules or (OUTSIDE,)
        own[inside[-1]] += spent
        for name in set(inside):  # once, also where a module calls itself
            whole[name] += spent
        if event.name.startswith(MODULE):
            calls[inside[-1]] += 1
    return [
        ModuleRow(name, spent / count, own[name] / count, calls[name] / count)
        for name, spent in whole.most_common()
    ]


# The flame chart ---------------------------------------------------------------------------------

COLOURS = {  # of different lightness
    "waiting for data": "#d55e00",
    "module": "#56b4e9",
    "operator": "#0072b2",
    "backward": "#e69f00",
    "other": "#bbbbbb",
}


@dataclass
class Flame:
    """A place in the tree of calls: its own milliseconds in a step, and what is inside."""

    kind: str = "other"
    own: float = 0.0
    inside: dict[str, Flame] = field(default_factory=lambda: defaultdict(Flame))

    @property
    def milliseconds(self) -> float:
        """With all that is inside."""
        return self.own + sum(flame.milliseconds for flame in self.inside.values())


def flame_tree(recording: Recording, on_gpu: bool) -> Flame:
    """Sum up the calls by their place; operators of a node's backward are under `backward`."""
    root = Flame()
    flames: dict[int, Flame] = {}
    for event in recording.events:
        if event.name == STEP:
            flame = root
        elif event.name.startswith(BACKWARD):
            flame = root.inside["backward"]
            flame.kind = "backward"
            for name in (*event.modules, event.name.removeprefix(BACKWARD)):
                flame = flame.inside[name]
                flame.kind = "backward"
        else:
            flame = flames.get(id(event.parent), root).inside[_label(event)]
            flame.kind = _kind(event)
        spent = event.kernel_seconds if on_gpu else event.own_seconds
        flame.own += 1000 * spent / len(recording.steps)
        flames[id(event)] = flame
    return root


def _label(event: Event) -> str:
    if event.name.startswith(MODULE):
        return event.name.removeprefix(MODULE)
    return event.label.removeprefix("aten::").partition("#")[0]


def _kind(event: Event) -> str:
    if event.is_data:
        return "waiting for data"
    if event.name.startswith(MODULE):
        return "module"
    return "operator" if event.is_operator else "other"


def _draw(ax: Axes, flame: Flame, name: str, left: float, depth: int, whole: float) -> None:
    """Draw what is inside of a flame, the longest first.

    Args:
        ax: to draw on, in milliseconds.
        flame: its own bar is drawn already.
        name: of the flame, which the names of modules inside need not repeat.
        left: where it begins.
        depth: of the rows to draw.
        whole: milliseconds of a step, for what is too narrow.
    """
    longest_first = sorted(flame.inside.items(), key=lambda item: -item[1].milliseconds)
    for inner_name, inner in longest_first:
        width = inner.milliseconds
        if width < whole / 1000:
            return
        colour = COLOURS[inner.kind]
        ax.barh(depth, width, 1, left, color=colour, edgecolor="white", linewidth=0.5)
        letters = int(120 * width / whole)  # that fit
        text = inner_name.removeprefix(f"{name}.")[:letters]
        ink = "white" if inner.kind == "operator" else "black"
        place = {"ha": "center", "va": "center", "clip_on": True}
        if letters > 3:
            ax.text(left + width / 2, depth, text, fontsize=7, color=ink, **place)
        _draw(ax, inner, inner_name, left, depth + 1, whole)
        left += width


class _CallableModule(ModuleType):
    __call__ = staticmethod(profile)
    __signature__ = signature(profile)  # without it, the first parameter would be taken for `self`


# `from tfswa_lab.performance import profile` may find this module, which has the same name.
sys.modules[__name__].__class__ = _CallableModule
