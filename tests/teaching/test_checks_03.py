"""Checks of lesson 03: right answers pass, and each usual mistake gets its own hint."""

import copy

import pytest
import torch
from torch import nn

from tfswa_lab.models.tfswa_block import TFSWABlock
from tfswa_lab.teaching.checks.lesson_03 import (
    check_apply_masks,
    check_block_parameters,
    check_without,
)


def test_the_published_formula_passes():
    assert check_block_parameters(lambda c: 40 * c**2 + 36 * c)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda c: 0, "8 channels: expected 2848, got 0"),
        (lambda c: None, "expected a number"),
        (lambda c: 3 * (12 * c**2 + 10 * c), "add the input projection and the fusion"),
        (lambda c: 40 * c**2 + 32 * c, "both batch norms"),
        (lambda c: 40 * c**2 + 40 * c, "running mean and variance are buffers"),
    ],
)
def test_usual_mistakes_in_counting_are_named(answer, hint, capsys):
    assert not check_block_parameters(answer)
    assert hint in capsys.readouterr().out


def masks_in_loops(output, spectrogram, stft, length):
    """Output 2n is the left mask of stem n, output 2n + 1 the right one."""
    b, channels = output.shape[:2]
    stems = torch.zeros(b, channels // 2, 2, length)
    for n in range(channels // 2):
        for c in range(2):
            masked = output[:, 2 * n + c].transpose(1, 2) * spectrogram[:, c]
            stems[:, n, c] = stft.istft(masked, length)
    return stems


def stems_and_channels_exchanged(output, spectrogram, stft, length):
    stems = output.shape[1] // 2
    order = [n if c == 0 else stems + n for n in range(stems) for c in range(2)]
    return masks_in_loops(output[:, order], spectrogram, stft, length)


def test_masks_applied_in_loops_pass():
    assert check_apply_masks(masks_in_loops)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda *_: None, "expected an array of shape (2, 1, 2, 512)"),
        (lambda output, *_: output, "got shape"),
        (
            lambda output, *rest: masks_in_loops(output.sigmoid(), *rest),
            "a second one never falls below 0.5",
        ),
        (stems_and_channels_exchanged, "left and right of the first stem"),
        (lambda *inputs: 2 * masks_in_loops(*inputs), "values differ"),
    ],
)
def test_usual_mistakes_in_masking_are_named(answer, hint, capsys):
    assert not check_apply_masks(answer)
    assert hint in capsys.readouterr().out


class Bypass(nn.Module):
    """Does nothing, and keeps the parameters of what it replaced."""

    def __init__(self, unit):
        super().__init__()
        self.weights = nn.ParameterList(unit.parameters())

    def forward(self, x):
        return x


class Leak(nn.Module):
    """A stranger in the place of a view, without parameters, that mixes all cells."""

    def forward(self, x):
        return x + x.mean((2, 3), keepdim=True)


def replaced_by(make, everywhere=True, in_place=False):
    """An answer to exercise 3 that puts `make(unit)` where the view was."""

    def without(separator, view):
        changed = separator if in_place else copy.deepcopy(separator)
        blocks = [block for block in changed.modules() if isinstance(block, TFSWABlock)]
        for block in blocks if everywhere else blocks[:4]:
            setattr(block, view, make(getattr(block, view)))
        return changed

    return without


def test_identity_in_place_of_the_view_passes():
    assert check_without(replaced_by(lambda unit: nn.Identity()))


def no_attention_at_all(separator, view):
    changed = copy.deepcopy(separator)
    for block in changed.modules():
        if isinstance(block, TFSWABlock):
            block.tsa = block.fsa = block.swa = nn.Identity()
    return changed


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda separator, view: separator, "tsa: some block still has it"),
        (lambda separator, view: None, "expected a Separator, got NoneType"),
        (replaced_by(lambda unit: nn.Identity(), everywhere=False), "some block still has it"),
        (replaced_by(lambda unit: nn.Identity(), in_place=True), "work on a copy"),
        (replaced_by(Bypass), "gone with their parameters"),
        (replaced_by(lambda unit: Leak()), "still depends on cells"),
        (no_attention_at_all, "the other two views should stay"),
    ],
)
def test_usual_mistakes_in_removing_a_view_are_named(answer, hint, capsys):
    assert not check_without(answer)
    assert hint in capsys.readouterr().out
