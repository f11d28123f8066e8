"""Checks of lesson 06: the block that fills the card, the shape of a leak, recovery in halves.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tfswa_lab.teaching.checks.verdict import mismatch, verdict

RATE = 44_100


def check_scores_gib(scores_gib: Callable[[float, int, int], object]) -> bool:
    """Exercise 1: `scores_gib(seconds, n_fft, heads)`, scores of one frequency path in GiB.

    Notebook: 06_leak_diagnosis
    """
    for seconds, n_fft, heads in ((10, 4096, 12), (6, 2048, 4), (2.5, 1024, 1)):
        if hint := _scores_hint(scores_gib(seconds, n_fft, heads), seconds, n_fft, heads):
            asked = f"scores_gib({seconds}, {n_fft}, {heads})"
            return verdict("scores_gib", f"{asked}: {hint}")
    return verdict("scores_gib", None)


def _scores_hint(got: object, seconds: float, n_fft: int, heads: int) -> str | None:
    frames, bins = 1 + int(seconds * RATE) // (n_fft // 4), n_fft // 2 + 1
    size = frames * heads * bins**2 * 4
    hint = mismatch(got, size / 2**30)
    if hint is None:
        return None
    mistakes = {
        float(size): "that is bytes; GiB are 2^30 of them",
        size / 1e9: "that is GB; GiB are 2^30 bytes",
        size / 4 / 2**30: "a float32 has 4 bytes",
        size / bins / 2**30: "a score for every pair of bins: their number squared",
        size / heads / 2**30: "every head has scores of its own",
        size / frames / 2**30: "every frame has scores of its own",
        size / bins**2 * (n_fft // 2) ** 2 / 2**30: "n_fft // 2 + 1 bins: 0 Hz is one, too",
        size / frames * (frames - 1) / 2**30: "1 + samples // hop frames: the first is at 0 s",
        bins * heads * frames**2 * 4 / 2**30: (
            "that is the time path: frames among themselves, for each bin"
        ),
    }
    return next((m for wrong, m in mistakes.items() if mismatch(got, wrong) is None), hint)


# levels in KiB, their shape, and what an answer that misses it has probably overlooked
LEVELS = (
    ([40] * 12, "plateau", "nothing changes"),
    (list(range(10, 130, 10)), "staircase", "every step leaves something"),
    (
        [10, 30, 50, 10, 30, 50, 10, 30, 50, 10, 30, 50],
        "sawtooth",
        "it comes down again and again",
    ),
    ([10, 20, 30, 40] + [40] * 10, "plateau", "a warm-up has ended before the second half"),
    ([90] + [40] * 13, "plateau", "what went down in the first half does not count"),
    ([5 * min(step, 7) for step in range(16)], "plateau", "a cache has filled before that"),
    (list(range(10, 22)), "staircase", "small steps are steps, too: a KiB each"),
    ([10] * 6 + [12] * 3 + [14] * 3, "staircase", "it may leave something in some steps only"),
    ([10, 30, 50, 70, 90, 110, 10, 30, 50, 70, 90, 30], "sawtooth", "it may come down late"),
    ([50, 30, 10] * 4, "sawtooth", "the last level may lie below the first"),
)


def check_shape_of(shape_of: Callable[[Sequence[int]], object]) -> bool:
    """Exercise 2: `shape_of(levels)` is "plateau", "staircase" or "sawtooth".

    Notebook: 06_leak_diagnosis
    """
    for levels, expected, hint in LEVELS:
        given = [2**10 * level for level in levels]
        got = shape_of(list(given))
        if got != expected:
            hint = f"{levels} KiB: expected {expected!r}, got {got!r}; {hint}"
            return verdict("shape_of", hint)
    return verdict("shape_of", None)


class _Card:
    """A step that fits so many clips, and looks who is alive when it is called again."""

    def __init__(self, fits: int, fails: type[Exception] = torch.OutOfMemoryError):
        self.fits, self.fails = fits, fails
        self.calls: list[list[int]] = []
        self.kept_alive = False
        self._failed: list[weakref.ref[Tensor]] = []

    def __call__(self, clips: Sequence[int]) -> tuple[int, ...]:
        self.kept_alive |= any(ref() is not None for ref in self._failed)
        self.calls.append(list(clips))
        if len(self.calls) > 100:
            raise RecursionError("100 calls: no end in sight")
        activations = torch.zeros(8)
        if len(clips) > self.fits or self.fails is not torch.OutOfMemoryError:
            self._failed.append(weakref.ref(activations))
            raise self.fails(f"{len(clips)} clips do not fit")
        return tuple(clips)


def check_run_in_halves(run_in_halves: Callable[[Callable, list], object]) -> bool:
    """Exercise 3: `run_in_halves(step, clips)` is a list of all results of `step`.

    Notebook: 06_leak_diagnosis
    """
    for hint in (_retry_hint, _last_clip_hint, _other_error_hint):
        if said := hint(run_in_halves):
            return verdict("run_in_halves", said)
    return verdict("run_in_halves", None)


def _retry_hint(run: Callable) -> str | None:
    for count, fits in ((4, 4), (8, 2), (7, 2), (5, 1)):
        card, clips = _Card(fits), list(range(count))
        asked = f"{count} clips of which {fits} fit"
        try:
            got = run(card, clips)
        except (torch.OutOfMemoryError, RecursionError) as error:
            return f"{asked}: {type(error).__name__}: {error}"
        expected = _halves(clips, fits)
        if got != expected:
            order = isinstance(got, list) and sorted(map(str, got)) == sorted(map(str, expected))
            why = "; the first half comes first" if order else ""
            return f"{asked}: expected {expected}, got {got!r}{why}"
        if card.kept_alive:
            return (
                f"{asked}: when a retry began, tensors of the failed step were alive; retry after "
                "the except block, and do not store the error"
            )
    return None


def _halves(clips: list[int], fits: int) -> list[tuple[int, ...]]:
    if len(clips) <= fits:
        return [tuple(clips)]
    middle = len(clips) // 2
    return _halves(clips[:middle], fits) + _halves(clips[middle:], fits)


def _last_clip_hint(run: Callable) -> str | None:
    try:
        got = run(_Card(fits=0), [0, 1])
    except torch.OutOfMemoryError:
        return None
    except RecursionError:
        return "a single clip that does not fit was halved for ever; raise the error then"
    return f"a single clip does not fit: expected torch.OutOfMemoryError, got {got!r}"


def _other_error_hint(run: Callable) -> str | None:
    for error in (ValueError, RuntimeError):  # OutOfMemoryError is a RuntimeError
        card = _Card(fits=0, fails=error)
        try:
            got = run(card, [0, 1])
        except error:
            if len(card.calls) == 1:
                continue
            return f"{error.__name__} is no lack of memory, and was tried again"
        except Exception as other:
            return f"a step raised {error.__name__}, you raised {type(other).__name__}"
        return f"a step raised {error.__name__}; it was swallowed, and you returned {got!r}"
    return None
