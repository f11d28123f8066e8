"""How long a function takes, and the one definition of real time: seconds of audio per second.

Notebook: 09_running_lean
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tfswa_lab.memory import gauges
from tfswa_lab.memory.display import Shown
from tfswa_lab.memory.sizes import format_bytes

RUNS = 100_000  # the most that a benchmark keeps
# torch 2.13 writes two lines to stderr for each profile, unless this is set before the first one.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def real_time_factor(seconds: float, hop_seconds: float, batch: int = 1) -> float:
    """Seconds of audio per second of work: above 1 is faster than real time.

    Args:
        seconds: that one call takes.
        hop_seconds: new audio that each item of the call brings: the length of a segment, or, where
            segments overlap, the distance between their starts.
        batch: items that one call works on.

    Raises:
        ValueError: one of them is not above 0.

    >>> real_time_factor(0.5, hop_seconds=4.5, batch=2)  # segments of 6 s that overlap by a quarter
    18.0
    """
    for name, value in (("seconds", seconds), ("hop_seconds", hop_seconds), ("batch", batch)):
        if not value > 0:
            raise ValueError(f"{name}={value}; it must be above 0")
    return batch * hop_seconds / seconds


@dataclass(frozen=True, repr=False)
class Timing(Shown):
    """Seconds of the runs of a function.

    Args:
        runs: seconds of each, in their order, without the warm-up.
        peak_bytes: the most that a run holds in tensors beyond what was there before it.
    """

    runs: tuple[float, ...]
    peak_bytes: int

    @property
    def median(self) -> float:
        """Seconds of the run in the middle."""
        return statistics.median(self.runs)

    @property
    def least(self) -> float:
        """Seconds of the fastest run: what the function takes when nothing disturbs it."""
        return min(self.runs)

    @property
    def most(self) -> float:
        """Seconds of the slowest run."""
        return max(self.runs)

    @property
    def spread(self) -> float:
        """Seconds between the first and the third quartile of the runs; 0 for a single run."""
        if len(self.runs) == 1:
            return 0.0
        first, _, third = statistics.quantiles(self.runs, n=4, method="inclusive")
        return third - first

    def real_time_factor(self, hop_seconds: float, batch: int = 1) -> float:
        """Seconds of audio per second, by the median; see `real_time_factor`."""
        return real_time_factor(self.median, hop_seconds, batch)

    @property
    def brief(self) -> str:
        """The median and the number of runs."""
        return f"{format_seconds(self.median)}, {len(self.runs)} runs"

    def __str__(self) -> str:
        return (
            f"median {format_seconds(self.median)} · least {format_seconds(self.least)} · "
            f"spread {format_seconds(self.spread)} · {len(self.runs)} runs · "
            f"peak {format_bytes(self.peak_bytes)}"
        )


def benchmark(
    fn: Callable[[], Any],
    seconds: float = 1.0,
    at_least: int = 5,
    warm_up: int = 2,
) -> Timing:
    """Time a function, call by call.

    Each call is timed after the GPU has finished its work. One more call counts the memory. What
    the function raises comes out.

    Args:
        fn: is called without arguments.
        seconds: stop when the runs have taken so long together, but not before `at_least` runs.
        at_least: runs.
        warm_up: calls before, which count nothing.

    Raises:
        ValueError: `at_least` is below 1, or `warm_up` below 0.
        RuntimeError: torch's profiler is running.

    >>> timing = benchmark(lambda: torch.ones(1000).exp(), seconds=0, at_least=3)
    >>> len(timing.runs), timing.least <= timing.median
    (3, True)
    """
    if at_least < 1 or warm_up < 0:
        raise ValueError(f"at_least={at_least}, warm_up={warm_up}; use at least 1 run, 0 warm-ups")
    for _ in range(warm_up):
        fn()
    peak = peak_bytes(fn)
    runs = []
    while len(runs) < at_least or (sum(runs) < seconds and len(runs) < RUNS):
        runs.append(seconds_of(fn))
    return Timing(tuple(runs), peak)


def seconds_of(fn: Callable[[], Any]) -> float:
    """Seconds of one call, with the work that it gives to a GPU."""
    began = now()
    fn()
    return now() - began


def now() -> float:
    """Seconds of a clock, once the current GPU has done its work."""
    synchronise()
    return time.perf_counter()


def synchronise() -> None:
    """Wait until the current GPU has done its work; without one, do nothing."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def peak_bytes(fn: Callable[[], Any]) -> int:
    """The most bytes that one call holds in tensors beyond those before it.

    On a CUDA GPU, if the call takes any memory there: its allocator counts, and rounds up. Else on
    the CPU: torch's profiler sees each tensor made and freed, but not what others such as numpy
    allocate, nor Apple's GPUs.

    Raises:
        RuntimeError: torch's profiler is running.
    """
    refuse_another_profiler()
    before = _gpu_bytes(gauges.allocated)
    _gpu_bytes(gauges.reset_peak)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        fn()
    on_gpu = _gpu_bytes(gauges.peak_allocated) - before
    return on_gpu or _most_held(profiler.profiler.kineto_results.events())


def refuse_another_profiler() -> None:
    """Refuse to start torch's profiler while it runs: both would lose their events.

    Raises:
        RuntimeError: it runs.
    """
    if profiler_runs():
        raise RuntimeError("torch's profiler is running, and can only run once: leave its block")


def profiler_runs() -> bool:
    """Whether torch's profiler runs, in any thread."""
    return torch.autograd._profiler_enabled() or torch.autograd.profiler._is_profiler_enabled


def _gpu_bytes(gauge: Callable[[], int | None]) -> int:
    return (gauge() or 0) if torch.cuda.is_initialized() else 0


def _most_held(events: list) -> int:
    """The highest sum of what was made minus what was freed, in the host's memory."""
    on_host = [e for e in events if e.name() == "[memory]" and e.device_type() == DeviceType.CPU]
    held = most = 0
    for event in sorted(on_host, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def format_seconds(seconds: float) -> str:
    """Seconds in a unit that suits them.

    >>> format_seconds(2.5), format_seconds(0.0123), format_seconds(4e-6)
    ('2.50 s', '12.30 ms', '4.00 µs')
    """
    for unit, name in ((1, "s"), (1e-3, "ms")):
        if abs(seconds) >= unit:
            return f"{seconds / unit:.2f} {name}"
    return f"{seconds / 1e-6:.2f} µs"
