"""Checks of lesson 10: a peak by hand, a run that frees its model, a choice of what stays.

Notebook: 10_staged_pipelines
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate, chain, combinations
from weakref import WeakSet

from tfswa_lab.teaching.checks import mismatch, mismatch_or_mistake, verdict

Sizes = Sequence[tuple[float, float, float]]  # weights, activations, what it hands on
Named = Sequence[tuple[str, float, float, float]]

# Exercise 1 --------------------------------------------------------------------------------------

PIPELINES: tuple[tuple[Sizes, float], ...] = (
    ([(1.5, 0.6, 0.05), (4.6, 1.8, 0.2), (0.3, 0.9, 0.3), (1.2, 1.0, 0.0)], 0.5),
    ([(3, 1, 2), (1, 1, 2), (1, 3, 1)], 1),  # the last has the peak, by what it finds there
    ([(2, 5, 4), (6, 1, 3)], 0.25),
    ([(4, 2, 1)], 0.5),
)


def check_sequential_peak(sequential_peak: Callable[[Sizes, float], object]) -> bool:
    """Exercise 1: `sequential_peak(stages, context)`, one model at a time."""
    for stages, context in PIPELINES:
        right = _peak(stages, context)
        hint = mismatch_or_mistake(
            sequential_peak(list(stages), context), right, _mistakes(stages, context)
        )
        if hint:
            return verdict("sequential_peak", f"stages {stages}, context {context}: {hint}")
    return verdict("sequential_peak", None)


def _carried(stages: Sizes) -> list[float]:
    """What earlier stages have handed on, for each stage."""
    return list(accumulate((hands_on for *_, hands_on in stages[:-1]), initial=0))


def _peak(stages: Sizes, context: float) -> float:
    each = zip(stages, _carried(stages), strict=True)
    return context + max(carried + weights + active for (weights, active, _), carried in each)


def _mistakes(stages: Sizes, context: float) -> dict[str, float]:
    """The peak that each usual mistake leads to."""
    weights, active, hands_on = (list(column) for column in zip(*stages, strict=True))
    carried = _carried(stages)
    before = [0, *hands_on[:-1]]
    most = [w + a for w, a in zip(weights, active, strict=True)]
    return {
        "the context is missing": _peak(stages, 0),
        "that is the peak with all models there": context
        + sum(weights)
        + max(c + a for c, a in zip(carried, active, strict=True)),
        "add what earlier stages handed on: it lies there, too": context + max(most),
        "only the stage before was counted; what is handed on stays until the end": context
        + max(m + b for m, b in zip(most, before, strict=True)),
        "a stage's own output is a part of its activations; it counts from the next stage on": (
            context + max(m + c + h for m, c, h in zip(most, carried, hands_on, strict=True))
        ),
        "the largest numbers of the columns need not belong to the same stage": (
            context + max(weights) + max(active) + max(carried)
        ),
        "all stages were added up; only one model is there at a time": (
            context + sum(weights) + sum(active) + sum(hands_on)
        ),
    }


# Exercise 2 --------------------------------------------------------------------------------------


class _Net:
    """A model, as far as this exercise needs one."""


class _Stage:
    """Loads models, and forgets those that are freed."""

    def __init__(self, fails: Callable[[], BaseException] | None = None, linked: bool = False):
        self.alive: WeakSet[_Net] = WeakSet()
        self.loads, self.fails, self.linked = 0, fails, linked

    def load(self) -> _Net:
        net = _Net()
        self.alive.add(net)
        self.loads += 1
        return net

    def run(self, net: _Net, value: int) -> int:
        if self.fails is None:
            return value + 1
        if not self.linked:
            raise self.fails()
        try:
            self._inner(net)
        except OSError as error:
            raise self.fails() from error

    def _inner(self, net: _Net) -> None:
        raise OSError("a file of the model")


def check_run(run_once: Callable) -> bool:
    """Exercise 2: `run_once(load, run, value)`; the model is freed, whatever happens."""
    hint = _output_hint(run_once)
    cases = {
        "the run raises and the error is kept": _Stage(_broken),
        "it raises from another error": _Stage(_broken, linked=True),
        "Ctrl-C is pressed": _Stage(KeyboardInterrupt),
    }
    for case, stage in cases.items():
        hint = hint or _error_hint(run_once, stage, case)
    return verdict("run", hint)


def _broken() -> BaseException:
    return ZeroDivisionError("in the run")


def _output_hint(run_once: Callable) -> str | None:
    stage = _Stage()
    output = run_once(stage.load, stage.run, 1)
    if stage.loads != 1:
        return f"load was called {stage.loads} times; once is right"
    if hint := mismatch(output, 2):
        return f"return what run(model, value) returns: {hint}"
    gc.collect()
    return "after a run without errors, the model is still alive" if stage.alive else None


def _error_hint(run_once: Callable, stage: _Stage, case: str) -> str | None:
    kept = None
    try:
        run_once(stage.load, stage.run, 1)
    except BaseException as error:  # all kinds are looked at, and some are raised on purpose
        kept = error
    if kept is None or type(kept) is not type(stage.fails()):
        came = "nothing" if kept is None else type(kept).__name__
        return f"{case}: {type(stage.fails()).__name__} should come out, {came} did"
    if "run" not in (frame.name for frame in traceback.extract_tb(kept.__traceback__)):
        return f"{case}: its traceback no longer says where; clear the frames, and keep them"
    gc.collect()
    if not stage.alive:
        return None
    if stage.linked:
        return f"{case}: the model is alive; the error's __cause__ has a traceback of its own"
    return (
        f"{case}: the model is alive. The error holds its traceback, this holds the frames of your "
        "function and of run, and each has a name for the model"
    )


# Exercise 3 --------------------------------------------------------------------------------------

EIGHT: Named = (  # MB
    ("scale_shift_generator", 1500, 600, 50),
    ("slat_generator", 4600, 1800, 200),
    ("scale_shift_decoder", 100, 300, 50),
    ("slat_decoder_gs", 200, 500, 100),
    ("slat_decoder_gs4", 200, 500, 100),
    ("slat_decoder_mesh", 300, 900, 300),
    ("depth", 1400, 1100, 100),
    ("vit", 1200, 1000, 0),
)
THREE: Named = (("large", 60, 0, 0), ("one", 50, 30, 0), ("other", 50, 30, 0))
CARRYING: Named = (("first", 30, 10, 40), ("second", 20, 5, 40), ("last", 50, 5, 0))
CASES = ((THREE, 165, 0), (CARRYING, 145, 10), (CARRYING, 180, 5))
CASES += tuple((EIGHT, budget, 500) for budget in (12_000, 7_000, 8_000, 9_000, 10_000, 11_000))
TOO_SMALL = ((EIGHT, 6_500, 500, "slat_generator"), (CARRYING, 130, 0, "last"))


def check_choice(choose: Callable[[Named, int, int], object]) -> bool:
    """Exercise 3: `choose(stages, budget, context)`, the names of those that stay."""
    hints = (_choice_hint(choose, *case) for case in CASES)
    refusals = (_refusal_hint(choose, *case) for case in TOO_SMALL)
    return verdict("choice", next(filter(None, chain(hints, refusals)), None))


def _choice_hint(choose: Callable, stages: Named, budget: int, context: int) -> str | None:
    case = f"{[name for name, *_ in stages]}, budget {budget}, context {context}"
    answer = choose(list(stages), budget, context)
    weights = {name: size for name, size, *_ in stages}
    if isinstance(answer, str) or not isinstance(answer, Collection):
        return f"expected names of stages, got {answer!r}"
    if unknown := [name for name in answer if name not in weights]:
        return f"{unknown[0]!r} is no name of a stage"
    stay = set(answer)
    if (peak := peak_of(stages, stay, context)) > budget:
        why = _why(stages, stay, context, budget)
        return f"{case}: {sorted(stay)} stay, and the peak is {peak}; {why}"
    best = max(_fitting(stages, budget, context), key=lambda names: _total(weights, names))
    if _total(weights, stay) < _total(weights, best):
        greedy = _largest_first(stages, budget, context)
        hint = ": the largest first is not always best" if stay and stay == set(greedy) else ""
        kept = sorted(stay) or "nothing"
        return f"{case}: {kept} stays, and {sorted(best)} would fit and save more{hint}"
    return None


def peak_of(stages: Named, stay: Collection[str], context: int) -> int:
    """The most that is there when these stages stay, and others come and go.

    >>> peak_of([("a", 3, 1, 1), ("b", 5, 2, 0)], {"a"}, context=1)
    12
    """
    carried = _carried([sizes for _, *sizes in stages])
    most = max(
        before + active + (0 if name in stay else weights)
        for (name, weights, active, _), before in zip(stages, carried, strict=True)
    )
    return context + sum(weights for name, weights, *_ in stages if name in stay) + most


def _why(stages: Named, stay: set[str], context: int, budget: int) -> str:
    """Which omissions explain that a choice does not fit."""
    alone = [(name, weights, active, 0) for name, weights, active, _ in stages]
    idle = [(name, weights, 0, hands_on) for name, weights, _, hands_on in stages]
    there = [(name, weights * (name in stay), *rest) for name, weights, *rest in stages]
    without = {
        "the context": peak_of(stages, stay, 0),
        "what earlier stages handed on": peak_of(alone, stay, context),
        "the activations of the stage that runs": peak_of(idle, stay, context),
        "the weights of a stage that does not stay, while it runs": peak_of(there, stay, context),
    }
    found = [what for what, peak in without.items() if peak <= budget]
    return f"did you forget {', or '.join(found)}?" if found else "that is far too much"


def _fitting(stages: Named, budget: int, context: int) -> Iterator[tuple[str, ...]]:
    names = [name for name, *_ in stages]
    groups = (combinations(names, count) for count in range(len(names) + 1))
    for stay in chain.from_iterable(groups):
        if peak_of(stages, stay, context) <= budget:
            yield stay


def _largest_first(stages: Named, budget: int, context: int) -> list[str]:
    stay: list[str] = []
    for name, *_ in sorted(stages, key=lambda stage: -stage[1]):
        if peak_of(stages, [*stay, name], context) <= budget:
            stay.append(name)
    return stay


def _total(weights: dict[str, int], names: Collection[str]) -> int:
    return sum(weights[name] for name in names)


def _refusal_hint(
    choose: Callable, stages: Named, budget: int, context: int, worst: str
) -> str | None:
    case = f"budget {budget}, where not even one model at a time fits"
    try:
        answer = choose(list(stages), budget, context)
    except ValueError as error:
        if worst in str(error):
            return None
        return f"{case}: name the stage that needs most, {worst}; the error says {str(error)!r}"
    return f"{case}: raise a ValueError that names the stage; got {answer!r}"
