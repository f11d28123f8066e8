"""Which objects refer to each other in a circle and keep tensors until the collector comes.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from types import CellType, FunctionType, ModuleType
from typing import Any

from torch import Tensor

from tfswa_lab.memory.leaks.referrers import referents
from tfswa_lab.memory.leaks.spelling import words
from tfswa_lab.memory.leaks.traced_steps import resting_gc

PLAIN = (dict, list, tuple, set, CellType, Tensor, type, ModuleType)  # say little of a circle


def circle_of_step(run: Callable[[], Any], tries: int = 10) -> str:
    """The circle that a step leaves behind, spelled as attributes; empty if there is none.

    Args:
        run: runs a step.
        tries: steps to run at most until one leaves tensors behind.

    >>> class Cell: ...
    >>> def step():
    ...     cell = Cell()
    ...     cell.me, cell.data = cell, Tensor(3)
    >>> circle_of_step(step)
    'Cell.me is the Cell itself'
    """
    with resting_gc():
        flags = gc.get_debug()
        for _ in range(tries):
            try:
                run()
            except Exception:  # such as no more data: the verdict stands without the circle
                return ""
            others = len(gc.garbage)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            gc.set_debug(flags)
            try:
                if any(isinstance(each, Tensor) for each in gc.garbage[others:]):
                    return _shortest_circle(gc.garbage[others:])
            finally:
                del gc.garbage[others:]
                gc.collect()
    return ""


def _shortest_circle(garbage: Iterable[Any]) -> str:
    things = {id(each): each for each in garbage}
    edges = {at: [id(r) for r in referents(each)] for at, each in things.items()}
    speaking = [at for at, each in things.items() if not isinstance(each, PLAIN)]
    circles = [circle for at in speaking if (circle := _circle(at, edges))]
    if not circles:
        return ", ".join(sorted({type(things[at]).__name__ for at in speaking}))
    chain = [things[at] for at in min(circles, key=len)]
    spelled = words(chain, {id(chain[0]): type(chain[0]).__name__})
    if isinstance(chain[0], FunctionType):
        return f"{spelled.expression}, in the closure of {chain[0].__qualname__}, is the function"
    return f"{spelled.expression} is the {type(chain[0]).__name__} itself"


def _circle(start: int, edges: dict[int, list[int]]) -> list[int]:
    """The shortest way from an object back to itself; empty if there is none."""
    came_from, level = {}, [start]
    while level and start not in came_from:
        above = []
        for at in level:
            for to in edges[at]:
                if to in edges and to not in came_from:
                    came_from[to] = at
                    above.append(to)
        level = above
    if start not in came_from:
        return []
    way = [start, came_from[start]]
    while way[-1] != start:
        way.append(came_from[way[-1]])
    return way[::-1]
