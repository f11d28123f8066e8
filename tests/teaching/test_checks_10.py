"""Checks of lesson 10: right answers pass, and each usual mistake gets its own hint."""

import traceback
from itertools import accumulate

import pytest

from tfswa_lab.performance.plan import Plan, Room, StageSizes
from tfswa_lab.teaching.checks.lesson_10 import check_choice, check_run, check_sequential_peak


def carried(stages):
    return list(accumulate((hands_on for *_, hands_on in stages), initial=0))[:-1]


# Exercise 1 --------------------------------------------------------------------------------------


def peak(stages, context):
    return context + max(w + a + c for (w, a, _), c in zip(stages, carried(stages), strict=True))


def by_the_package(stages, context):
    sizes = [
        StageSizes(str(i), {i: round(100 * w)}, round(100 * a), {("output", i): round(100 * c)})
        for i, (w, a, c) in enumerate(stages)
    ]
    plan = Plan(tuple(sizes), Room(10**9, round(100 * context)))
    return plan.policy("sequential").peak / 100


def test_right_peaks_pass():
    assert check_sequential_peak(peak)
    assert check_sequential_peak(by_the_package)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda stages, context: 0, "expected 6.95, got 0"),
        (lambda stages, context: None, "expected a number, got None"),
        (lambda stages, context: peak(stages, 0), "the context is missing"),
        (lambda stages, context: context + max(w + a for w, a, _ in stages), "add what earlier"),
        (
            lambda stages, context: (
                context
                + sum(w for w, *_ in stages)
                + max(a + c for (_, a, _), c in zip(stages, carried(stages), strict=True))
            ),
            "all models there",
        ),
        (
            lambda stages, context: (
                context
                + max(
                    w + a + c
                    for (w, a, _), c in zip(stages, [0, *(h for *_, h in stages)][:-1], strict=True)
                )
            ),
            "only the stage before",
        ),
        (
            lambda stages, context: (
                context
                + max(w + a + h + c for (w, a, h), c in zip(stages, carried(stages), strict=True))
            ),
            "own output",
        ),
        (
            lambda stages, context: (
                context
                + max(w for w, *_ in stages)
                + max(a for _, a, _ in stages)
                + max(carried(stages))
            ),
            "need not belong to the same stage",
        ),
        (lambda stages, context: context + sum(map(sum, stages)), "all stages were added up"),
    ],
)
def test_usual_mistakes_with_the_peak_are_named(answer, hint, capsys):
    assert not check_sequential_peak(answer)
    assert hint in capsys.readouterr().out


# Exercise 2 --------------------------------------------------------------------------------------


def run_once(load, run, value, linked=True):
    """The right answer, or one that forgets the linked errors."""
    model = load()
    try:
        return run(model, value)
    except BaseException as error:
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ if linked else None
        raise
    finally:
        del model


def without_care(load, run, value):
    return run(load(), value)


def only_deleted(load, run, value):
    model = load()
    try:
        return run(model, value)
    finally:
        del model


def swallowing(load, run, value):
    try:
        return run_once(load, run, value)
    except ZeroDivisionError:
        return None


def another_error(load, run, value):
    try:
        return run_once(load, run, value)
    except ZeroDivisionError:
        raise RuntimeError("failed") from None


def without_traceback(load, run, value):
    failed = None
    try:
        return run_once(load, run, value)
    except BaseException as error:
        failed = error.with_traceback(None)
    raise failed


def not_on_ctrl_c(load, run, value):
    model = load()
    try:
        return run(model, value)
    except Exception as error:
        for each in filter(None, (error, error.__cause__)):
            traceback.clear_frames(each.__traceback__)
        raise
    finally:
        del model


def remembering(load, run, value, models=[]):  # noqa: B006
    models.append(load())
    return run(models[-1], value)


def loading_twice(load, run, value):
    load()
    return run_once(load, run, value)


def test_a_run_that_frees_its_model_passes():
    assert check_run(run_once)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda load, run, value: None, "load was called 0 times"),
        (loading_twice, "load was called 2 times"),
        (lambda load, run, value: load() and None, "return what run(model, value) returns"),
        (remembering, "after a run without errors, the model is still alive"),
        (without_care, "the error is kept: the model is alive. The error holds its traceback"),
        (only_deleted, "the error is kept: the model is alive. The error holds its traceback"),
        (swallowing, "ZeroDivisionError should come out, nothing did"),
        (another_error, "ZeroDivisionError should come out, RuntimeError did"),
        (without_traceback, "its traceback no longer says where"),
        (lambda *given: run_once(*given, linked=False), "__cause__ has a traceback of its own"),
        (not_on_ctrl_c, "Ctrl-C is pressed: the model is alive"),
    ],
)
def test_usual_mistakes_in_the_run_are_named(answer, hint, capsys):
    assert not check_run(answer)
    assert hint in capsys.readouterr().out


# Exercise 3 --------------------------------------------------------------------------------------


def plan_of(stages, budget, context):
    sizes = [StageSizes(n, {n: w}, a, {("output", n): c}) for n, w, a, c in stages]
    return Plan(tuple(sizes), Room(budget, context))


def needed(stages, stay, context):
    """By the package's plan, which knows nothing of the check."""
    plan = plan_of(stages, 10**9, context)
    modes = {name: "resident" if name in stay else "sequential" for name, *_ in stages}
    return plan.peak(modes).size


def best(stages, budget, context, needed=needed):
    """All choices are tried."""
    names = [name for name, *_ in stages]
    weights = {name: w for name, w, *_ in stages}
    choices = [
        {name for bit, name in enumerate(names) if number >> bit & 1}
        for number in range(2 ** len(names))
    ]
    fitting = [stay for stay in choices if needed(stages, stay, context) <= budget]
    if not fitting:
        row = max(plan_of(stages, budget, context).stages, key=lambda row: row.peak)
        raise ValueError(f"{row.name} needs {row.peak}")
    return max(fitting, key=lambda stay: sum(weights[name] for name in stay))


def greedy(stages, budget, context):
    plan = plan_of(stages, budget, context)
    plan.check()
    return [name for name, mode in plan.modes.items() if mode == "resident"]


def forgetting(*what):
    """The best choice for stages without some of their bytes."""

    def needed_less(stages, stay, context):
        less = [
            (
                n,
                0 if "visitor" in what and n not in stay else w,
                0 if "activations" in what else a,
                0 if "carried" in what else c,
            )
            for n, w, a, c in stages
        ]
        return needed(less, stay, 0 if "context" in what else context)

    return lambda stages, budget, context: best(stages, budget, context, needed_less)


def weights_only(stages, budget, context):
    stay, left = [], budget - context
    for name, weights, *_ in sorted(stages, key=lambda stage: stage[1]):
        if weights <= left:
            stay.append(name)
            left -= weights
    return stay


def all_of_many(stages, budget, context):
    names = [name for name, *_ in stages]
    return best(stages, budget, context) if len(names) == 3 else names


def never_refusing(stages, budget, context):
    try:
        return best(stages, budget, context)
    except ValueError:
        return []


def refusing_without_a_name(stages, budget, context):
    try:
        return best(stages, budget, context)
    except ValueError:
        raise ValueError("too large") from None


def test_the_best_choice_passes():
    assert check_choice(best)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda *_: [], "nothing stays, and"),
        (lambda *_: None, "expected names of stages, got None"),
        (lambda *_: "large", "expected names of stages, got 'large'"),
        (lambda *_: ["nobody"], "'nobody' is no name of a stage"),
        (lambda stages, *_: [name for name, *_ in stages], "the activations of the stage"),
        (forgetting("visitor"), "the weights of a stage that does not stay, while it runs"),
        (all_of_many, "that is far too much"),
        (greedy, "the largest first is not always best"),
        (forgetting("context"), "did you forget the context"),
        (forgetting("carried"), "did you forget what earlier stages handed on?"),
        (forgetting("activations"), "the activations of the stage that runs"),
        (weights_only, "the peak is"),
        (never_refusing, "raise a ValueError that names the stage; got []"),
        (refusing_without_a_name, "the error says 'too large'"),
    ],
)
def test_usual_mistakes_with_the_choice_are_named(answer, hint, capsys):
    assert not check_choice(answer)
    assert hint in capsys.readouterr().out
