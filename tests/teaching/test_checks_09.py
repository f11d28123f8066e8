"""Checks of lesson 09: right answers pass, and each usual mistake gets its own hint."""

import copy
import itertools

import pytest
import torch

from tfswa_lab.performance import batch_size, oom
from tfswa_lab.teaching.checks.lesson_09 import (
    check_knee,
    check_largest_batch,
    check_step_in_parts,
)

# Exercise 1 --------------------------------------------------------------------------------------


def rates_of(rows):
    return {size: size / seconds for size, seconds in rows}


def good_enough(rows, share=0.95):
    rates = rates_of(rows)
    return [size for size, _ in rows if rates[size] >= share * max(rates.values())]


def test_the_smallest_good_size_passes():
    assert check_knee(lambda rows: min(good_enough(rows)))
    assert check_knee(batch_size.knee)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda rows: 0, "expected 16, got 0"),
        (lambda rows: None, "expected a number, got None"),
        (lambda rows: max(rates_of(rows), key=rates_of(rows).get), "that is the fastest size"),
        (lambda rows: max(rates_of(rows).values()), "that is a rate"),
        (lambda rows: max(rates_of(rows)), "that is the largest size\n"),
        (lambda rows: max(good_enough(rows)), "that is the largest size with so many"),
        (lambda rows: min(rows, key=lambda row: row[1])[0], "compare items per second"),
        (lambda rows: good_enough(rows)[0], "rows come in any order"),
        (lambda rows: min(good_enough(rows, 0.8)), "expected 8, got 4"),
    ],
)
def test_usual_mistakes_with_the_knee_are_named(answer, hint, capsys):
    assert not check_knee(answer)
    assert hint in capsys.readouterr().out


# Exercise 2 --------------------------------------------------------------------------------------


def step_in_parts(loss_of, batch, optimizer, size, *, share=None, kept=False, last=True):
    """The right answer, or one with a mistake."""
    if not kept:
        optimizer.zero_grad()
    failed = False
    try:
        for part in batch.split(size):
            if last or len(part) == size:
                (
                    loss_of(part) * (share(part, size) if share else len(part) / len(batch))
                ).backward()
    except torch.OutOfMemoryError:
        if size == 1:
            raise
        failed = True
    if failed:
        kinds = {"share": share, "kept": kept, "last": last}
        return step_in_parts(loss_of, batch, optimizer, size // 2, **kinds)
    optimizer.step()
    return size


def by_the_package(loss_of, batch, optimizer, size):
    oom.train_step(loss_of, batch, optimizer, size=size)
    return oom.part_size(optimizer)


def again_in_except(loss_of, batch, optimizer, size):
    optimizer.zero_grad()
    try:
        for part in batch.split(size):
            (loss_of(part) * len(part) / len(batch)).backward()
    except torch.OutOfMemoryError:
        if size == 1:
            raise
        return again_in_except(loss_of, batch, optimizer, size // 2)
    optimizer.step()
    return size


def a_step_for_each_part(loss_of, batch, optimizer, size):
    for part in batch.split(3):
        optimizer.zero_grad()
        loss_of(part).backward()
        optimizer.step()
    return 3


def without_a_retreat(loss_of, batch, optimizer, size):
    optimizer.zero_grad()
    loss_of(batch).backward()
    optimizer.step()
    return size


def size_asked_for(loss_of, batch, optimizer, size):
    step_in_parts(loss_of, batch, optimizer, size)
    return size


def swallowing(loss_of, batch, optimizer, size):
    try:
        return step_in_parts(loss_of, batch, optimizer, size)
    except RuntimeError:  # torch.OutOfMemoryError is one
        return 0


def failed_gradients_kept(loss_of, batch, optimizer, size):
    optimizer.zero_grad()
    return step_in_parts(loss_of, batch, optimizer, size, kept=True)


def test_steps_with_the_gradient_of_the_whole_batch_pass():
    assert check_step_in_parts(step_in_parts)
    assert check_step_in_parts(by_the_package)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda loss_of, batch, optimizer, size: size, "the weights have not moved"),
        (without_a_retreat, "the error came out"),
        (again_in_except, "forward pass: when the next try began"),
        (failed_gradients_kept, "… in the backward pass: the failed try has left gradients"),
        (a_step_for_each_part, "the optimizer made 3 steps"),
        (lambda *given: step_in_parts(*given, share=lambda p, size: 1 / 3), "counts alike"),
        (lambda *given: step_in_parts(*given, share=lambda p, size: 1.0), "are added up"),
        (lambda *given: step_in_parts(*given, kept=True), "old gradients"),
        (lambda *given: step_in_parts(*given, last=False), "last items are missing"),
        (size_asked_for, "expected 3, got 7"),
        (swallowing, "must come out"),
    ],
)
def test_usual_mistakes_in_the_step_are_named(answer, hint, capsys):
    assert not check_step_in_parts(answer)
    told = capsys.readouterr().out
    assert hint in told


# Exercise 3 --------------------------------------------------------------------------------------

KINDS = ("weights", "optimizer", "gradients", "modes", "generator")


def remembered(net, optimizer, left_out=(), shared=False):
    """A function that restores all kinds of state but those left out."""
    copied = copy.copy if shared else copy.deepcopy
    saved = copied(net.state_dict()), copied(optimizer.state_dict())
    gradients = copy.deepcopy([weight.grad for weight in net.parameters()])
    modes, generator = [part.training for part in net.modules()], torch.get_rng_state()

    def restore():
        if "weights" not in left_out:
            net.load_state_dict(saved[0])
        if "optimizer" not in left_out:
            optimizer.load_state_dict(copied(saved[1]))
        for weight, gradient in zip(net.parameters(), copy.deepcopy(gradients), strict=True):
            weight.grad = weight.grad if "gradients" in left_out else gradient
        for part, mode in zip(net.modules(), modes, strict=True):
            part.training = part.training if "modes" in left_out else mode
        if "generator" not in left_out:
            torch.set_rng_state(generator)

    return restore


def search(
    step,
    net,
    optimizer,
    limit,
    *,
    steps=2,
    bisect=True,
    catch=torch.OutOfMemoryError,
    at_end=False,
    **how,
):
    """The right answer, or one with a mistake."""
    restore = remembered(net, optimizer, **how)

    def fits(n):
        try:
            for _ in range(steps):
                step(n)
        except catch:
            return False
        finally:
            if not at_end:
                restore()
        return True

    low = 0
    for n in (2**k for k in itertools.count()):
        if n > limit or not fits(n):
            break
        low = n
    high = min(2 * low or 1, limit + 1)
    while bisect and high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    restore()
    return low


def by_find_batch_size(step, net, optimizer, limit):
    try:
        found = batch_size.find_batch_size(step, state=[net, optimizer], maximum=limit, margin=0)
    except RuntimeError:
        return 0
    return found.value


def beyond_the_limit(step, net, optimizer, limit):
    return min(limit, search(step, net, optimizer, 10**4))


def test_searches_that_restore_everything_pass():
    assert check_largest_batch(search)
    assert check_largest_batch(by_find_batch_size)


@pytest.mark.parametrize(
    ("mistake", "hint"),
    [
        ({"bisect": False}, "13 items fit: a power of two"),
        ({"steps": 1}, "one step is not enough"),
        ({"left_out": ["weights"]}, "a fresh training: weights changed"),
        ({"left_out": ["optimizer"]}, "optimizer changed; state_dict()"),
        ({"left_out": ["gradients"]}, "gradients changed; where there was none"),
        ({"left_out": ["modes"]}, "modes changed; remember"),
        ({"left_out": ["generator"]}, "random generator changed"),
        ({"shared": True}, "changed"),
        ({"catch": BaseException}, "Ctrl-C did not come out"),
        ({"at_end": True}, "after Ctrl-C, weights had changed"),
    ],
)
def test_usual_mistakes_in_the_search_are_named(mistake, hint, capsys):
    assert not check_largest_batch(lambda *given: search(*given, **mistake))
    assert hint in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda *_: 0, "13 items fit: expected 13, got 0"),
        (lambda *_: None, "expected a number, got None"),
        (beyond_the_limit, "were tried, and limit=40"),
    ],
)
def test_wrong_answers_of_the_search_are_named(answer, hint, capsys):
    assert not check_largest_batch(answer)
    assert hint in capsys.readouterr().out


def test_checks_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    check_largest_batch(lambda *given: search(*given, left_out=["generator"]))
    check_step_in_parts(step_in_parts)
    assert torch.equal(before, torch.get_rng_state())
