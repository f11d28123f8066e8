"""Who keeps memory alive: a chain of holders from a name, or objects in a reference cycle.

Python's references are followed first. Where they end, references in C++ go on: tensors hold
storages, parameters hold gradients, graphs hold saved tensors, arrays hold the tensors they view.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from types import CellType, FrameType, FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, UntypedStorage

from tfswa_lab.memory.leaks.autograd_graph import SavedTensors, kept_nodes, last_of
from tfswa_lab.memory.leaks.referrers import HeapPaths, of_types, referents, untracked_containers
from tfswa_lab.memory.leaks.spelling import Spelled, by_outputs, spell
from tfswa_lab.memory.leaks.traced_steps import resting_gc
from tfswa_lab.memory.trace.tracer import has_storage, parts_of

DEEPEST = 5  # references in C++ in one chain


class Holding(NamedTuple):
    """How a storage is held.

    Args:
        chain: objects from a name down to the storage, each of which holds the next one.
        rooted: whether the first has a name; else nothing in Python is known to hold it.
        graph: whether autograd's graph is a part of the chain.
    """

    chain: list[Any]
    rooted: bool
    graph: bool


class Holders:
    """Finds holders among all objects that are alive.

    Args:
        named: objects with names of their own, such as the step and the model.
    """

    def __init__(self, named: dict[str, Any]):
        self.paths = HeapPaths(named.values())
        self._names = {id(thing): name for name, thing in named.items()}
        every = of_types((Tensor,))
        self._tensors = [tensor for tensor in every if has_storage(tensor)]
        self._sparse = [tensor for tensor in every if not has_storage(tensor)]
        leaves = [tensor for tensor in self._tensors if tensor.is_leaf]
        self._owners = [leaf for leaf in leaves if leaf.grad is not None]
        self._gradients = [owner.grad for owner in self._owners]
        self.paths.ignore(every, self._sparse)
        self.paths.ignore(named, self._tensors, leaves, self._owners, self._gradients)

    def of(self, storage: UntypedStorage) -> Holding:
        """The chain that ends with a storage."""
        found = self._climb(storage, frozenset(), False)
        chain = by_outputs(found.chain)
        self.paths.ignore(found.chain, chain)
        return found._replace(chain=chain)

    def besides(self, holder: Any, storages: Sequence[UntypedStorage]) -> list[Holding]:
        """Chains with names that end with storages and do not lead through a holder.

        Of arrays, only those are looked at that a search before has found: to find them takes long.
        """
        with self.paths.avoiding(holder):
            return [found for each in storages if (found := self.of(each)).rooted]

    def look_up(self, storages: Iterable[UntypedStorage]) -> None:
        """Find the first referrers of many storages at once."""
        every = [thing for storage in storages for thing in (storage, *self._on(storage))]
        self.paths.look_up(every)

    def spell(self, chain: list[Any]) -> Spelled:
        """The last object of a chain, as code."""
        return spell(chain, self._names)

    def name(self, thing: Any) -> Spelled:
        """Any object, as code."""
        return self.spell(self.way_to(thing))

    def way_to(self, thing: Any) -> list[Any]:
        """The chain that ends with any object."""
        return self.paths.to(thing)[0]

    def _climb(self, thing: Any, below: frozenset[int], graph: bool) -> Holding:
        below |= {id(thing)}
        chains = self.paths.to(thing)
        self.paths.ignore(chains, *chains)
        best = Holding(chains[0], self._is_name(chains[0][0]), graph)
        if best.rooted or len(below) > DEEPEST:
            return best
        for chain in chains:
            for holder, by_graph in self._beyond(chain[0]):
                if holder is None or id(holder) in below:
                    continue
                above = self._climb(holder, below, graph or by_graph)
                longer = Holding([*above.chain, *chain], above.rooted, above.graph)
                self.paths.ignore(above.chain, longer.chain)
                if longer.rooted:
                    return longer
                best = longer if best.chain is chains[0] else best
        return best

    def _is_name(self, thing: Any) -> bool:
        return self.paths.is_root(thing) or isinstance(thing, FrameType)

    def _beyond(self, thing: Any) -> Iterator[tuple[Any, bool]]:
        """Holders that Python does not know, and whether a graph is between."""
        if isinstance(thing, UntypedStorage):
            tensors = self._on(thing)
            yield from ((tensor, False) for tensor in tensors)
            yield self._saved.holder_of(thing), True
            yield from ((array, False) for array in self._arrays_of(tensors))
        elif isinstance(thing, np.ndarray):
            for each in self._untracked.values():
                if any(inner is thing for inner in referents(each)):
                    yield each, False
        elif isinstance(thing, Tensor):
            pairs = zip(self._owners, self._gradients, strict=True)
            yield from ((owner, False) for owner, gradient in pairs if gradient is thing)
            yield self._saved.holder_of(thing), True
        else:
            yield self._saved.holder_of(thing), True

    def _on(self, storage: UntypedStorage) -> list[Tensor]:
        """Tensors that lie in a storage."""
        address = storage._cdata
        tensors = [each for each in self._tensors if each.untyped_storage()._cdata == address]
        for each in self._sparse:
            if address in [part.untyped_storage()._cdata for part in parts_of(each)]:
                tensors.append(each)
        self.paths.ignore(tensors)
        return tensors

    def _arrays_of(self, tensors: list[Tensor]) -> list[np.ndarray]:
        """Arrays that view some tensors."""
        if self.paths.avoided and "_arrays" not in vars(self):
            return []
        viewed = set(map(id, tensors))
        viewing = [array for array in self._arrays.values() if id(_viewed(array)) in viewed]
        self.paths.ignore(viewing)
        return viewing

    @cached_property
    def _saved(self) -> SavedTensors:
        nodes, last = kept_nodes(), last_of([*self._gradients, *self._tensors])
        self.paths.ignore(nodes, last)
        gradients = set(map(id, self._gradients))
        self.paths.look_up([*last, *nodes])
        ends = [end for end in (*last, *nodes) if id(end) in gradients or self.paths.is_held(end)]
        saved = SavedTensors(ends)
        self.paths.ignore(ends, saved.nodes, saved.storages, saved.packed)
        return saved

    @cached_property
    def _arrays(self) -> dict[int, np.ndarray]:
        """Arrays that view tensors, by identity; the garbage collector does not track them."""
        arrays = {}
        for holder in (*gc.get_objects(), *self._untracked.values()):
            for each in referents(holder):
                if issubclass(type(each), np.ndarray) and isinstance(_viewed(each), Tensor):
                    arrays[id(each)] = each
        self.paths.ignore(arrays)
        return arrays

    @cached_property
    def _untracked(self) -> dict[int, Any]:
        """Dictionaries and tuples that the collector does not track, such as those of arrays."""
        found = untracked_containers((dict, tuple))
        self.paths.ignore(found)
        return found


def _viewed(array: np.ndarray) -> Any:
    """The object whose memory an array views; None if the array owns its memory."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array


PLAIN = (dict, list, tuple, set, CellType, Tensor, type, ModuleType)  # their names say little


def cycle_of_step(run: Callable[[], Any], tries: int = 10) -> str:
    """The reference cycle that a step leaves behind, as code; empty if there is none.

    Args:
        run: runs a step.
        tries: the number of steps to run, at most, until one leaves tensors behind.

    >>> class Cell: ...
    >>> def step():
    ...     cell = Cell()
    ...     cell.me, cell.data = cell, Tensor(3)
    >>> cycle_of_step(step)
    'Cell.me is the Cell itself'
    """
    with resting_gc():
        flags = gc.get_debug()
        for _ in range(tries):
            try:
                run()
            except Exception:  # such as no more data: the verdict stands without the cycle
                return ""
            others = len(gc.garbage)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            gc.set_debug(flags)
            try:
                if any(isinstance(each, Tensor) for each in gc.garbage[others:]):
                    return _shortest_cycle(gc.garbage[others:])
            finally:
                del gc.garbage[others:]
                gc.collect()
    return ""


def _shortest_cycle(garbage: Iterable[Any]) -> str:
    things = {id(each): each for each in garbage}
    edges = {at: [id(r) for r in referents(each)] for at, each in things.items()}
    telling = [at for at, each in things.items() if not isinstance(each, PLAIN)]
    cycles = [cycle for at in telling if (cycle := _cycle(at, edges))]
    if not cycles:
        return ", ".join(sorted({type(things[at]).__name__ for at in telling}))
    chain = [things[at] for at in min(cycles, key=len)]
    spelled = spell(chain, {id(chain[0]): type(chain[0]).__name__})
    if isinstance(chain[0], FunctionType):
        return f"{spelled.expression}, in the closure of {chain[0].__qualname__}, is the function"
    return f"{spelled.expression} is the {type(chain[0]).__name__} itself"


def _cycle(start: int, edges: dict[int, list[int]]) -> list[int]:
    """The shortest chain from an object back to itself; empty if there is none."""
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
