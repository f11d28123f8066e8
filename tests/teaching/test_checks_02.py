"""Checks of lesson 02: right answers pass, and each usual mistake gets its own hint."""

import pytest
import torch

from tfswa_lab.models.attention import (
    FrequencySequenceAttention,
    MultiHeadAttention,
    ShiftedWindowAttention,
    TemporalSequenceAttention,
    window_mask,
)
from tfswa_lab.models.tfswa_block import DownsampleBlock
from tfswa_lab.teaching.checks.lesson_02 import (
    check_mask,
    check_partition,
    check_stage_scores,
)


def counted_scores(t, f, window, stage):
    """Run the three units on a map halved by real convolutions, and count what they attend to."""
    x = torch.zeros(1, 1, t, f)
    for _ in range(stage):
        x = DownsampleBlock(1, 1).eval()(x)
    counts = []
    count = lambda _, tokens: counts.append(tokens[0].shape[0] * tokens[0].shape[1] ** 2)  # noqa: E731
    for unit in (
        TemporalSequenceAttention(1, 1),
        FrequencySequenceAttention(1, 1),
        ShiftedWindowAttention(1, 1, window),
    ):
        unit.attention = Stub()
        unit.attention.register_forward_pre_hook(count)
        unit(x)
    return tuple(counts)


class Stub(MultiHeadAttention):
    """Attends to nothing, so that large maps cost nothing."""

    def __init__(self):
        super().__init__(1, 1)

    def forward(self, tokens, mask=None):
        return tokens


def test_scores_counted_on_the_real_units_pass():
    assert check_stage_scores(counted_scores)


def scores_without_padding(t, f, window, stage):
    t, f = t >> stage, f >> stage
    return f * t**2, t * f**2, t * f * window**2


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda t, f, window, stage: (0, 0, 0), "16 × 24 cells, stage 0: expected"),
        (lambda t, f, window, stage: None, "stage 0: expected an array"),
        (lambda t, f, window, stage: counted_scores(t, f, window, 0), "stage 1: expected"),
        (lambda *sizes: counted_scores(*sizes)[1::-1] + counted_scores(*sizes)[2:], "exchanged"),
        (scores_without_padding, "stage 1: SWA pads both axes"),
    ],
)
def test_usual_mistakes_in_counting_are_named(answer, hint, capsys):
    assert not check_stage_scores(answer)
    assert hint in capsys.readouterr().out


def cut_in_loops(x, window):
    windows = [
        x[n, :, i : i + window[0], j : j + window[1]].flatten(1).T
        for n in range(x.shape[0])
        for i in range(0, x.shape[2], window[0])
        for j in range(0, x.shape[3], window[1])
    ]
    return torch.stack(windows)


def test_windows_cut_in_loops_pass():
    assert check_partition(cut_in_loops)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda x, window: x, "expected an array of shape (4, 6, 2), got shape (1, 2, 4, 6)"),
        (lambda x, window: cut_in_loops(x, window).reshape_as(x), "got shape"),
        (
            lambda x, window: x.reshape(cut_in_loops(x, window).shape),
            "right shape, wrong cells",
        ),
        (lambda x, window: cut_in_loops(x, window).flip(0), "right shape, wrong cells"),
    ],
)
def test_usual_mistakes_in_cutting_are_named(answer, hint, capsys):
    assert not check_partition(answer)
    assert hint in capsys.readouterr().out


def mask_by_definition(t, f, window, shift):
    """Walk over the computed windows, token by token, and ask where each token comes from."""
    padded_t, padded_f = t + -t % window[0], f + -f % window[1]
    rows = []
    for i in range(0, padded_t, window[0]):
        for j in range(0, padded_f, window[1]):
            homes = []
            for a in range(window[0]):
                for b in range(window[1]):
                    p, q = (i + a + shift[0]) % padded_t, (j + b + shift[1]) % padded_f
                    real = p < t and q < f
                    home = ((p - shift[0]) // window[0], (q - shift[1]) // window[1])
                    homes.append(home if real else None)
            rows.append([[x == y for y in homes] for x in homes])
    return torch.tensor(rows)


def test_a_mask_written_from_the_definition_passes():
    assert check_mask(mask_by_definition)


def everyone(t, f, window, shift):
    return torch.ones_like(mask_by_definition(t, f, window, shift))


def blind_to_padding(t, f, window, shift):
    padded_t, padded_f = t + -t % window[0], f + -f % window[1]
    return window_mask(padded_t, padded_f, window, shift, "cpu")


def empty_rows_for_padding(t, f, window, shift):
    """Every padded cell forbidden as query and as key."""
    whole = mask_by_definition(t, f, window, shift)
    plane = torch.zeros(t + -t % window[0], f + -f % window[1], dtype=torch.bool)
    plane[:t, :f] = True
    rolled = plane.roll((-shift[0], -shift[1]), dims=(0, 1))
    real = cut_in_loops(rolled[None, None], window)[..., 0]
    return whole & real[:, :, None] & real[:, None, :]


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda t, f, window, shift: None, "expected a boolean tensor of shape (4, 16, 16)"),
        (lambda *sizes: mask_by_definition(*sizes).float(), "got torch.float32"),
        (everyone, "shift (2, 2): cells from opposite ends of the plane, joined by the roll"),
        (blind_to_padding, "7 × 6 cells, window (4, 4), shift (0, 0): a real cell sees a padded"),
        (lambda *sizes: ~everyone(*sizes), "do not see each other"),
        (empty_rows_for_padding, "a row without a single True"),
    ],
)
def test_usual_mistakes_in_the_mask_are_named(answer, hint, capsys):
    assert not check_mask(answer)
    assert hint in capsys.readouterr().out
