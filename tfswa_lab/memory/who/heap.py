"""Which objects lead to which memory of tensors: the heap of this process as a graph of numbers.

Python's garbage collector knows what most objects refer to. What only C++ knows is added: tensors
hold storages and gradients, graphs hold saved tensors, arrays hold the tensors that they view.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import gc
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order
from torch import Tensor, UntypedStorage
from torch.autograd.graph import Node

from tfswa_lab.memory.leaks.autograd_graph import graph_of, nodes_among, saved_by
from tfswa_lab.memory.leaks.referrers import referents
from tfswa_lab.memory.trace.tracer import parts_of

# The collector may not track these, but they hold things.
UNTRACKED = frozenset((dict, tuple, np.ndarray))


class Memory(NamedTuple):
    """A storage of tensors."""

    size: int  # bytes
    device: str  # such as `cuda:0`


class Heap:
    """All objects that exist now, by number. It keeps them alive, itself included: close it soon.

    Attributes:
        objects: Python's, and the nodes of autograd's graphs.
        storages: those of all tensors, by their number, which is higher than those of objects.
    """

    def __init__(self):
        self.objects = gc.get_objects()
        self._number = {id(thing): at for at, thing in enumerate(self.objects)}
        self._source, self._target = array("q"), array("q")
        self._link_python()
        self._references = _references(self.objects)  # before others of ours refer to them
        self.storages: dict[int, Memory] = {}
        with torch._C.DisableTorchFunctionSubclass():  # no code of strangers
            self._link_cpp()

    def close(self) -> None:
        """Drop all objects."""
        self.objects.clear()

    @property
    def count(self) -> int:
        """Numbers of objects and storages."""
        return len(self.objects) + len(self.storages)

    @property
    def links(self) -> Links:
        """All links."""
        source, target = (np.frombuffer(each, np.int64) for each in (self._source, self._target))
        return Links(source, target, self.count)

    def number(self, thing: Any) -> int | None:
        """The number of an object; None if the collector does not know it."""
        return self._number.get(id(thing))

    def garbage(self) -> np.ndarray:
        """A mask of all numbers: what only reference cycles keep alive.

        The rule is the collector's own: an object is in use if there are more references to it than
        known objects have, or if one that is in use leads to it.
        """
        held = np.bincount(self._target, minlength=self.count)[: len(self._references)]
        used = [
            at
            for at in np.flatnonzero(self._references > held).tolist()
            if type(self.objects[at]) is not UntypedStorage  # C++ refers to it as long as it exists
        ]
        return ~self.links.reached(used)

    def ways(self, ends: Iterable[Any]) -> Ways:
        """All ways to a storage that do not lead through some objects.

        Args:
            ends: these objects.
        """
        links, count = self.links, self.count
        goes_on = np.ones(count, bool)
        goes_on[[at for thing in ends if (at := self.number(thing)) is not None]] = False
        source, target = (each[goes_on[links.source]] for each in (links.source, links.target))
        leads = Links(target, source, count).reached(list(self.storages))
        inside = leads[target]
        return Ways(self, leads, Links(source[inside], target[inside], count))

    def _link_python(self) -> None:
        """What Python knows; untracked containers join the objects as they are met."""
        for at, thing in enumerate(self.objects):  # grows meanwhile
            held = _in_array(thing) if type(thing) is np.ndarray else referents(thing)
            for each in held:
                if type(each) in UNTRACKED and id(each) not in self._number:
                    self._add(each)
            known = [self._number[id(each)] for each in held if id(each) in self._number]
            self._target.extend(known)
            self._source.extend([at] * len(known))

    def _link_cpp(self) -> None:
        tensors = [thing for thing in self.objects if issubclass(type(thing), Tensor)]
        nodes = list(graph_of([*tensors, *nodes_among(self.objects)]))
        for node in nodes:
            if id(node) not in self._number:
                self._add(node)
        storages = {}
        for each in self.objects:
            if type(each) is UntypedStorage:
                self._link(each, each, storages)
        for holder, held in (*_of_tensors(tensors), *_of_nodes(nodes)):
            self._link(holder, held, storages)

    def _add(self, thing: Any) -> None:
        self._number[id(thing)] = len(self.objects)
        self.objects.append(thing)

    def _link(self, holder: Any, held: Any, storages: dict[int, int]) -> None:
        """A link from an object to another one, or to the storage of a tensor."""
        known = self.number(held) if held is not holder else None
        if known is not None:
            ends = [known]
        elif isinstance(held, UntypedStorage):
            ends = [self._number_of(held, storages)]
        else:
            parts = parts_of(held) if issubclass(type(held), Tensor) else ()
            ends = [self._number_of(part.untyped_storage(), storages) for part in parts]
        self._target.extend(ends)
        self._source.extend([self._number[id(holder)]] * len(ends))

    def _number_of(self, storage: UntypedStorage, storages: dict[int, int]) -> int:
        at = storages.setdefault(storage._cdata, self.count)
        device = str(storage.device)
        self.storages[at] = Memory(0 if device == "meta" else storage.nbytes(), device)
        return at


@dataclass(frozen=True, eq=False)
class Links:
    """Which numbers hold which.

    Args:
        source: those that hold.
        target: those that are held, in the same order.
        count: of all numbers.
    """

    source: np.ndarray
    target: np.ndarray
    count: int

    @cached_property
    def _matrix(self) -> csr_matrix:
        return _matrix(self.source, self.target, self.count)

    @cached_property
    def _transposed(self) -> csr_matrix:
        return _matrix(self.target, self.source, self.count)

    def backwards(self, number: int) -> list[int]:
        """The numbers that hold a number."""
        first, last = self._transposed.indptr[number : number + 2]
        return self._transposed.indices[first:last].tolist()

    def order(self, start: int) -> np.ndarray:
        """The numbers that a number leads to, itself included, the nearest first."""
        return breadth_first_order(self._matrix, start, return_predecessors=False)

    def reached(self, starts: Iterable[int]) -> np.ndarray:
        """A mask of the numbers that some numbers lead to, themselves included."""
        starts = np.asarray(starts, np.int64)
        source = np.concatenate([self.source, np.full(len(starts), self.count)])
        target = np.concatenate([self.target, starts])
        mask = np.zeros(self.count + 1, bool)
        matrix = _matrix(source, target, self.count + 1)
        mask[breadth_first_order(matrix, self.count, return_predecessors=False)] = True
        return mask[:-1]

    def without(self, numbers: Iterable[int]) -> Links:
        """The same, but these numbers hold nothing."""
        kept = ~np.isin(self.source, list(numbers))
        return Links(self.source[kept], self.target[kept], self.count)

    def from_one(self, start: int) -> tuple[list[int], np.ndarray]:
        """The numbers that a number leads to, the nearest first, and which number leads to each."""
        order, before = breadth_first_order(self._matrix, start)
        return order.tolist(), before

    def way(self, start: int, end: int) -> list[int]:
        """The shortest way from a number to another one."""
        before, way = self.from_one(start)[1], [end]
        while way[-1] != start:
            way.append(int(before[way[-1]]))
        return way[::-1]

    def freed(self, starts: Iterable[int]) -> np.ndarray:
        """A mask of the numbers that go when some numbers go, without the garbage collector."""
        held = np.bincount(self.target, minlength=self.count)
        order = np.argsort(self.source, kind="stable")
        first = np.searchsorted(self.source[order], np.arange(self.count + 1))
        gone, waiting = np.zeros(self.count, bool), list(starts)
        while waiting:
            at = waiting.pop()
            gone[at] = True
            for held_by in self.target[order[first[at] : first[at + 1]]].tolist():
                held[held_by] -= 1
                if held[held_by] == 0 and not gone[held_by]:
                    waiting.append(held_by)
        return gone


def _matrix(source: np.ndarray, target: np.ndarray, count: int) -> csr_matrix:
    return csr_matrix((np.ones(len(source), np.int8), (source, target)), (count, count))


class Ways:
    """The objects of a heap that lead to storages, with numbers of their own.

    Attributes:
        things: the objects, and a `Memory` for each storage.
        sizes: bytes of the storages; 0 for objects.
        links: between these numbers.
    """

    def __init__(self, heap: Heap, leads: np.ndarray, links: Links):
        self.numbers = np.flatnonzero(leads)  # on the heap
        here = np.cumsum(leads) - 1
        self.links = Links(here[links.source], here[links.target], len(self.numbers))
        self.things = [heap.storages.get(at) or heap.objects[at] for at in self.numbers.tolist()]
        self.sizes = np.array([t.size if type(t) is Memory else 0 for t in self.things], np.int64)
        self._here = {id(thing): at for at, thing in enumerate(self.things)}

    def number(self, thing: Any) -> int | None:
        """The number of an object here; None if it leads to no storage."""
        return self._here.get(id(thing))


def _references(things: list[Any]) -> np.ndarray:
    """How many references there are to each object of a list, without that of the list."""

    def counted(things: list[Any]) -> np.ndarray:
        return np.array([sys.getrefcount(thing) for thing in things])

    return counted(things) - counted([object()])


def _in_array(array: np.ndarray) -> list[Any]:
    elements = array.ravel().tolist() if array.dtype == object else []
    return [*elements, array.base]


def _of_tensors(tensors: Iterable[Tensor]) -> Iterator[tuple[Any, Any]]:
    """Tensors with their storage, their gradient and the node that made them."""
    for tensor in tensors:
        yield tensor, tensor
        if tensor.is_leaf and tensor.grad is not None:
            yield tensor, tensor.grad
        if tensor.grad_fn is not None:
            yield tensor, tensor.grad_fn


def _of_nodes(nodes: Iterable[Node]) -> Iterator[tuple[Any, Any]]:
    """Nodes with the nodes before them, and with what they save for the backward pass."""
    for node in nodes:
        yield from ((node, before) for before, _ in node.next_functions if before is not None)
        if hasattr(node, "variable"):
            yield node, node.variable
        for saved in saved_by(node):
            for name in ("data", "unpack_hook"):
                held = getattr(saved, name, None)
                if held is not None:
                    yield node, held
