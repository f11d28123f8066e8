"""Checks of the exercises, one module per lesson: `checks.lesson_01` and so on.

A check takes the reader's function, prints "passed: …" or "not yet: …" with a hint, and returns
whether it passed. The dummy value of an untouched exercise is no error, so that a lesson runs from
top to bottom before it is solved; an exception inside the reader's function is the reader's to see.

Notebook: 00_start_here
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def verdict(name: str, hint: str | None) -> bool:
    """Print the result of a check; no hint means passed.

    >>> verdict("nearest_bin", None)
    passed: nearest_bin
    True
    >>> verdict("nearest_bin", "expected 20, got 0")
    not yet: nearest_bin: expected 20, got 0
    False
    """
    print(f"passed: {name}" if hint is None else f"not yet: {name}: {hint}")
    return hint is None


def mismatch(got: object, expected: object, tolerance: float = 1e-5) -> str | None:
    """How an answer differs from the expected one; None if it does not.

    Args:
        got: a number, array or tensor; anything else is a mismatch and no error.
        expected: number, array or tensor.
        tolerance: largest accepted difference, relative to the largest expected value.

    >>> mismatch(None, 1.0)
    'expected a number, got None'
    >>> mismatch([1.0, 2.0], [1.0, 2.5])
    'expected [1.  2.5], got [1. 2.]'
    """
    want = np.asarray(expected)
    kind = f"an array of shape {want.shape}" if want.ndim else "a number"
    try:
        have = np.asarray(got, dtype=want.dtype)
    except (TypeError, ValueError):
        return f"expected {kind}, got {got!r}"
    if got is None or have.shape != want.shape:
        return f"expected {kind}, got {'shape ' + str(have.shape) if have.ndim else repr(got)}"
    if np.isnan(have).any():
        return "the answer contains NaN: was something divided by zero?"
    error = np.abs(have - want).max()
    if error <= tolerance * max(np.abs(want).max(), 1e-12):
        return None
    if want.size <= 8:
        return f"expected {np.round(want, 4)}, got {np.round(have, 4)}"
    return f"right shape, but values differ by up to {error:.2g}"


def mismatch_or_mistake(
    got: object, expected: object, mistakes: Mapping[str, object], tolerance: float = 1e-5
) -> str | None:
    """How an answer differs from the expected one, or the usual mistake that explains it.

    Args:
        got: see `mismatch`.
        expected: see `mismatch`.
        mistakes: hint to the answer that this mistake leads to; the first that fits is returned.
        tolerance: see `mismatch`.

    >>> mismatch_or_mistake(4.0, 2.0, {"take the square root": 4.0})
    'take the square root'
    """
    hint = mismatch(got, expected, tolerance)
    if hint is None:
        return None
    fitting = (text for text, wrong in mistakes.items() if mismatch(got, wrong, tolerance) is None)
    return next(fitting, hint)
