"""Does a series of levels, one after each step, go on growing?

Levels are noisy (lengths vary), rise in stairs (validation every n-th step), fall back (lists that
are emptied) or come to an end (caches). So halves and quarters are compared, not neighbours.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise


def grows(levels: Sequence[float]) -> bool:
    """Whether all of the last quarter is above all of the second.

    >>> grows(range(12)), grows([3, 9, 5, 7, 4, 9, 6, 5, 8, 4, 7, 6])
    (True, False)
    """
    count = len(levels)
    early, late = levels[count // 4 : count // 2], levels[3 * count // 4 :]
    return bool(early) and min(late) > max(early)


def slows(levels: Sequence[float]) -> bool:
    """Whether growth comes to its end: it halves and is no steady one, or rests for long.

    >>> slows(range(12)), slows([0, 4, 6, 7, 8, 8, 8, 9, 9, 9, 9, 9])
    (False, True)
    >>> slows([0, 8, 16, 24, 32, 40, 48, 49, 50, 51, 52, 53])  # it goes on
    False
    """
    late, later = levels[len(levels) // 2 :], levels[3 * len(levels) // 4 :]
    if levels[-1] - late[0] < 0.5 * (late[0] - levels[0]):
        rising = sum(after > before for before, after in pairwise(late))
        steady = rising > 0.75 * (len(late) - 1)
        return not (steady and later[-1] - later[0] > 0.5 * (later[0] - late[0]))
    rises = [step for step, (before, after) in enumerate(pairwise(levels), 1) if after > before]
    if len(rises) < 2:
        return False
    usual = max(after - before for before, after in pairwise(rises))
    return len(levels) - 1 - rises[-1] > max(4, 2 * usual)


def slope(levels: Sequence[float]) -> float:
    """Growth per step, from the end of the first quarter to the end.

    >>> slope([5, 5, 5, 7, 9, 11, 13, 15])
    2.0
    """
    start = len(levels) // 4
    return (levels[-1] - levels[start]) / max(1, len(levels) - 1 - start)


def fills_up(births: Sequence[int], steps: int) -> bool:
    """Whether something new appears ever less often, as when keys come again.

    Two explanations are compared by their likelihood: in each step something new comes with one
    and the same chance, or it is drawn from a number of keys of which ever fewer are new.

    Args:
        births: steps in which something new appeared.
        steps: how many there were.

    >>> fills_up([0, 1, 2, 3, 5, 8, 9, 15], 20), fills_up([0, 3, 6, 9], 12)
    (True, False)
    """
    if len({after - before for before, after in pairwise(births)}) < 2:  # like a clock
        return False
    new = set(births)
    news = [step in new for step in range(births[0], steps)]
    before = [0, *accumulate(news)][:-1]
    count = len(births)
    same = [count / len(news)] * len(news)
    fewer = ([1 - seen / keys for seen in before] for keys in range(count, 8 * count + 1))
    return max(_likelihood(each, news) for each in fewer) > _likelihood(same, news)


def _likelihood(chances: Sequence[float], news: Sequence[bool]) -> float:
    """The logarithm of the chance that all happens as it did."""
    pairs = zip(chances, news, strict=True)
    return sum(math.log(max(chance if new else 1 - chance, 1e-9)) for chance, new in pairs)
