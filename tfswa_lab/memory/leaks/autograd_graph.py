"""Tensors that autograd's graph saves for the backward pass, found from its nodes.

They need not exist in Python, so the garbage collector does not know who holds them.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from torch import Tensor, UntypedStorage
from torch.autograd.graph import Node

from tfswa_lab.memory.trace.tracer import has_storage

MOST = 100_000  # nodes that a search looks at


def graph_of(tensors: Iterable[Tensor]) -> dict[Node, Tensor]:
    """All nodes of the graphs that made some tensors, and the first tensor that leads to each.

    >>> import torch
    >>> x = torch.ones(2, requires_grad=True)
    >>> [type(node).__name__ for node in graph_of([x.exp().sum()])]
    ['SumBackward0', 'ExpBackward0', 'AccumulateGrad']
    """
    nodes: dict[Node, Tensor] = {}
    for tensor in tensors:
        waiting = [tensor.grad_fn]
        while waiting and len(nodes) < MOST:
            node = waiting.pop()
            if node is not None and node not in nodes:
                nodes[node] = tensor
                waiting.extend(before for before, _ in node.next_functions)
    return nodes


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
    """Tensors that the graphs of other tensors have saved, and which tensor keeps each alive.

    Args:
        tensors: of two that lead to the same node, the first is named.

    Attributes:
        nodes: of the graphs, and the tensors that lead to them.
        storages: addresses of storages that the nodes saved, and the tensors that lead there.
        packed: identities of objects that saved-tensor hooks keep instead, and the tensors.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        self.nodes = graph_of(tensors)
        self.storages: dict[int, Tensor] = {}
        self.packed: dict[int, Tensor] = {}
        for node, tensor in self.nodes.items():
            for saved in _saved_by(node):
                self._note(saved, tensor)

    def holder_of(self, thing: Any) -> Tensor | None:
        """The tensor whose graph holds an object; None if there is none."""
        if isinstance(thing, Tensor | UntypedStorage):
            return self.storages.get(address_of(thing))
        return self.packed.get(id(thing))

    def _note(self, saved: Any, tensor: Tensor) -> None:
        """Record a saved tensor, still packed: unpacking might run a forward pass again."""
        data, hook = getattr(saved, "data", None), getattr(saved, "unpack_hook", None)
        if has_storage(data):
            self.storages.setdefault(address_of(data), tensor)
        if hook is not None:  # C++ keeps both, so their identities stay
            self.packed |= {id(hook): tensor, id(data): tensor}


def address_of(thing: Tensor | UntypedStorage) -> int:
    """The address of a storage, the same for all tensors in it."""
    return (thing.untyped_storage() if isinstance(thing, Tensor) else thing)._cdata


def _saved_by(node: Node) -> Iterator[Any]:
    for name in _names_of_saved(type(node)):
        try:
            saved = getattr(node, name)
        except RuntimeError:  # freed by a backward pass
            continue
        yield from saved if isinstance(saved, list | tuple) else [saved]


@lru_cache(maxsize=1024)
def _names_of_saved(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
