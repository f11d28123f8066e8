"""Objects that there are now, as far as the collector of cycles leads to them.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import gc
from typing import Any


def of_types(types: tuple[type, ...]) -> list[Any]:
    """All objects of some classes that the collector of cycles knows and has not frozen.

    Notebook: 06_leak_diagnosis
    """
    things = gc.get_objects()
    kinds = {kind for kind in set(map(type, things)) if issubclass(kind, types)}
    return [thing for thing in things if type(thing) in kinds]


def overlooked(types: tuple[type, ...]) -> dict[int, Any]:
    """Containers that the collector does not know, by identity: those of plain things only.

    A dictionary of numbers, names or arrays is none of its, but what holds it is.

    Notebook: 06_leak_diagnosis
    """
    held = (each for thing in gc.get_objects() for each in gc.get_referents(thing))
    return {id(each): each for each in held if type(each) in types and not gc.is_tracked(each)}
