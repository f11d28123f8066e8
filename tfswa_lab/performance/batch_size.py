"""Find the batch size that holds, and the smallest one that is nearly as fast.

Notebook: 09_running_lean
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tfswa_lab.memory import gauges
from tfswa_lab.memory.display import Shown, html_table
from tfswa_lab.memory.out_of_memory import attempt
from tfswa_lab.memory.predict import max_batch_size
from tfswa_lab.memory.sizes import format_bytes, is_whole
from tfswa_lab.performance.training_state import TrainingState

LIMIT = 2**20  # where the search ends if nothing else stops it
NEARLY_BEST = 0.95  # of the most items per second: the knee
SHARE_OF_HOST = 0.9  # of the free RAM that a trial may take: Linux kills a process that takes all
ROWS = 16  # of a printed table
CGROUPS = (  # of Linux, new and old: folder, limit, use, and what is dropped when memory is needed
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)

# The result --------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """What a batch size took.

    `seconds` is the time of a step, None where memory ran out. `peak` is in bytes: of tensors on
    the current GPU if CUDA is in use, else of the whole process; of a size that was not run, what
    was predicted.
    """

    size: int
    fits: bool
    seconds: float | None
    peak: int | None


@dataclass(frozen=True, repr=False)
class BatchSize(Shown):
    """Which batch sizes fit, and how fast they are.

    Args:
        largest: that fits.
        value: the size to use; within the margin below `largest` if memory stopped the search.
        knee: smallest size up to `value` with at least 95 % of the best items per second.
        tried: the trials, smallest size first.
        stopped_by: "memory" or "maximum".
        not_run: sizes that were predicted not to fit in the host's memory.
        notes: what the user should know beside that.
    """

    largest: int
    value: int
    knee: int
    tried: tuple[Trial, ...]
    stopped_by: str
    not_run: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def brief(self) -> str:
        """The three sizes."""
        return (
            f"value={self.value}, knee={self.knee}, largest={self.largest}, "
            f"stopped_by={self.stopped_by!r}"
        )

    @property
    def head(self) -> str:
        """A sentence or two on the sizes."""
        end = f"{self.largest} is the maximum, and fits"
        if self.stopped_by == "memory":
            end = f"{self.largest} is the largest that fits"
        return (
            f"batch size {self.value}: {end}. From {self.knee} on, items per second are within "
            f"{1 - NEARLY_BEST:.0%} of the best."
        )

    def __str__(self) -> str:
        rows = [("size", "", "ms/step", "items/s", "peak"), *map(self._cells, self._shown())]
        table = [f"{a:>9}  {b:<8}{c:>10}{d:>10}{e:>12}" for a, b, c, d, e in rows]
        left_out = len(self.tried) + 1 - len(rows)
        more = [f"({left_out} more in .tried)"] if left_out else []
        return "\n".join(line.rstrip() for line in [self.head, *table, *more, *self.notes[:4]])

    def _repr_html_(self) -> str:
        names = ("size", "", "ms per step", "items per second", "peak")
        table = html_table([names, *map(self._cells, self.tried)])
        notes = "".join(f"<div>{escape(note)}</div>" for note in self.notes)
        return f"<b>{escape(self.head)}</b>{table}{notes}"

    def _shown(self) -> list[Trial]:
        """The named sizes, the smallest that failed, and others a tenth apart."""
        failed = [trial.size for trial in self.tried if not trial.fits]
        named = {self.largest, self.value, self.knee, *failed[:1]}
        shown = []
        for trial in self.tried:
            if trial.size in named or not shown or trial.size >= 1.1 * shown[-1].size:
                shown.append(trial)
        kept = [trial for trial in shown if trial.size not in named][-(ROWS - len(named)) :]
        return [trial for trial in shown if trial.size in named or trial in kept]

    def _cells(self, trial: Trial) -> tuple[str, ...]:
        outcome = "fits" if trial.fits else "not run" if trial.size in self.not_run else "no"
        peak = "" if trial.peak is None else format_bytes(trial.peak)
        if trial.seconds is None:
            return str(trial.size), outcome, "", "", peak
        rate = trial.size / trial.seconds
        return str(trial.size), outcome, f"{1000 * trial.seconds:.4g}", f"{rate:.4g}", peak


def knee(rows: Iterable[Sequence]) -> int:
    """The smallest batch size with at least 95 % of the best items per second.

    Args:
        rows: begin with the size and the seconds of a step.

    Raises:
        ValueError: there is no row, or a size or time is not above 0.

    >>> knee([(1, 0.011), (8, 0.018), (32, 0.042), (64, 0.083), (128, 0.170)])
    32
    """
    rates = {}
    for size, seconds, *_ in rows:
        if not (size > 0 and seconds > 0):
            raise ValueError(f"size {size} with {seconds} seconds a step: both must be above 0")
        rates[size] = size / seconds
    if not rates:
        raise ValueError("no rows: the knee needs at least one size and its seconds per step")
    enough = NEARLY_BEST * max(rates.values())
    return min(size for size, rate in rates.items() if rate >= enough)


# The search --------------------------------------------------------------------------------------


def find_batch_size(
    step: Callable[[int], Any],
    *,
    state: Any,
    make_step: Callable[[int], Callable] | None = None,
    minimum: int = 1,
    maximum: int | None = None,
    validate: Callable[[int], Any] | None = None,
    steps: int = 3,
    margin: float = 0.05,
    all_ranks: bool = False,
) -> BatchSize:
    """Find the largest batch size that fits, by real training steps, and change nothing.

    Each size is tried with `steps` steps, because Adam's state appears in the first and the second
    is the first that has it, and then with `validate`. Sizes are doubled until one does not fit,
    then halved in between. Before each trial, and at the end, however it ends, everything in
    `state` and the generators of Python, NumPy and torch are put back, bit for bit.

    Without a GPU, no error tells that memory runs out: Linux kills the process. So a size is run
    only if it is predicted, from the sizes before, to fit in 90 % of the free RAM. For this, the
    process's peak RSS is reset.

    Args:
        step: runs one training step with so many items, `optimizer.step()` included. It should use
            the largest items that can come, e.g. the longest segments.
        state: one object or a sequence: everything that `step` and `validate` change, see
            `TrainingState`.
        make_step: as for `memory.predict.max_batch_size`; a prediction then says where to begin.
        minimum: the first size.
        maximum: the last size to be tried, e.g. the length of the data; 2**20 if absent.
        validate: runs the validation of a batch of so many items.
        steps: of a trial; never fewer than 2.
        margin: share to stay below the largest size if memory stops the search, in [0, 1).
        all_ranks: in a process group, that all processes take part. Each searches by itself, so
            `step` must not communicate (DDP: use its `module`); all get the smallest answer.

    Returns:
        The sizes, with a table of what was tried.

    Raises:
        RuntimeError: not even `minimum` fits, or the search failed in another process.
        ValueError: a number or `state` makes no sense, or in a process group not all ranks are
            said to take part.

    Errors of `step`, `validate` and Ctrl-C come out unchanged, unless memory ran out.

    >>> net = torch.nn.Linear(4, 1)
    >>> found = find_batch_size(lambda n: net(torch.ones(n, 4)), state=net, maximum=12)
    >>> found.value, found.stopped_by
    (12, 'maximum')
    """
    many = _processes() > 1
    if many and not all_ranks:
        raise ValueError(
            "find_batch_size in a process group: one process that searches while the others wait "
            "is a hang; call it in all of them with all_ranks=True, and a step that does not "
            "communicate"
        )

    def search() -> BatchSize:
        _check_numbers(minimum, maximum, steps, margin)
        trials = _Trials(step, validate, max(2, steps), TrainingState(state))
        try:
            return _search(trials, make_step, minimum, maximum or LIMIT, margin)
        finally:
            trials.state.restore()

    return _smallest_of_all(search) if many else search()


def _check_numbers(minimum: int, maximum: int | None, steps: int, margin: float) -> None:
    numbers = {"minimum": minimum, "steps": steps}
    for name, value in (numbers if maximum is None else numbers | {"maximum": maximum}).items():
        if not (is_whole(value) and value >= 1):
            raise ValueError(f"{name}={value!r}: a whole number, 1 or more")
    if minimum > (maximum or LIMIT):
        raise ValueError(f"minimum={minimum} is above maximum={maximum or LIMIT}")
    if isinstance(margin, bool) or not (isinstance(margin, int | float) and 0 <= margin < 1):
        raise ValueError(f"margin={margin!r}: a share in [0, 1), such as 0.05")


def _search(
    trials: _Trials, make_step: Callable | None, minimum: int, maximum: int, margin: float
) -> BatchSize:
    trials.run_first(minimum)
    notes = []
    guides = _predicted(make_step, notes) if make_step and minimum < maximum else []
    largest = _largest(trials, minimum, maximum, guides)
    value = largest
    if largest < maximum:
        value = max(minimum, largest - math.floor(margin * largest))
    while value > minimum and not trials.fits(value):  # more memory than a larger size: it happens
        value = max(minimum, value - max(1, math.floor(margin * value)))
    _time_smaller(trials, minimum, value)
    return BatchSize(
        largest=largest,
        value=value,
        knee=knee((trial.size, trial.seconds) for trial in trials.timed(value)),
        tried=tuple(trials.done[size] for size in sorted(trials.done)),
        stopped_by="memory" if largest < maximum else "maximum",
        not_run=tuple(sorted(trials.not_run)),
        notes=tuple(notes),
    )


def _predicted(make_step: Callable, notes: list[str]) -> list[int]:
    """Where to begin: at the size that is predicted, and a little above and below it."""
    budget = _host_room()
    if _uses_cuda():
        budget = gauges.device_memory().free + gauges.reserved()
    try:
        size = max_batch_size(make_step, budget, slack=0)
    except Exception as error:  # whatever the prediction cannot do: real steps decide
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        notes.append(f"no prediction ({reason})"[:200])
        return []
    notes.append(f"predicted to fit in {format_bytes(budget)}: {size}")
    stride = max(1, size // 16)
    return [size, size + stride, size - stride]


def _largest(trials: _Trials, low: int, maximum: int, guides: list[int]) -> int:
    """The largest size up to `maximum`, where `low` fits: guides, doubling, then bisection."""
    high = maximum + 1  # does not fit, or is not allowed
    while high - low > 1:
        # Without a GPU, a leap too far could end the process.
        reach = high if _uses_cuda() else min(high, 2 * low + 1)
        near = [size for size in guides if low < size < reach]
        blind = (low + high) // 2 if high <= maximum else min(2 * low, maximum)
        size = near[0] if near else blind
        if trials.fits(size):
            low = size
        else:
            high = size
    return low


def _time_smaller(trials: _Trials, minimum: int, value: int) -> None:
    """Time smaller sizes, about halved, until they are slower than the knee."""
    size = value
    while size > minimum and trials.rate(size) >= NEARLY_BEST * max(
        trials.rate(trial.size) for trial in trials.timed(value)
    ):
        half = max(minimum, size // 2)
        size = min((x.size for x in trials.timed(size - 1) if x.size >= half), default=half)
        if not trials.fits(size):
            return


class _Trials:
    """Tries sizes, each once and from the same state."""

    def __init__(self, step: Callable, validate: Callable | None, steps: int, state: TrainingState):
        self.step, self.validate, self.steps, self.state = step, validate, steps, state
        self.done: dict[int, Trial] = {}
        self.not_run: set[int] = set()
        self.before = gauges.process_rss()

    def run_first(self, size: int) -> None:
        """Try the smallest size.

        Raises:
            RuntimeError: it does not fit.
        """
        self.done[size], error = self._run(size)
        if error is not None:
            raise RuntimeError(_nothing_fits(size, error)) from error

    def fits(self, size: int) -> bool:
        """Whether it fits; tried if it was not."""
        if size not in self.done:
            needed = None if _uses_cuda() else self._needed(size)
            if needed is not None and needed > gauges.process_rss() + _host_room():
                self.not_run.add(size)
                self.done[size] = Trial(size, False, None, needed)
            else:
                self.done[size], _ = self._run(size)
        return self.done[size].fits

    def timed(self, up_to: int) -> list[Trial]:
        """The trials that fitted, of sizes up to this one."""
        return [trial for trial in self.done.values() if trial.fits and trial.size <= up_to]

    def rate(self, size: int) -> float:
        """Items per second."""
        return size / self.done[size].seconds

    def _run(self, size: int) -> tuple[Trial, BaseException | None]:
        self.state.restore()
        _reset_peak()
        seconds, error = attempt(partial(self._seconds, size))
        peak = gauges.peak_allocated() if _uses_cuda() else gauges.process_peak()
        return Trial(size, error is None, seconds, peak), error

    def _seconds(self, size: int) -> float:
        """The fastest step after the first; then validation."""
        seconds = [self._timed(size) for _ in range(self.steps)]
        if self.validate is not None:
            self.validate(size)
        return min(seconds[1:])

    def _timed(self, size: int) -> float:
        began = time.perf_counter()
        self.step(size)
        if _uses_cuda():
            torch.cuda.synchronize()
        return max(time.perf_counter() - began, 1e-9)  # a coarse clock may say 0

    def _needed(self, size: int) -> int | None:
        """The process's peak with a size, by the line through the two largest so far.

        With one size only, all that the process took since is laid on its items.
        """
        known = sorted((x.size, x.peak) for x in self.done.values() if x.fits)[-2:]
        if size <= known[-1][0]:
            return None
        (small, low), (large, high) = known if len(known) > 1 else [(0, self.before), *known]
        return high + max(0, high - low) * (size - large) // (large - small)


def _nothing_fits(size: int, error: BaseException) -> str:
    """The size, what it asked for, and what was free, as the error says it, or the device."""
    text = str(error)
    amount = r"([\d.]+ ?(?:[KMGT]i?B|bytes))"
    asked = re.search(rf"tried to allocate {amount}", text, re.IGNORECASE)
    free = re.search(rf"{amount}(?: is)? free", text)
    if free:
        free = free[1]
    else:
        free = format_bytes(
            gauges.device_memory().free if _uses_cuda() else gauges.host_available()
        )
    return (
        f"not even a batch of {size} fits: it asked for "
        f"{asked[1] if asked else f'more memory than there was ({text or type(error).__name__})'}, "
        f"and {free} were free; make the items shorter or the network smaller, or recompute "
        "activations in the backward pass"
    )


# Memory ------------------------------------------------------------------------------------------


def _uses_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _reset_peak() -> None:
    """Count the peak from here on; with an empty cache, so that all sizes begin alike."""
    if _uses_cuda():
        torch.cuda.empty_cache()
        gauges.reset_peak()
    else:
        with suppress(OSError):  # another system, or not allowed: then it is the most so far
            Path("/proc/self/clear_refs").write_text("5")


def _host_room() -> int:
    """Bytes of RAM that a trial may take beside what the process has."""
    return int(SHARE_OF_HOST * min([gauges.host_available(), *_left_in_cgroups()]))


def _left_in_cgroups(
    root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """Bytes left below the limits of containers and services, as files in the cache are dropped.

    Both versions of Linux's groups count: the process's own, and those that it is in.
    """
    groups = [""]
    with suppress(OSError):
        paths = [line.split(":", 2)[2] for line in process.read_text().splitlines()]
        groups += {str(each)[1:] for path in paths for each in (Path(path), *Path(path).parents)}
    found = []
    for group, (kind, limit, used, cached) in product(sorted({*groups}), CGROUPS):
        folder = root / kind / group
        with suppress(OSError, ValueError):  # no such group, or no limit: "max"
            stat = (folder / "memory.stat").read_text()
            dropped = re.search(rf"^{cached} (\d+)$", stat, re.MULTILINE)
            taken = int((folder / used).read_text()) - int(dropped[1] if dropped else 0)
            found.append(int((folder / limit).read_text()) - taken)
    return found


# Several processes -------------------------------------------------------------------------------


def _processes() -> int:
    group = torch.distributed
    return group.get_world_size() if group.is_available() and group.is_initialized() else 1


def _smallest_of_all(search: Callable[[], BatchSize]) -> BatchSize:
    """Each process's own search; then all have the smallest answer, or all raise."""
    found = failure = None
    try:
        found = search()
    except BaseException as error:  # the others wait for this process: tell them first
        failure = error
    said = f"{type(failure).__name__}: {failure}" if failure else replace(found, tried=())
    answers = [None] * _processes()
    torch.distributed.all_gather_object(answers, said)
    if failure is not None:
        raise failure
    for rank, answer in enumerate(answers):
        if isinstance(answer, str):
            raise RuntimeError(f"the search for a batch size failed on rank {rank} ({answer})")
    least = min(answers, key=lambda answer: answer.value)
    return replace(
        found,
        largest=min(answer.largest for answer in answers),
        value=least.value,
        knee=min(answer.knee for answer in answers),
        stopped_by=least.stopped_by,
    )
