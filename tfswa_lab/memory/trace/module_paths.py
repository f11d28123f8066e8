"""Which module is running: in its forward pass, and later when its gradients are computed.

Autograd numbers the nodes of each thread in the order in which it makes them. The numbers at which
modules begin and end therefore tell which module made the node that a backward pass has reached.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch
from torch import nn


class NodeId(NamedTuple):
    """A node of a graph: the thread that made it, and its number among that thread's nodes."""

    thread: int
    number: int


def next_node() -> NodeId:
    """The node that this thread makes next."""
    return NodeId(threading.get_ident(), torch._C._autograd._get_sequence_nr())


class NodeNumbers:
    """Recognises new nodes, and finds the thread whose nodes a backward pass visits."""

    def __init__(self):
        self.begin()
        self._thread_of: dict[int, int] = {}  # by backward pass: the thread that made its nodes

    def begin(self) -> None:
        """This thread makes the graphs; existing nodes are not new."""
        self._home, number = next_node()
        self._next = {self._home: number}  # by thread
        self._newest = self._home  # the thread that made the newest node

    def new(self, task: int) -> NodeId | None:
        """The newest node, if this thread has made one since the last call.

        Args:
            task: the backward pass that is running, -1 for none.
        """
        if task != -1:
            self._thread_of.setdefault(task, self._newest)
        thread, number = next_node()
        before, self._next[thread] = self._next.get(thread, number), number
        if number == before:
            return None
        self._newest = thread
        return NodeId(thread, number - 1)

    def identify(self, node: Any, task: int = -1) -> NodeId:
        """The identity of a node, which a backward pass may have reached."""
        return NodeId(self._thread_of.get(task, self._home), node._sequence_nr())


class Call(NamedTuple):
    """A module whose forward pass is running."""

    path: str
    graph_task: int  # the backward pass that it runs in, -1 for none


class ModulePaths:
    """The modules that are called inside `watching`.

    Args:
        on_root: called once with every module that is called outside of all others.

    Attributes:
        calls: the running modules, the innermost last.
        roots: how many modules were called outside of all others.
    """

    def __init__(self, on_root: Callable[[nn.Module], None] = lambda module: None):
        self.calls: list[Call] = []
        self.roots = 0
        self._on_root = on_root
        self._paths: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self._numbers = defaultdict(lambda: [0])  # by thread: where modules begin and end
        self._at = defaultdict(lambda: [""])  # and the module that runs from there on

    def name(self, root: nn.Module) -> None:
        """Name a module and its submodules; a second model's paths begin with its class."""
        prefix = type(root).__name__ if self._paths else ""
        for path, module in root.named_modules():
            full = ".".join(filter(None, (prefix, path))) or type(root).__name__
            self._paths.setdefault(module, full)
        self._on_root(root)

    def path_of(self, module: nn.Module) -> str:
        """The path of a module; its class if neither it nor its parent was called or named."""
        return self._paths.get(module, type(module).__name__)

    @property
    def now(self) -> str:
        """The path of the innermost running module, empty outside of all modules."""
        return self.calls[-1].path if self.calls else ""

    def that_made(self, node: NodeId) -> str:
        """The path of the module that was running when a node was made."""
        place = bisect_right(self._numbers[node.thread], node.number) - 1
        return self._at[node.thread][place]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See every call of a module."""
        original = nn.Module.__call__

        def seen(module: nn.Module, *args, **kwargs):
            self._enter(module)
            try:
                return original(module, *args, **kwargs)
            finally:
                self.calls.pop()
                self._note()

        with patch.object(nn.Module, "__call__", seen):
            yield

    def _enter(self, module: nn.Module) -> None:
        self.roots += not self.calls
        if module not in self._paths:
            if self.calls:  # created during the forward pass
                self._paths[module] = f"{self.now}.{type(module).__name__}"
            else:
                self.name(module)
        self.calls.append(Call(self._paths[module], torch._C._current_graph_task_id()))
        self._note()

    def _note(self) -> None:
        thread, number = next_node()
        self._numbers[thread].append(number)
        self._at[thread].append(self.now)
