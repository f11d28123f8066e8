"""Checks of lesson 06: right answers pass, and each usual mistake gets its own hint."""

import gc
from contextlib import suppress

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


def size_of(frames, bins, heads, bytes_each=4, unit=2**30):
    return bytes_each * heads * frames * bins**2 / unit


def raises_type_error(*arguments):
    return sum(arguments) + "words"


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
        (lambda *a: scores_gib(*a) / 2, "those of bfloat16"),
        (lambda *a: scores_gib(*a) * 1024, "that is MiB"),
        (lambda s, n, h: size_of(1 + int(44_100 * s) // (n // 2), n // 2 + 1, h), "not a half"),
        (lambda s, n, h: size_of(1 + int(44_100 * s) // (n // 4), n, h), "the input is real"),
        (raises_type_error, "your function raised TypeError: unsupported operand"),
    ],
)
def test_usual_mistakes_in_scores_are_named(answer, hint, capsys):
    assert not check_scores_gib(answer)
    assert hint in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "hints"),
    [
        (
            lambda s, n, h: bytes_of(s, n, h, more_frames=0, more_bins=0) / 2**30,
            ("0 Hz is one", "the first is at 0 s"),
        ),
        (
            lambda s, n, h: size_of(1 + int(44_100 * s) // (n // 4), n // 2 + 1, h, 2, 2**20),
            ("that is MiB", "those of bfloat16"),
        ),
        (
            lambda s, n, h: size_of(1 + int(44_100 * s) // (n // 2), n // 2, h),
            ("0 Hz is one", "not a half"),
        ),
    ],
)
def test_two_mistakes_in_scores_are_both_named(answer, hints, capsys):
    assert not check_scores_gib(answer)
    said = capsys.readouterr().out
    assert all(hint in said for hint in hints), said


def shape_of(levels):
    changes = levels[len(levels) // 2 + 1 :] - levels[len(levels) // 2 : -1]
    if not changes.any():
        return "plateau"
    return "staircase" if (changes >= 0).all() else "sawtooth"


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


def must_climb(levels):
    climbs = (np.diff(levels[len(levels) // 2 :]) > 0).any()
    return shape_of(levels) if climbs else "plateau"


def compares_arrays(levels):
    return "staircase" if levels == sorted(levels) else "plateau"


def test_the_second_half_decides():
    assert check_shape_of(shape_of)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda levels: "plateau", "every step leaves something"),
        (lambda levels: None, "answer one of 'plateau', 'staircase', 'sawtooth'"),
        (lambda levels: "Staircase", "letter by letter; got 'Staircase'"),
        (lambda levels: levels, "letter by letter; got array("),
        (must_climb, "fall even once"),
        (compares_arrays, "your function raised ValueError: The truth value of an array"),
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
    with suppress(torch.OutOfMemoryError):
        return [step(clips)]
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


def first_half_longer(step, clips):
    try:
        return [step(clips)]
    except torch.OutOfMemoryError:
        if len(clips) == 1:
            raise
    middle, again = (len(clips) + 1) // 2, first_half_longer
    return again(step, clips[:middle]) + again(step, clips[middle:])


def as_in_section_5(step, clips):
    try:
        return step(clips)
    except torch.OutOfMemoryError:
        failed = True
    assert failed
    return [one for half in clips.chunk(2) for one in as_in_section_5(step, half)]


def chunks_a_list(step, clips):
    try:
        return [step(clips)]
    except torch.OutOfMemoryError:
        failed = True
    assert failed
    return [one for half in clips.chunk(2) for one in chunks_a_list(step, half)]


def forgets_a_single_clip(step, clips):
    try:
        return [step(clips)]
    except torch.OutOfMemoryError:
        middle = len(clips) // 2
    if not middle:
        raise ValueError("nothing left to halve")
    again = forgets_a_single_clip
    return again(step, clips[:middle]) + again(step, clips[middle:])


@pytest.mark.parametrize("answer", [run_in_halves, first_half_longer])
def test_halves_pass(answer):
    assert check_run_in_halves(answer)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda step, clips: [], "4 clips of which 4 fit: expected [(0, 1, 2, 3)], got []"),
        (lambda step, clips: [step(clips)], "8 clips of which 2 fit: your function raised OutOfM"),
        (halved_once, "8 clips of which 2 fit: your function raised OutOfMemoryError"),
        (as_in_section_5, "a list of *results*, such as [step(clips)]"),
        (lambda step, clips: torch.zeros(3), "got tensor([0., 0., 0.])"),
        (chunks_a_list, "your function raised AttributeError: 'list' object has no attribute"),
        (forgets_a_single_clip, "got ValueError: nothing left to halve"),
        (second_half_first, "the first half comes first"),
        (inside_except, "retry after the except block"),
        (with_the_error_stored, "do not store the error"),
        (for_ever, "halved for ever"),
        (never_raises, "expected torch.OutOfMemoryError, got []"),
        (any_runtime_error, "RuntimeError is not an out-of-memory error"),
        (any_error_swallowed, "ValueError; it was swallowed"),
    ],
)
def test_usual_mistakes_in_recovery_are_named(answer, hint, capsys):
    assert not check_run_in_halves(answer)
    assert hint in capsys.readouterr().out
