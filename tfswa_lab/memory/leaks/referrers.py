"""The shortest way from a name in a program to an object, found backwards through referrers.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import gc
import sys
from asyncio import Task
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import FrameType, GeneratorType, ModuleType
from typing import Any


def of_types(types: tuple[type, ...]) -> list[Any]:
    """All objects of some classes that the garbage collector tracks and has not frozen."""
    things = gc.get_objects()
    kinds = {kind for kind in set(map(type, things)) if issubclass(kind, types)}
    return [thing for thing in things if type(thing) in kinds]


def referents(thing: Any) -> list[Any]:
    """The objects that an object refers to; of a module, only its dictionary of globals.

    Before Python 3.12.6, `gc.get_referents` of asyncio's module in C frees objects twice that
    asyncio keeps to use again, and the next collection never ends (CPython issue 122695).
    """
    return [vars(thing)] if type(thing) is ModuleType else gc.get_referents(thing)


def untracked_containers(types: tuple[type, ...]) -> dict[int, Any]:
    """Containers that the garbage collector does not track, by identity.

    It does not track a dictionary of numbers, strings or arrays, but it tracks its holder.
    """
    held = (each for thing in gc.get_objects() for each in referents(thing))
    return {id(each): each for each in held if type(each) in types and not gc.is_tracked(each)}


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """No collection runs by itself: it doubles the time of work that makes many containers."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def loaded_modules() -> list[ModuleType]:
    """All modules that are imported; what stands in the place of one is left out."""
    return [each for each in list(sys.modules.values()) if isinstance(each, ModuleType)]


MOST = 50_000  # objects that a search looks at
ENDS = 8  # chains without a name that a search returns
OF_CODE = {FrameType: "f_code", GeneratorType: "gi_code"}
OURS = str(Path(__file__).parents[1])
OUR_MODULES = __name__.rpartition(".leaks")[0]


class HeapPaths:
    """Finds who holds an object.

    Args:
        roots: objects at which a search ends, such as the step that is diagnosed.

    Attributes:
        avoided: the identity of a holder that no chain may have, 0 for none.
    """

    def __init__(self, roots: Iterable[Any] = ()):
        self._ours: dict[int, Any] = {}  # our own containers, excluded from the search
        self._referrers: dict[int, list[Any]] = {}
        self._tasks = of_types((Task,))  # `gc.get_referrers` does not find them by their results
        self.avoided = 0
        self.ignore(self._ours, self._referrers, self._tasks)
        self._roots = {id(root) for root in roots}
        self._globals = {id(vars(module)) for module in loaded_modules()}

    def ignore(self, *things: Any) -> None:
        """Do not name these as holders."""
        self._ours.update((id(thing), thing) for thing in things)

    def close(self) -> None:
        """Drop all objects that were looked at, and the reference cycle of our own containers."""
        for each in (self._referrers, self._tasks, self._ours):
            each.clear()

    def to(self, target: Any) -> list[list[Any]]:
        """Chains of holders that end with an object.

        Returns:
            The shortest one that begins with a root or a running function. If there is none, some
            that begin with a holder which nothing in Python refers to, the shortest first.
        """
        if self.is_root(target):
            return [[target]]
        below, met, level, ends = {id(target): 0}, {id(target): target}, [target], []
        self.ignore(below, met, ends)
        while level and len(met) < MOST:
            above = self._above(level, below)
            met.update((id(holder), holder) for holder in above)
            for holder in above:
                if self.is_root(holder):
                    return [_chain(holder, below, met)]
            ends.extend(each for each in level if not self._referrers[id(each)])
            level, last = above, level
        for frame, _, held in running_locals():
            if id(held) in met:
                return [[frame, *_chain(held, below, met)]]
        return [_chain(end, below, met) for end in (*ends, *last)[:ENDS]]

    @contextmanager
    def avoiding(self, holder: Any) -> Iterator[None]:
        """Inside of the block, find chains without a holder."""
        self.avoided = id(holder)
        try:
            yield
        finally:
            self.avoided = 0

    def is_root(self, thing: Any) -> bool:
        """Whether an object has a name: globals, classes, and the roots that were given."""
        if id(thing) in self._roots or id(thing) in self._globals or issubclass(type(thing), type):
            return True
        return is_globals(thing)

    def look_up(self, things: Iterable[Any]) -> None:
        """Find the referrers of many objects at once, which takes as long as for one."""
        new = [thing for thing in things if id(thing) not in self._referrers]
        self.ignore(things, new)
        if not new:
            return
        found = {id(thing): [] for thing in new}
        self._referrers.update(found)
        asked = tuple(new)  # Python 3.13 counts this tuple of arguments among the referrers
        referrers = [*gc.get_referrers(*asked), *self._tasks]
        self.ignore(found, asked, referrers, *found.values())
        for holder in referrers:
            if id(holder) in self._ours or _is_ours(holder):
                continue
            held = {id(each) for each in referents(holder)}
            if self._ours.keys().isdisjoint(held):  # else: an iterator over our own lists
                for each in held & found.keys():
                    found[each].append(holder)

    def is_held(self, thing: Any) -> bool:
        """Whether something in Python refers to an object."""
        self.look_up([thing])
        return bool(self._referrers[id(thing)])

    def _above(self, level: list[Any], below: dict[int, int]) -> list[Any]:
        """New holders of the objects of a level; `below` gets the object that each one holds."""
        self.look_up(level)
        above = []
        self.ignore(above)
        for held in level:
            for holder in self._referrers[id(held)]:
                if id(holder) not in below and id(holder) != self.avoided:
                    below[id(holder)] = id(held)
                    above.append(holder)
        return above


def is_globals(thing: Any) -> bool:
    """Whether an object is a dictionary of globals that code was run in.

    >>> is_globals(globals()), is_globals({})
    (True, False)
    """
    return type(thing) is dict and "__builtins__" in thing


def running_locals() -> Iterator[tuple[FrameType, str, Any]]:
    """Local variables of all running functions but ours: frame, name and value."""
    for frame in list(sys._current_frames().values()):
        while frame is not None:
            if not _is_ours(frame):
                yield from ((frame, *variable) for variable in locals_of(frame))
            frame = frame.f_back


def locals_of(frame: FrameType) -> list[tuple[str, Any]]:
    """The local variables of a function's frame; none of a module's or a class's, which are globals
    or attributes.
    """
    if not frame.f_code.co_flags & CO_OPTIMIZED:
        return []
    values = frame.f_locals
    variables = list(values.items())
    if type(values) is dict:  # a copy that the frame would keep, before Python 3.13
        values.clear()
    return variables


def _chain(top: Any, below: dict[int, int], met: dict[int, Any]) -> list[Any]:
    chain, at = [], id(top)
    while at:
        chain.append(met[at])
        at = below[at]
    return chain


def _is_ours(thing: Any) -> bool:
    code = getattr(thing, OF_CODE[type(thing)]) if type(thing) in OF_CODE else None
    if code is not None:
        return code.co_filename.startswith(OURS)
    return str(getattr(type(thing), "__module__", "")).startswith(OUR_MODULES)
