"""Checks of lesson 02: count the scores, cut the windows, write the mask.

Axis letters: `b` batch, `c` channels, `t` frames, `f` frequency bins, `l` tokens of one window.

Notebook: 02_attention_blocks
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tfswa_lab.models.attention import window_mask, window_partition
from tfswa_lab.teaching.checks import mismatch, mismatch_or_mistake, verdict


def check_stage_scores(stage_scores: Callable[[int, int, int, int], object]) -> bool:
    """Exercise 1: `stage_scores(t, f, window, stage)` gives the scores of `(TSA, FSA, SWA)`."""
    for t, f, window, stage in [(16, 24, 8, 0), (16, 24, 8, 1), (87, 1025, 8, 0), (87, 1025, 8, 3)]:
        hint = _scores_hint(stage_scores(t, f, window, stage), t >> stage, f >> stage, window)
        if hint:
            return verdict("stage_scores", f"{t} × {f} cells, stage {stage}: {hint}")
    return verdict("stage_scores", None)


def _scores_hint(got: object, t: int, f: int, window: int) -> str | None:
    cells = t * f
    padded_cells = (t + -t % window) * (f + -f % window)
    expected = (f * t**2, t * f**2, padded_cells * window**2)
    tsa, fsa, swa = expected
    mistakes = {
        "TSA and FSA are exchanged: TSA compares frames with frames": (fsa, tsa, swa),
        "SWA pads both axes to whole windows, and padded cells are computed as well": (
            (tsa, fsa, cells * window**2)
        ),
    }
    return mismatch_or_mistake(got, expected, mistakes)


def check_partition(partition: Callable[[Tensor, tuple[int, int]], object]) -> bool:
    """Exercise 2: `partition(x, window)` cuts `(b, c, t, f)` into tokens `(b·windows, l, c)`."""
    for shape, window in [((1, 2, 4, 6), (2, 3)), ((1, 3, 8, 8), (4, 4)), ((2, 5, 6, 20), (3, 4))]:
        x = torch.arange(torch.Size(shape).numel()).reshape(shape)
        expected = window_partition(x, window)
        got = partition(x, window)
        hint = mismatch(got, expected)
        if hint and isinstance(got, Tensor) and got.shape == expected.shape:
            hint = (
                "right shape, wrong cells; a reshape keeps the memory order, so split both "
                "axes, move the parts with permute, then join (b outermost, c innermost)"
            )
        if hint:
            return verdict("partition", f"x {shape}, window {window}: {hint}")
    return verdict("partition", None)


def check_mask(mask: Callable[[int, int, tuple, tuple], object]) -> bool:
    """Exercise 3: `mask(t, f, window, shift)`, which cell may see which, `(windows, l, l)`.

    Rows of padded cells are cut off later, so they may be anything but empty.
    """
    cases = [
        (8, 8, (4, 4), (0, 0)),
        (8, 8, (4, 4), (2, 2)),
        (7, 6, (4, 4), (0, 0)),
        (7, 10, (4, 5), (2, 1)),
        (3, 2, (4, 4), (3, 1)),
    ]
    for t, f, window, shift in cases:
        hint = _mask_hint(mask(t, f, window, shift), t, f, window, shift)
        if hint:
            case = f"{t} × {f} cells, window {window}, shift {shift}"
            return verdict("mask", f"{case}: {hint}")
    return verdict("mask", None)


def _mask_hint(got: object, t: int, f: int, window: tuple, shift: tuple) -> str | None:
    expected = window_mask(t, f, window, shift, torch.device("cpu"))
    if not isinstance(got, Tensor) or got.dtype != torch.bool or got.shape != expected.shape:
        seen = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, Tensor) else repr(got)
        return f"expected a boolean tensor of shape {tuple(expected.shape)}, got {seen}"
    real = _real_tokens(t, f, window, shift)
    pairs = real[:, :, None] & real[:, None, :]
    if (got & ~expected & pairs).any():
        return "cells from opposite ends of the plane, joined by the roll, see each other"
    if (got & real[:, :, None] & ~real[:, None, :]).any():
        return "a real cell sees a padded one"
    if (~got & expected & pairs).any():
        return "two neighbours in one window of the shifted grid do not see each other"
    if not got.any(-1).all():
        return "a row without a single True: its softmax is 0/0, and the gradients turn NaN"
    return None


def _real_tokens(t: int, f: int, window: tuple, shift: tuple) -> Tensor:
    """Boolean `(windows, l)`: False where a token of the rolled plane is padding."""
    plane = torch.zeros(t + -t % window[0], f + -f % window[1], dtype=torch.bool)
    plane[:t, :f] = True
    rolled = plane.roll((-shift[0], -shift[1]), dims=(0, 1))
    return window_partition(rolled[None, None], window)[..., 0]
