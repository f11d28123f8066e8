"""Checks of lesson 08: a ratio regardless of level, the score of a data set, an exact test.

Axis letters: `c` channels, `s` samples, `m` frames.

Notebook: 08_evaluation
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tfswa_lab.evaluation.ratios import si_sdr, usdr
from tfswa_lab.teaching.checks import mismatch_or_mistake, verdict


def check_si_sdr_db(si_sdr_db: Callable[[Tensor, Tensor], object]) -> bool:
    """Exercise 1: `si_sdr_db(reference, estimate)` in dB, of waveforms `(c, s)`."""
    generator = torch.Generator().manual_seed(0)
    reference, error = torch.randn(2, 2, 400, generator=generator, dtype=torch.float64)
    for gain in (1.0, 0.3, -2.0):
        # Channels differ, and there is a mean: neither may be removed.
        estimate = gain * (reference * torch.tensor([[1.0], [0.7]]) + 0.3 * error + 0.1)
        if hint := _si_sdr_hint(si_sdr_db(reference, estimate), reference, estimate):
            return verdict("si_sdr_db", f"for an estimate of about {gain:g} s: {hint}")
    return verdict("si_sdr_db", None)


def _si_sdr_hint(got: object, reference: Tensor, estimate: Tensor) -> str | None:
    pair = reference[None], estimate[None]
    expected = si_sdr(*pair).item()
    gain = (reference * estimate).sum() / estimate.square().sum()
    mistakes = {
        "the level still counts; scale the reference by the best gain": usdr(*pair).item(),
        "that scales the estimate to fit the reference; scale the reference": (
            usdr(pair[0], gain * pair[1]).item()
        ),
        "energies are squares already: 10 log10, not 20 log10 of them": expected / 2,
        "10 log10 of energies, not 20": 2 * expected,
        "take log10, not the natural logarithm": expected / 10 * np.log(10),
        "the signal belongs above, the error below": -expected,
        "one gain for both channels, not one for each": si_sdr(reference, estimate).mean().item(),
    }
    return mismatch_or_mistake(got, expected, mistakes)


def check_dataset_score(dataset_score: Callable[[Sequence[np.ndarray]], object]) -> bool:
    """Exercise 2: `dataset_score(songs)` of the ratios `(m,)` of each song, NaN where silent."""
    songs = [
        np.array([1.0, 2.0, 9.0]),
        np.array([4.0, np.nan, 6.0, 20.0, 30.0]),
        np.array([np.nan, np.nan]),
        np.array([3.0, np.nan, 4.0, np.nan]),
        np.array([8.0]),
    ]
    given = [song.copy() for song in songs]
    got = dataset_score(given)
    if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(songs, given, strict=True)):
        return verdict("dataset_score", "the arrays you were given have changed; make new ones")
    return verdict("dataset_score", _score_hint(got, songs))


def _score_hint(got: object, songs: list[np.ndarray]) -> str | None:
    sounding = [song[~np.isnan(song)] for song in songs]
    sounding = [song for song in sounding if len(song)]
    means, medians = [x.mean() for x in sounding], [np.median(x) for x in sounding]
    silent_as_zero = [np.median(np.nan_to_num(song)) for song in songs]
    mistakes = {
        "that is the mean of the songs' medians; take their median": np.mean(medians),
        "first the median of each song, not its mean": np.median(means),
        "all frames together: a long song would count more": np.median(np.concatenate(sounding)),
        "a silent frame has no value; it does not count as 0 dB": np.median(silent_as_zero),
        "a song without a value does not take part, not even as 0 dB": np.median([*medians, 0.0]),
    }
    return mismatch_or_mistake(got, np.median(medians), mistakes)


def check_sign_flip_p(sign_flip_p: Callable[[np.ndarray], object]) -> bool:
    """Exercise 3: `sign_flip_p(differences)`, an exact p-value of paired differences."""
    cases = (
        [0.3, 0.1, 0.4, 0.2],  # all better: only two of sixteen are as far from 0
        [-0.3, -0.1, -0.4, -0.2],
        [0.5, -0.2, 0.7, 0.1, -0.3, 0.4],
        [0.1, 0.2, -0.3],  # a mean of 0 but for rounding: every choice is as far
        [1.0, 1.0, 1.0, -1.0, 1.0],  # ties
    )
    for case in cases:
        if hint := _sign_flip_hint(sign_flip_p(np.array(case)), np.array(case)):
            return verdict("sign_flip_p", f"sign_flip_p({case}): {hint}")
    return verdict("sign_flip_p", None)


def _sign_flip_hint(got: object, differences: np.ndarray) -> str | None:
    count = 2 ** len(differences)
    signs = 1 - 2 * (np.arange(count)[:, None] >> np.arange(len(differences)) & 1)
    means, observed = (signs * differences).mean(1), differences.mean()
    far = np.abs(means) >= abs(observed) - 1e-9
    farther = np.abs(means) > abs(observed) + 1e-9
    mistakes = {
        "count both sides: a mean as far below 0 is as odd": (means >= observed - 1e-9).mean(),
        "count both sides: a mean as far above 0 is as odd": (means <= observed + 1e-9).mean(),
        "“at least as far”: equally far counts, so p can never be 0": farther.mean(),
        "the given choice of signs is one of the 2^n, too": (far.sum() - 1) / (count - 1),
        "that is a number of choices; p is their share": float(far.sum()),
        "that is the share of the others": 1 - far.mean(),
        "sums of floats differ in the last digit; let means within 1e-9 be equally far": (
            (np.abs(means) >= abs(observed)).mean()
        ),
    }
    return mismatch_or_mistake(got, far.mean(), mistakes)
