"""Tensors that autograd's graph saves for the backward pass, found from its nodes.

They need not exist in Python, so the garbage collector does not know who holds them.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from torch import Tensor, UntypedStorage
from torch.autograd.graph import Node

from tfswa_lab.memory.trace.tracer import has_storage

MOST = 100_000  # nodes that a search looks at


def graph_of(ends: Iterable[Tensor | Node]) -> dict[Node, Tensor | Node]:
    """All nodes of the graphs that made some tensors, and the first tensor that leads to each.

    A node, such as a `grad_fn` that is kept, may stand in the place of a tensor.

    >>> import torch
    >>> x = torch.ones(2, requires_grad=True)
    >>> [type(node).__name__ for node in graph_of([x.exp().sum()])]
    ['SumBackward0', 'ExpBackward0', 'AccumulateGrad']
    """
    nodes: dict[Node, Tensor | Node] = {}
    for end in ends:
        waiting = [end.grad_fn if isinstance(end, Tensor) else end]
        while waiting and len(nodes) < MOST:
            node = waiting.pop()
            if node is not None and node not in nodes:
                nodes[node] = end
                waiting.extend(before for before, _ in node.next_functions)
    return nodes


def kept_nodes() -> list[Node]:
    """All nodes that objects of Python may refer to, such as a `grad_fn` in a list."""
    return nodes_among(gc.get_objects())


def nodes_in(holder: Any) -> list[Node]:
    """The nodes that an object refers to."""
    return nodes_among(gc.get_referents(holder))


def nodes_among(things: list[Any]) -> list[Node]:
    """Those objects that are nodes of graphs."""
    kinds = set(filter(is_node, set(map(type, things))))
    return [thing for thing in things if type(thing) in kinds]


def is_node(kind: type) -> bool:
    """Whether objects of a class are nodes; no code of a metaclass runs."""
    return any("next_functions" in _NAMES(base) for base in _BASES(kind))


_NAMES, _BASES = (type.__dict__[name].__get__ for name in ("__dict__", "__mro__"))


def last_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that no other tensor was made from: they keep the graph alive.

    >>> import torch
    >>> x = torch.ones(2, requires_grad=True)
    >>> y = x.exp()
    >>> z = y.sum()
    >>> last_of([x, y, z]) == [z]
    True
    """
    made = [tensor for tensor in tensors if tensor.grad_fn is not None]
    inner = {before for node in graph_of(made) for before, _ in node.next_functions}
    return [tensor for tensor in made if tensor.grad_fn not in inner]


class SavedTensors:
    """Tensors that graphs have saved, and which end of a graph keeps each alive.

    Args:
        ends: tensors or nodes; of two that lead to the same node, the first is named.

    Attributes:
        nodes: of the graphs, and the ends that lead to them.
        storages: addresses of storages that the nodes saved, and the ends that lead there.
        packed: identities of objects that saved-tensor hooks keep instead, and the ends.
    """

    def __init__(self, ends: Iterable[Tensor | Node]):
        self.nodes = graph_of(ends)
        self.storages: dict[int, Tensor | Node] = {}
        self.packed: dict[int, Tensor | Node] = {}
        for node, end in self.nodes.items():
            for saved in saved_by(node):
                self._note(saved, end)

    def holder_of(self, thing: Any) -> Tensor | Node | None:
        """The end of the graph that holds an object; None if there is none."""
        if isinstance(thing, UntypedStorage) or has_storage(thing):
            return self.storages.get(address_of(thing))
        return self.packed.get(id(thing))

    def _note(self, saved: Any, end: Tensor | Node) -> None:
        """Record a saved tensor, still packed: unpacking might run a forward pass again."""
        data, hook = getattr(saved, "data", None), getattr(saved, "unpack_hook", None)
        if has_storage(data):
            self.storages.setdefault(address_of(data), end)
        if hook is not None:  # C++ keeps both, so their identities stay
            self.packed |= {id(hook): end, id(data): end}


def address_of(thing: Tensor | UntypedStorage) -> int:
    """The address of a storage, the same for all tensors in it."""
    return (thing.untyped_storage() if isinstance(thing, Tensor) else thing)._cdata


def saved_by(node: Node) -> Iterator[Any]:
    """What a node has saved for the backward pass, still packed; nothing once it is freed."""
    for name in _names_of_saved(type(node)):
        try:
            saved = getattr(node, name)
        except RuntimeError:  # freed by a backward pass
            continue
        yield from saved if isinstance(saved, list | tuple) else [saved]


@lru_cache(maxsize=1024)
def _names_of_saved(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
