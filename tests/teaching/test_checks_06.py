"""Checks of lesson 06: right answers pass, and each usual mistake gets its own hint."""

import gc

import numpy as np
import pytest
import torch

from tfswa_lab.teaching.checks.lesson_06 import (
    check_run_in_halves,
    check_scores_gib,
    check_shape_of,
)


def bytes_of(seconds, n_fft, heads, more_frames=1, more_bins=1):
    frames, bins = int(seconds * 44_100) // (n_fft // 4) + more_frames, n_fft // 2 + more_bins
    return 4 * heads * frames * bins * bins


def scores_gib(seconds, n_fft, heads):
    return bytes_of(seconds, n_fft, heads) / 1024**3


def time_path(seconds, n_fft, heads):
    frames = 1 + int(seconds * 44_100) // (n_fft // 4)
    return (n_fft // 2 + 1) * heads * frames**2 / 2**28


def test_a_score_for_every_pair_passes():
    assert check_scores_gib(scores_gib)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda *a: 0.0, "scores_gib(10, 4096, 12): expected 80.8"),
        (lambda *a: None, "expected a number, got None"),
        (lambda *a: bytes_of(*a), "that is bytes"),
        (lambda *a: bytes_of(*a) / 1e9, "that is GB"),
        (lambda *a: scores_gib(*a) / 4, "4 bytes"),
        (lambda s, n, h: scores_gib(s, n, h) / (n // 2 + 1), "squared"),
        (lambda s, n, h: scores_gib(s, n, 1), "every head"),
        (lambda s, n, h: bytes_of(s, n, h, more_bins=0) / 2**30, "0 Hz is one"),
        (lambda s, n, h: bytes_of(s, n, h, more_frames=0) / 2**30, "the first is at 0 s"),
        (lambda s, n, h: scores_gib(s, n, h) / (1 + int(44_100 * s) // (n // 4)), "every frame"),
        (time_path, "the time path"),
    ],
)
def test_usual_mistakes_in_scores_are_named(answer, hint, capsys):
    assert not check_scores_gib(answer)
    assert hint in capsys.readouterr().out


def shape_of(levels):
    late = levels[len(levels) // 2 :]
    if max(late) == min(late):
        return "plateau"
    return "staircase" if late == sorted(late) else "sawtooth"


def last_against_first(levels):
    if levels[-1] == levels[0]:
        return "plateau"
    return "staircase" if levels[-1] > levels[0] else "sawtooth"


def all_steps(levels):
    changes = np.diff(levels)
    if not changes.any():
        return "plateau"
    return "staircase" if (changes >= 0).all() else "sawtooth"


def every_step_must_climb(levels):
    changes = np.diff(levels[len(levels) // 2 :])
    if not changes.any():
        return "plateau"
    return "staircase" if (changes > 0).all() else "sawtooth"


def with_a_threshold(levels):
    late = levels[len(levels) // 2 :]
    return "plateau" if max(late) - min(late) < 2**13 else shape_of(levels)


def test_the_second_half_decides():
    assert check_shape_of(shape_of)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda levels: "plateau", "every step leaves something"),
        (lambda levels: None, "expected 'plateau', got None"),
        (last_against_first, "it comes down again and again"),
        (all_steps, "a warm-up has ended"),
        (every_step_must_climb, "in some steps only"),
        (with_a_threshold, "small steps are steps"),
    ],
)
def test_usual_mistakes_in_shapes_are_named(answer, hint, capsys):
    assert not check_shape_of(answer)
    assert hint in capsys.readouterr().out


def run_in_halves(step, clips):
    too_many = False
    try:
        results = [step(clips)]
    except torch.OutOfMemoryError:
        if len(clips) < 2:
            raise
        too_many = True
    if not too_many:
        return results
    middle = len(clips) // 2
    return run_in_halves(step, clips[:middle]) + run_in_halves(step, clips[middle:])


def inside_except(step, clips):
    try:
        return [step(clips)]
    except torch.OutOfMemoryError:
        gc.collect()
        if len(clips) < 2:
            raise
        middle = len(clips) // 2
        return inside_except(step, clips[:middle]) + inside_except(step, clips[middle:])


def with_the_error_stored(step, clips):
    failure = None
    try:
        return [step(clips)]
    except torch.OutOfMemoryError as error:
        failure = error
    if len(clips) < 2:
        raise failure
    middle, again = len(clips) // 2, with_the_error_stored
    return again(step, clips[:middle]) + again(step, clips[middle:])


def for_ever(step, clips):
    try:
        return [step(clips)]
    except torch.OutOfMemoryError:
        pass
    middle = len(clips) // 2
    return for_ever(step, clips[:middle]) + for_ever(step, clips[middle:])


def never_raises(step, clips):
    try:
        return [step(clips)]
    except torch.OutOfMemoryError:
        if len(clips) < 2:
            return []
    middle = len(clips) // 2
    return never_raises(step, clips[:middle]) + never_raises(step, clips[middle:])


def any_runtime_error(step, clips):
    try:
        return [step(clips)]
    except RuntimeError:
        if len(clips) < 2:
            raise
    middle, again = len(clips) // 2, any_runtime_error
    return again(step, clips[:middle]) + again(step, clips[middle:])


def any_error_swallowed(step, clips):
    try:
        return run_in_halves(step, clips)
    except ValueError:
        return []


def halved_once(step, clips):
    try:
        return [step(clips)]
    except torch.OutOfMemoryError:
        if len(clips) < 2:
            raise
    middle = len(clips) // 2
    return [step(clips[:middle]), step(clips[middle:])]


def second_half_first(step, clips):
    return run_in_halves(step, clips)[::-1]


def test_halves_pass():
    assert check_run_in_halves(run_in_halves)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda step, clips: [], "4 clips of which 4 fit: expected [(0, 1, 2, 3)], got []"),
        (lambda step, clips: [step(clips)], "8 clips of which 2 fit: OutOfMemoryError"),
        (halved_once, "8 clips of which 2 fit: OutOfMemoryError"),
        (second_half_first, "the first half comes first"),
        (inside_except, "retry after the except block"),
        (with_the_error_stored, "do not store the error"),
        (for_ever, "halved for ever"),
        (never_raises, "expected torch.OutOfMemoryError, got []"),
        (any_runtime_error, "RuntimeError is no lack of memory"),
        (any_error_swallowed, "ValueError; it was swallowed"),
    ],
)
def test_usual_mistakes_in_recovery_are_named(answer, hint, capsys):
    assert not check_run_in_halves(answer)
    assert hint in capsys.readouterr().out
