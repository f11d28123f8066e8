"""Objects that there are now, as far as the collector of cycles leads to them.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import gc
from types import ModuleType
from typing import Any


def of_types(types: tuple[type, ...]) -> list[Any]:
    """All objects of some classes that the collector of cycles knows and has not frozen.

    Notebook: 06_leak_diagnosis
    """
    things = gc.get_objects()
    kinds = {kind for kind in set(map(type, things)) if issubclass(kind, types)}
    return [thing for thing in things if type(thing) in kinds]


def referents(thing: Any) -> list[Any]:
    """What an object refers to; of a module, its names alone.

    Before Python 3.12.6, `gc.get_referents` of asyncio's module in C frees twice what asyncio keeps
    to use again, and the next collection never ends (CPython issue 122695).

    Notebook: 06_leak_diagnosis
    """
    return [vars(thing)] if type(thing) is ModuleType else gc.get_referents(thing)


def overlooked(types: tuple[type, ...]) -> dict[int, Any]:
    """Containers that the collector does not know, by identity: those of plain things only.

    A dictionary of numbers, names or arrays is none of its, but what holds it is.

    Notebook: 06_leak_diagnosis
    """
    held = (each for thing in gc.get_objects() for each in referents(thing))
    return {id(each): each for each in held if type(each) in types and not gc.is_tracked(each)}
