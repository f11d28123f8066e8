"""Checks of lesson 05: right answers pass, and each usual mistake gets its own hint."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tfswa_lab.teaching.checks.lesson_05 import (
    check_peak_bytes,
    check_run_in_segments,
    check_state_bytes,
)


def bytes_by_training(parameters, optimizer):
    """What a step leaves behind, counted; torch's counters of steps are no state here."""
    weights = nn.Parameter(torch.ones(parameters))
    make = {
        "sgd": lambda: torch.optim.SGD([weights], lr=1e-3),
        "momentum": lambda: torch.optim.SGD([weights], lr=1e-3, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW([weights]),
    }[optimizer]()
    weights.sum().backward()
    make.step()
    state = [value for value in make.state[weights].values() if torch.is_tensor(value)]
    moments = [value for value in state if value.shape == weights.shape]
    return sum(tensor.nbytes for tensor in (weights, weights.grad, *moments))


def test_what_a_real_step_leaves_behind_passes():
    assert check_state_bytes(bytes_by_training)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda n, name: 0, "1 parameters, sgd: expected 8, got 0"),
        (lambda n, name: None, "expected a number"),
        (lambda n, name: bytes_by_training(n, name) // 4, "a float32 has four bytes"),
        (lambda n, name: bytes_by_training(n, name) - 4 * n, "one number per parameter is missing"),
        (lambda n, name: 16 * n, "1 parameters, sgd: expected 8, got 16"),
    ],
)
def test_usual_mistakes_in_counting_are_named(answer, hint, capsys):
    assert not check_state_bytes(answer)
    assert hint in capsys.readouterr().out


def rounded(size):
    return (size + 511) // 512 * 512


def peak_by_brute_force(blocks, give=rounded, gone=lambda died, event: died <= event):
    """Everything that is there, at every event."""
    last = max(max(born, died or 0) for _, born, died in blocks)
    return max(
        sum(
            give(size)
            for size, born, died in blocks
            if born <= event and (died is None or not gone(died, event))
        )
        for event in range(last + 1)
    )


def test_brute_force_passes():
    assert check_peak_bytes(peak_by_brute_force)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda blocks: 0, "one block of 1 byte: expected 512, got 0"),
        (lambda blocks: None, "expected a number"),
        (lambda blocks: peak_by_brute_force(blocks, give=lambda size: size), "round every size up"),
        (lambda blocks: sum(rounded(size) for size, *_ in blocks), "not there at the same time"),
        (
            lambda blocks: peak_by_brute_force(blocks, gone=lambda died, event: died < event),
            "may make room for another",
        ),
        (
            lambda blocks: peak_by_brute_force([b for b in blocks if b[2] is not None]),
            "blocks that are never released count",
        ),
    ],
)
def test_usual_mistakes_in_peaks_are_named(answer, hint, capsys):
    assert not check_peak_bytes(answer)
    assert hint in capsys.readouterr().out


def in_segments(blocks, x, segments):
    """By pieces of rounded-up length, and more than one loop."""
    cuts = torch.linspace(0, len(blocks), segments + 1).round().int().tolist()
    for start, stop in itertools.pairwise(cuts):

        def run(x, start=start, stop=stop):
            for block in blocks[start:stop]:
                x = block(x)
            return x

        x = checkpoint(run, x, use_reentrant=False)
    return x


def plainly(blocks, x, segments):
    for block in blocks:
        x = block(x)
    return x


def without_gradients(blocks, x, segments):
    with torch.no_grad():
        return plainly(blocks, x, segments)


def test_checkpointed_segments_pass():
    assert check_run_in_segments(in_segments)


def test_the_random_state_is_left_alone():
    before = torch.get_rng_state()
    assert check_run_in_segments(in_segments)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (plainly, "1 segments: 24 maps are kept, not 1"),
        (lambda blocks, x, segments: None, "expected a tensor, got NoneType"),
        (lambda blocks, x, segments: x, "values differ"),
        (without_gradients, "the output has no gradient"),
        (lambda blocks, x, segments: in_segments(blocks, x, 1), "only 1 maps are kept, not 3"),
        (
            lambda blocks, x, segments: in_segments(blocks, x.detach().requires_grad_(), segments),
            "gradients differ",
        ),
    ],
)
def test_usual_mistakes_in_segments_are_named(answer, hint, capsys):
    assert not check_run_in_segments(answer)
    assert hint in capsys.readouterr().out
