"""Does a series of levels, one after each step, go on growing?

Levels are noisy (lengths vary), rise in stairs (validation every n-th step), fall back (lists that
are emptied) or come to an end (caches). So halves and quarters are compared, not neighbours.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def grows(levels: Sequence[float]) -> bool:
    """Whether all of the last quarter is above all of the second.

    Notebook: 06_leak_diagnosis

    >>> grows(range(12)), grows([3, 9, 5, 7, 4, 9, 6, 5, 8, 4, 7, 6])
    (True, False)
    """
    count = len(levels)
    early, late = levels[count // 4 : count // 2], levels[3 * count // 4 :]
    return bool(early) and min(late) > max(early)


def slows(levels: Sequence[float]) -> bool:
    """Whether growth comes to its end: it halves, or rests for longer than it used to.

    Notebook: 06_leak_diagnosis

    >>> slows(range(12)), slows([0, 4, 6, 7, 8, 8, 8, 9, 9, 9, 9, 9])
    (False, True)
    """
    middle = levels[len(levels) // 2]
    if levels[-1] - middle < 0.5 * (middle - levels[0]):
        return True
    rises = [step for step, (before, after) in enumerate(pairwise(levels), 1) if after > before]
    if len(rises) < 2:
        return False
    usual = max(after - before for before, after in pairwise(rises))
    return len(levels) - 1 - rises[-1] > max(4, 2 * usual)


def slope(levels: Sequence[float]) -> float:
    """Growth per step, from the end of the first quarter to the end.

    Notebook: 06_leak_diagnosis

    >>> slope([5, 5, 5, 7, 9, 11, 13, 15])
    2.0
    """
    start = len(levels) // 4
    return (levels[-1] - levels[start]) / max(1, len(levels) - 1 - start)
