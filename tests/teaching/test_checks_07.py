"""Checks of lesson 07: right answers pass, and each usual mistake gets its own hint."""

import math

import numpy as np
import pytest
import torch

from tfswa_lab.teaching.checks.lesson_07 import check_batch_indices, check_factor, check_remix


def factor(step, warmup_steps, total_steps):
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return math.cos(math.pi / 2 * (step - warmup_steps) / (total_steps - warmup_steps)) ** 2


def test_warm_up_and_half_a_cosine_pass():
    assert check_factor(factor)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda *_: 1.0, "factor(0, 4, 20): expected 0.25, got 1.0"),
        (lambda *_: None, "expected a number, got None"),
        (lambda step, w, n: step / w if step < w else factor(step, w, n), "would not move at all"),
        (
            lambda step, w, n: factor(step, w, n) if step < w else factor(step, 0, n),
            "the cosine starts where the warm-up ends",
        ),
        (lambda step, w, n: min(1.0, (step + 1) / w), "expected 0.5"),
    ],
)
def test_usual_mistakes_in_the_schedule_are_named(answer, hint, capsys):
    assert not check_factor(answer)
    assert hint in capsys.readouterr().out


def remix(stems, generator):
    new = stems.clone()
    for n in range(stems.shape[1]):
        new[:, n] = stems[torch.randperm(len(stems), generator=generator), n]
    return new.sum(1), new


def whole_songs(stems, generator):
    new = stems[torch.randperm(len(stems), generator=generator)]
    return new.sum(1), new


def with_replacement(stems, generator):
    drawn = torch.randint(len(stems), stems.shape[:2], generator=generator)
    new = stems[drawn, torch.arange(stems.shape[1])]
    return new.sum(1), new


def stems_exchanged(stems, generator):
    new = remix(stems, generator)[1].flip(1)
    return new.sum(1), new


def in_place(stems, generator):
    for n in range(stems.shape[1]):
        stems[:, n] = stems[torch.randperm(len(stems), generator=generator), n]
    return stems.sum(1), stems


def without_the_generator(stems, generator):
    new = stems.clone()
    for n in range(stems.shape[1]):
        new[:, n] = stems[torch.randperm(len(stems)), n]
    return new.sum(1), new


def always_rolled(stems, generator):
    new = torch.stack([stems[:, n].roll(n, 0) for n in range(stems.shape[1])], 1)
    return new.sum(1), new


def test_stems_shuffled_one_by_one_pass():
    assert check_remix(remix)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda stems, generator: (stems.sum(1), stems), "still with their own song"),
        (lambda stems, generator: None, "return two tensors"),
        (lambda stems, generator: (None, None), "expected an array of shape (6, 3, 2, 4)"),
        (lambda stems, generator: (stems.sum(1), remix(stems, generator)[1]), "still the old one"),
        (lambda stems, generator: (None, remix(stems, generator)[1]), "the mixture: expected"),
        (whole_songs, "changed places as wholes"),
        (with_replacement, "comes twice"),
        (stems_exchanged, "holds something else"),
        (in_place, "the stems you were given have changed"),
        (without_the_generator, "the same seed gave another order"),
        (always_rolled, "two seeds gave the same order"),
    ],
)
def test_usual_mistakes_in_remixing_are_named(answer, hint, capsys):
    assert not check_remix(answer)
    assert hint in capsys.readouterr().out


def batch_indices(step, length, batch_size, seed):
    epoch, batch = divmod(step, length // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(length).tolist()
    return order[batch * batch_size : (batch + 1) * batch_size]


def in_order(step, length, batch_size, seed):
    first = step % (length // batch_size) * batch_size
    return list(range(first, first + batch_size))


def drawn_anew(step, length, batch_size, seed):
    return np.random.default_rng((seed, step)).integers(length, size=batch_size).tolist()


def one_order(step, length, batch_size, seed):
    order = np.random.default_rng(seed).permutation(length).tolist()
    return [order[i] for i in in_order(step, length, batch_size, seed)]


def seed_plus_epoch(step, length, batch_size, seed):
    epoch = step // (length // batch_size)
    return one_order(step, length, batch_size, seed + epoch)


def seed_ignored(step, length, batch_size, seed):
    return batch_indices(step, length, batch_size, 0)


def reseeds_torch(step, length, batch_size, seed):
    torch.manual_seed(1000 * seed + step // (length // batch_size))
    order = torch.randperm(length).tolist()
    return [order[i] for i in in_order(step, length, batch_size, seed)]


class Stateful:
    """Shuffles whenever an epoch begins, as a loop would: asked for one step alone, it is lost."""

    def __init__(self):
        self.random = np.random.default_rng(0)
        self.order = None

    def __call__(self, step, length, batch_size, seed):
        batch = step % (length // batch_size)
        if batch == 0 or self.order is None or len(self.order) != length:
            self.order = self.random.permutation(length).tolist()
        return self.order[batch * batch_size : (batch + 1) * batch_size]


def test_an_order_that_follows_from_seed_and_epoch_passes():
    assert check_batch_indices(batch_indices)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda *_: [], "expected a list of 4 indices, got []"),
        (lambda *_: None, "expected a list of 4 indices, got None"),
        (lambda *_: [0.0, 1.0, 2.0, 3.0], "whole numbers from 0 to 13"),
        (in_order, "every epoch has the same order"),
        (one_order, "every epoch has the same order"),
        (drawn_anew, "no index may come twice"),
        (seed_plus_epoch, "epoch 1 of seed 0 is epoch 0 of seed 1"),
        (seed_ignored, "two seeds give the same order"),
        (reseeds_torch, "global generator has moved"),
        (Stateful(), "another batch when it is asked for alone"),
    ],
)
def test_usual_mistakes_in_the_order_are_named(answer, hint, capsys):
    assert not check_batch_indices(answer)
    assert hint in capsys.readouterr().out
