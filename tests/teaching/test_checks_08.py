"""Checks of lesson 08: right answers pass, and each usual mistake gets its own hint."""

import itertools
import math

import numpy as np
import pytest

from tfswa_lab.teaching.checks.lesson_08 import (
    check_dataset_score,
    check_si_sdr_db,
    check_sign_flip_p,
)


def ratio_db(signal, error):
    return 10 * (signal.square().sum() / error.square().sum()).log10().item()


def si_sdr_db(reference, estimate):
    scaled = (reference * estimate).sum() / reference.square().sum() * reference
    return ratio_db(scaled, estimate - scaled)


def estimate_scaled(reference, estimate):
    scaled = (reference * estimate).sum() / estimate.square().sum() * estimate
    return ratio_db(reference, scaled - reference)


def a_gain_for_each_channel(reference, estimate):
    pairs = zip(reference, estimate, strict=True)
    return sum(si_sdr_db(one, other) for one, other in pairs) / len(reference)


def test_the_reference_scaled_to_fit_passes():
    assert check_si_sdr_db(si_sdr_db)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda s, y: 0.0, "for an estimate of about 1 s: expected"),
        (lambda s, y: None, "expected a number, got None"),
        (lambda s, y: ratio_db(s, y - s), "the level still counts"),
        (estimate_scaled, "scales the estimate"),
        (lambda s, y: 2 * si_sdr_db(s, y), "not 20"),
        (lambda s, y: si_sdr_db(s, y) / 2, "squares already"),
        (lambda s, y: si_sdr_db(s, y) / 10 * math.log(10), "not the natural logarithm"),
        (lambda s, y: -si_sdr_db(s, y), "the signal belongs above"),
        (a_gain_for_each_channel, "one gain for both channels"),
        (lambda s, y: si_sdr_db(s - s.mean(), y - y.mean()), "expected"),
    ],
)
def test_usual_mistakes_in_si_sdr_are_named(answer, hint, capsys):
    assert not check_si_sdr_db(answer)
    assert hint in capsys.readouterr().out


def dataset_score(songs):
    return np.median([np.nanmedian(song) for song in songs if not np.isnan(song).all()])


def silence_as_zero(songs):
    return np.median([np.median(np.nan_to_num(song)) for song in songs])


def instrumentals_as_zero(songs):
    return np.median([0.0 if np.isnan(song).all() else np.nanmedian(song) for song in songs])


def in_place(songs):
    for song in songs:
        np.nan_to_num(song, copy=False)
    return dataset_score(songs)


def test_the_median_of_medians_passes():
    assert check_dataset_score(dataset_score)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda songs: 0.0, "expected"),
        (lambda songs: np.median([np.median(song) for song in songs]), "contains NaN"),
        (
            lambda songs: np.nanmean([np.nanmedian(s) for s in songs[:2] + songs[3:]]),
            "their median",
        ),
        (lambda songs: np.median([np.nanmean(s) for s in songs[:2] + songs[3:]]), "not its mean"),
        (lambda songs: np.nanmedian(np.concatenate(songs)), "all frames together"),
        (silence_as_zero, "does not count as 0 dB"),
        (instrumentals_as_zero, "does not take part"),
        (in_place, "the arrays you were given have changed"),
    ],
)
def test_usual_mistakes_in_scores_are_named(answer, hint, capsys):
    assert not check_dataset_score(answer)
    assert hint in capsys.readouterr().out


def means(differences):
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    return (signs * differences).mean(1)  # the observed one first


def sign_flip_p(differences):
    found = np.abs(means(differences))
    return np.mean(found >= found[0] - 1e-12)


def one_sided(differences):
    return np.mean(means(differences) >= differences.mean() - 1e-12)


def other_side(differences):
    return np.mean(means(differences) <= differences.mean() + 1e-12)


def strictly_farther(differences):
    return np.mean(np.abs(means(differences)) > abs(differences.mean()) + 1e-12)


def without_itself(differences):
    found = np.abs(means(differences))
    return np.mean(found[1:] >= found[0] - 1e-12)


def without_tolerance(differences):
    return np.mean(np.abs(means(differences)) >= abs(differences.mean()))


def test_all_signs_counted_pass():
    assert check_sign_flip_p(sign_flip_p)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda d: 0.5, "sign_flip_p([0.3, 0.1, 0.4, 0.2]): expected 0.125, got 0.5"),
        (lambda d: None, "expected a number, got None"),
        (one_sided, "as far below 0"),
        (other_side, "as far above 0"),
        (strictly_farther, "p can never be 0"),
        (without_itself, "one of the 2^n, too"),
        (lambda d: sign_flip_p(d) * 2 ** len(d), "p is their share"),
        (lambda d: 1 - sign_flip_p(d), "the share of the others"),
        (without_tolerance, "differ in the last digit"),
    ],
)
def test_usual_mistakes_in_signs_are_named(answer, hint, capsys):
    assert not check_sign_flip_p(answer)
    assert hint in capsys.readouterr().out
