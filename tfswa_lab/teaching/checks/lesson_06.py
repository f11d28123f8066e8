"""Checks of lesson 06: the block that fills the GPU, the shape of a leak, recovery in halves.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tfswa_lab.memory.sizes import GIB, KIB, MIB
from tfswa_lab.teaching.checks import mismatch, verdict

RATE = 44_100


def check_scores_gib(scores_gib: Callable[[float, int, int], object]) -> bool:
    """Exercise 1: `scores_gib(seconds, n_fft, heads)`, scores of one frequency path in GiB."""
    for asked in ((10, 4096, 12), (6, 2048, 4), (2.5, 1024, 1)):
        got, failed = _answer(scores_gib, *asked)
        if hint := failed or _scores_hint(got, *asked):
            return verdict("scores_gib", f"scores_gib{asked}: {hint}")
    return verdict("scores_gib", None)


class _Scores(NamedTuple):
    """The factors of the size of the scores."""

    samples: int
    hop: int
    heads: int
    bins: int
    first: int = 1  # the frame at 0 s
    bins_power: int = 2
    frames_power: int = 1
    bytes_each: int = 4
    unit: float = GIB

    def size(self) -> float:
        frames = self.samples // self.hop + self.first
        scores = self.heads * self.bins**self.bins_power * frames**self.frames_power
        return scores * self.bytes_each / self.unit


def _scores_hint(got: object, seconds: float, n_fft: int, heads: int) -> str | None:
    right = _Scores(int(seconds * RATE), n_fft // 4, heads, n_fft // 2 + 1)
    hint = mismatch(got, right.size())
    if hint is None:
        return None
    mistakes = (
        ({"unit": 1}, "that is bytes; GiB are 2^30 of them"),
        ({"unit": MIB}, "that is MiB; a GiB is 1024 of them"),
        ({"unit": 1e9}, "that is GB; GiB are 2^30 bytes"),
        ({"bytes_each": 1}, "a float32 has 4 bytes"),
        ({"bytes_each": 2}, "2 bytes are those of bfloat16; these scores are float32"),
        ({"bins_power": 1}, "a score for every pair of bins: their number squared"),
        ({"heads": 1}, "every head has scores of its own"),
        ({"frames_power": 0}, "every frame has scores of its own"),
        ({"bins": n_fft // 2}, "n_fft // 2 + 1 bins: 0 Hz is one, too"),
        ({"bins": n_fft}, "n_fft // 2 + 1 bins, not n_fft: the input is real"),
        ({"first": 0}, "1 + samples // hop frames: the first is at 0 s"),
        ({"hop": n_fft // 2}, "the hop is a quarter of n_fft, not a half"),
        (
            {"bins_power": 1, "frames_power": 2},
            "that is the time path: frames among themselves, for each bin",
        ),
    )
    for count in (1, 2):
        for made in combinations(mistakes, count):
            wrong = right
            for change, _ in made:
                wrong = wrong._replace(**change)
            if mismatch(got, wrong.size()) is None:
                return "; and ".join(words for _, words in made)
    return hint


def _answer(function: Callable, *arguments: object) -> tuple[object, str]:
    """The result of a student's function, or a sentence about its exception."""
    try:
        return function(*arguments), ""
    except Exception as error:  # whatever it is, it belongs to the student
        return None, f"your function raised {type(error).__name__}: {error}"


# levels in KiB, their shape, and what an answer that misses it has probably overlooked
LEVELS = (
    ([40] * 12, "plateau", "nothing changes"),
    (list(range(10, 130, 10)), "staircase", "every step leaves something"),
    ([10, 30, 50] * 4, "sawtooth", "it comes down again and again"),
    ([10, 20, 30, 40] + [40] * 10, "plateau", "a warm-up has ended before the second half"),
    ([90] + [40] * 13, "plateau", "what went down in the first half does not count"),
    ([5 * min(step, 7) for step in range(16)], "plateau", "a cache has filled before that"),
    (list(range(10, 22)), "staircase", "small steps are steps, too: a KiB each"),
    ([10] * 6 + [12] * 3 + [14] * 3, "staircase", "it may leave something in some steps only"),
    ([10, 30, 50, 70, 90, 110, 10, 30, 50, 70, 90, 30], "sawtooth", "it may come down late"),
    ([50, 30, 10] * 4, "sawtooth", "the last level may lie below the first"),
    ([40] * 8 + [30, 20, 20, 20], "sawtooth", "levels that fall even once are a sawtooth"),
)
SHAPES = ("plateau", "staircase", "sawtooth")


def check_shape_of(shape_of: Callable[[np.ndarray], object]) -> bool:
    """Exercise 2: `shape_of(levels)` is "plateau", "staircase" or "sawtooth"."""
    for levels, expected, overlooked in LEVELS:
        got, failed = _answer(shape_of, KIB * np.array(levels))
        if hint := failed or _shape_hint(got, expected, overlooked):
            return verdict("shape_of", f"{levels} KiB: {hint}")
    return verdict("shape_of", None)


def _shape_hint(got: object, expected: str, overlooked: str) -> str | None:
    if not isinstance(got, str) or got not in SHAPES:
        return f"answer one of {', '.join(map(repr, SHAPES))}, letter by letter; got {got!r}"
    return None if got == expected else f"expected {expected!r}, got {got!r}; {overlooked}"


class _SmallGpu:
    """A step that fits so many clips; it notes whether tensors of a failed call are alive."""

    def __init__(self, fits: int, fails: type[Exception] = torch.OutOfMemoryError):
        self.fits, self.fails = fits, fails
        self.calls: list[list[int]] = []
        self.kept_alive = False
        self._failed: list[weakref.ref[Tensor]] = []

    def __call__(self, clips: Sequence[int]) -> tuple[int, ...]:
        self.kept_alive |= any(ref() is not None for ref in self._failed)
        self.calls.append(list(clips))
        if len(self.calls) > 100:
            raise RecursionError("100 calls, and still no end")
        activations = torch.zeros(8)
        if len(clips) > self.fits or self.fails is not torch.OutOfMemoryError:
            self._failed.append(weakref.ref(activations))
            raise self.fails(f"{len(clips)} clips do not fit")
        return tuple(clips)


def check_run_in_halves(run_in_halves: Callable[[Callable, list], object]) -> bool:
    """Exercise 3: `run_in_halves(step, clips)` is a list of all results of `step`."""
    for hint in (_retry_hint, _last_clip_hint, _other_error_hint):
        if said := hint(run_in_halves):
            return verdict("run_in_halves", said)
    return verdict("run_in_halves", None)


def _retry_hint(run: Callable) -> str | None:
    for count, fits in ((4, 4), (8, 2), (7, 2), (5, 1)):
        gpu, clips = _SmallGpu(fits), list(range(count))
        got, failed = _answer(run, gpu, clips)
        if hint := failed or _results_hint(got, clips, fits):
            return f"{count} clips of which {fits} fit: {hint}"
        if gpu.kept_alive:
            return (
                f"{count} clips of which {fits} fit: when a retry began, tensors of the failed "
                "step were alive; retry after the except block, and do not store the error"
            )
    return None


def _results_hint(got: object, clips: list[int], fits: int) -> str | None:
    """An odd number may be split with either half longer, but always the same one."""
    first_longer, expected = _halves(clips, fits, 1), _halves(clips, fits, 0)
    if repr(got) in (repr(expected), repr(first_longer)):  # an array's == is no truth value
        return None
    said = f"expected {expected}, got {got!r}"
    if repr(got) in (repr(clips), repr(tuple(clips))):
        return f"{said}: a list of *results*, such as [step(clips)]"
    if isinstance(got, list) and sorted(map(str, got)) == sorted(map(str, expected)):
        return f"{said}; the first half comes first"
    return said


def _halves(clips: list[int], fits: int, more: int) -> list[tuple[int, ...]]:
    """Results in order; `more` is how many clips the first half of an odd number has more."""
    if len(clips) <= fits:
        return [tuple(clips)]
    middle = (len(clips) + more) // 2
    return _halves(clips[:middle], fits, more) + _halves(clips[middle:], fits, more)


def _last_clip_hint(run: Callable) -> str | None:
    try:
        got = run(_SmallGpu(fits=0), [0, 1])
    except torch.OutOfMemoryError:
        return None
    except RecursionError:
        return "a single clip that does not fit was halved for ever; raise the error then"
    except Exception as other:  # whatever it is, it belongs to the student
        got = f"{type(other).__name__}: {other}"
        return f"a single clip does not fit: expected torch.OutOfMemoryError, got {got}"
    return f"a single clip does not fit: expected torch.OutOfMemoryError, got {got!r}"


def _other_error_hint(run: Callable) -> str | None:
    for error in (ValueError, RuntimeError):  # OutOfMemoryError is a RuntimeError
        gpu = _SmallGpu(fits=0, fails=error)
        try:
            got = run(gpu, [0, 1])
        except error:
            if len(gpu.calls) == 1:
                continue
            return f"{error.__name__} is not an out-of-memory error, but was tried again"
        except Exception as other:
            return f"a step raised {error.__name__}, you raised {type(other).__name__}"
        return f"a step raised {error.__name__}; it was swallowed, and you returned {got!r}"
    return None
