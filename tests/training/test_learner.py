"""Saved and restored, a learner repeats its steps to the bit, wherever it was interrupted."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate
from toy_run import ToyLoss, ToySongs, toy_trainer

from tfswa_lab.data.augment import Gain, SpectrogramMasking
from tfswa_lab.training.randomness import random_state

pytestmark = pytest.mark.usefixtures("one_thread")


def steps(count, accumulate):
    """Batches for some steps."""
    songs = iter(ToySongs(4 * count * accumulate))
    batches = [default_collate([next(songs) for _ in range(4)]) for _ in range(count * accumulate)]
    return [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]


def same(first, second):
    """Whether two nests of containers hold the same, to the bit."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


class Chancy(ToyLoss):
    """Draws from every global generator; fails, or has an infinite gradient, when told to."""

    fails = steep = False

    def forward(self, estimates, targets):
        if self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        noise = random.random() + np.random.random() + torch.rand(()).item()  # noqa: NPY002
        total, terms = super().forward(estimates, targets)
        if self.steep:
            total = total + (estimates * 0).sum().sqrt()
        return total * (1 + 0.1 * noise), terms


def learner(**config):
    usual = {"norm": "batch", "dropout": 0.3, "max_steps": 50, "loss": Chancy()}
    return toy_trainer(**{**usual, **config}).learner


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("before", [0, 2], ids=["untouched", "after two steps"])
def test_restored_it_repeats_its_steps_to_the_bit(precision, accumulate, before):
    changes = {"augment": Gain(), "masking": SpectrogramMasking(max_bins=4, max_frames=8)}
    it = learner(precision=precision, accumulate=accumulate, **changes)
    batches = steps(before + 3, accumulate)
    for step in batches[:before]:
        it.step(step)
    saved = it.state_dict()
    ends = []
    for _ in range(3):  # the state is as good after it was used
        it.load_state_dict(saved)
        assert same(it.state_dict(), saved)
        scalars = [it.step(step) for step in batches[before:]]
        ends.append((scalars, it.state_dict()))
    assert not same(ends[0][1]["separator"], saved["separator"])
    assert same(ends[0], ends[1])
    assert same(ends[1], ends[2])


def fails_in_the_loss(it, monkeypatch):
    monkeypatch.setattr(it.loss, "fails", True)


def fails_in_the_backward_pass(it, monkeypatch):
    def fail(gradient):
        raise RuntimeError("CUDA error: out of memory")

    forward = it.loss.forward

    def hooked(estimates, targets):
        estimates.register_hook(fail)
        return forward(estimates, targets)

    monkeypatch.setattr(it.loss, "forward", hooked)


def fails_after_the_gradients_are_clipped(it, monkeypatch):
    """Where AdamW's first step makes its moments."""

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(it.optimizer, "step", fail)


def fails_between_weights_and_average(it, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(it.ema, "update_parameters", fail)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize(
    "failure",
    [
        fails_in_the_loss,
        fails_in_the_backward_pass,
        fails_after_the_gradients_are_clipped,
        fails_between_weights_and_average,
    ],
)
@pytest.mark.parametrize("before", [0, 2])
def test_an_error_within_a_step_leaves_no_trace_in_a_restored_one(
    monkeypatch, precision, failure, before
):
    it = learner(precision=precision, accumulate=2)
    batches = steps(before + 2, 2)
    for step in batches[:before]:
        it.step(step)
    saved = it.state_dict()
    expected = [it.step(step) for step in batches[before:]], it.state_dict()

    it.load_state_dict(saved)
    with monkeypatch.context() as context:
        failure(it, context)
        with pytest.raises((RuntimeError, MemoryError)):
            it.step(batches[before])
    it.load_state_dict(saved)
    assert all(parameter.grad is None for parameter in it.separator.parameters())
    assert same(it.state_dict(), saved)
    assert same(([it.step(step) for step in batches[before:]], it.state_dict()), expected)


def test_the_scale_of_half_precision_goes_back_too(monkeypatch):
    it = learner(precision="16-mixed")
    (first,), (second,) = steps(2, 1)
    it.step([first])
    saved = it.state_dict()
    assert saved["scaler"]["scale"] == 65_536
    monkeypatch.setattr(it.loss, "steep", True)
    it.step([second])  # overflows: the scale is halved, the weights stay
    after = it.state_dict()
    assert after["scaler"]["scale"] == 32_768
    assert same(after["ema"], saved["ema"])
    it.load_state_dict(saved)
    assert same(it.state_dict(), saved)


def test_a_state_fits_another_learner_of_the_same_settings():
    first, second = learner(), learner()
    batches = steps(4, 1)
    for step in batches[:2]:
        first.step(step)
    saved = first.state_dict()
    expected = [first.step(step) for step in batches[2:]]
    second.load_state_dict(saved)
    assert [second.step(step) for step in batches[2:]] == expected
    assert same(second.state_dict(), first.state_dict())


def test_without_a_random_state_the_generators_stay_as_they_are():
    it = learner()
    saved = it.state_dict() | {"random": None}
    torch.rand(5)
    before = random_state(torch.device("cpu"))
    it.load_state_dict(saved)
    assert same(random_state(torch.device("cpu")), before)
