"""Who holds a block of memory: the way from a name in the program down to the storage.

Python's references are followed first. Where they end, what C++ holds is looked through: tensors
hold storages, parameters their gradients, graphs what they saved, arrays the tensors they view.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterable, Iterator
from functools import cached_property
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, UntypedStorage
from torch.autograd.graph import Node

from tfswa_lab.memory.leaks.autograd_graph import Reach, last_of
from tfswa_lab.memory.leaks.referrers import HeapPaths, of_types, overlooked, referents
from tfswa_lab.memory.leaks.spelling import Words, words
from tfswa_lab.memory.trace.tracer import has_storage, parts_of

DEEPEST = 5  # references of C++ in one chain


class Holding(NamedTuple):
    """How a storage is held.

    Args:
        chain: objects from a name down to the storage, each of which holds the next one.
        rooted: whether the first is a name; else nothing in Python is known to hold it.
        graph: whether autograd's graph is one of the links.
    """

    chain: list[Any]
    rooted: bool
    graph: bool


class Holders:
    """Looks for holders among all objects that there are now.

    Args:
        named: objects with names, such as the step and the model.
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
        """The chain to a storage."""
        return self._climb(storage, frozenset(), False)

    def look_up(self, storages: Iterable[UntypedStorage]) -> None:
        """Find the first referrers of many storages at once."""
        every = [thing for storage in storages for thing in (storage, *self._on(storage))]
        self.paths.look_up(every)

    def spell(self, chain: list[Any]) -> Words:
        """The last object of a chain in words."""
        return words(chain, self._names)

    def name(self, thing: Any) -> Words:
        """Any object in words."""
        return self.spell(self.paths.to(thing)[0])

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
        """What holds an object without Python knowing, and whether that is a graph."""
        if isinstance(thing, UntypedStorage):
            tensors = self._on(thing)
            yield from ((tensor, False) for tensor in tensors)
            yield self._reach.holder_of(thing), True
            yield from ((array, False) for array in self._looking_into(tensors))
        elif isinstance(thing, np.ndarray):
            for each in self._overlooked.values():
                if any(inner is thing for inner in referents(each)):
                    yield each, False
        elif isinstance(thing, Tensor):
            pairs = zip(self._owners, self._gradients, strict=True)
            yield from ((owner, False) for owner, gradient in pairs if gradient is thing)
            yield self._reach.holder_of(thing), True
        elif isinstance(thing, Node):
            yield self._reach.holder_of(thing), True
        elif type(thing) is dict:
            threads = of_types((threading.local,))
            yield from ((each, False) for each in threads if vars(each) is thing)
        else:
            yield self._reach.holder_of(thing), True

    def _on(self, storage: UntypedStorage) -> list[Tensor]:
        """Tensors that lie in a storage."""
        address = storage._cdata
        tensors = [each for each in self._tensors if each.untyped_storage()._cdata == address]
        for each in self._sparse:
            if address in [part.untyped_storage()._cdata for part in parts_of(each)]:
                tensors.append(each)
        self.paths.ignore(tensors)
        return tensors

    def _looking_into(self, tensors: list[Tensor]) -> list[np.ndarray]:
        """Arrays that view some tensors."""
        viewed = set(map(id, tensors))
        looking = [array for array in self._arrays.values() if id(_viewed(array)) in viewed]
        self.paths.ignore(looking)
        return looking

    @cached_property
    def _reach(self) -> Reach:
        last = last_of([*self._gradients, *self._tensors])
        gradients = set(map(id, self._gradients))
        self.paths.look_up(last)
        held = [t for t in last if id(t) in gradients or self.paths.is_held(t)]
        reach = Reach(held)
        self.paths.ignore(last, held, reach.nodes, reach.storages, reach.packed)
        return reach

    @cached_property
    def _arrays(self) -> dict[int, np.ndarray]:
        """Arrays that view tensors, by identity; the collector of cycles does not know them."""
        arrays = {}
        for holder in (*gc.get_objects(), *self._overlooked.values()):
            for each in referents(holder):
                if issubclass(type(each), np.ndarray) and isinstance(_viewed(each), Tensor):
                    arrays[id(each)] = each
        self.paths.ignore(arrays)
        return arrays

    @cached_property
    def _overlooked(self) -> dict[int, Any]:
        """Dictionaries and tuples that the collector overlooks, as of names and arrays only."""
        found = overlooked((dict, tuple))
        self.paths.ignore(found)
        return found


def _viewed(array: np.ndarray) -> Any:
    """What an array looks into, maybe through others; None if it owns its memory."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array
