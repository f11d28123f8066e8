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

from tfswa_lab.memory.trace.threads import this_thread


class NodeId(NamedTuple):
    """A node of a graph: the thread that made it, and its number among that thread's nodes."""

    thread: int
    number: int


def next_node() -> NodeId:
    """The node that this thread makes next."""
    return NodeId(this_thread(), torch._C._autograd._get_sequence_nr())


MAKER = "tfswa_lab: made in thread"  # a node's metadata are a dictionary that all share


class NodeNumbers:
    """Recognises new nodes, and finds the thread whose nodes a backward pass visits.

    Attributes:
        elsewhere: the operators of nodes that other threads than the main one made.
    """

    def __init__(self):
        self.begin()
        self.elsewhere: dict[NodeId, str] = {}
        self._thread_of: dict[int, int] = {}  # by backward pass: the thread that made its nodes

    def begin(self) -> None:
        """This thread is the main one; existing nodes are not new."""
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

    def made_elsewhere(self, node: NodeId, op: str) -> None:
        """Note which operator made a node, if another thread than the main one did."""
        if node.thread != self._home:
            self.elsewhere[node] = _plain(op.split(".")[1] if "." in op else op)

    def sign(self, node: Any, thread: int) -> None:
        """Write into a node that another thread than the main one made it, if it did.

        A graph may have nodes of several threads, as that of `nn.DataParallel` has, and their
        numbers overlap. So number and operator have to agree.
        """
        op = self.elsewhere.get(NodeId(thread, node._sequence_nr()))
        if op is not None and op == _plain(node.name().split("Backward")[0]):
            node.metadata.setdefault(MAKER, thread)

    def identify(self, node: Any, task: int = -1) -> NodeId:
        """The identity of a node, which a backward pass may have reached."""
        maker = self._thread_of.get(task, self._home)
        if self.elsewhere:
            maker = node.metadata.get(MAKER, maker)
        return NodeId(maker, node._sequence_nr())


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


class Call(NamedTuple):
    """A module whose forward pass is running."""

    path: str
    graph_task: int  # the backward pass that it runs in, -1 for none


class _Running(threading.local):
    """The calls of each thread, the innermost last."""

    def __init__(self):
        self.calls: list[Call] = []


class ModulePaths:
    """The modules that are called inside `watching`.

    Args:
        on_root: called once with every module that is called outside of all others.

    Attributes:
        roots: how many modules were called outside of all others.
    """

    def __init__(self, on_root: Callable[[nn.Module], None] = lambda module: None):
        self.roots = 0
        self._running = _Running()
        self._lock = threading.RLock()
        self._on_root = on_root
        self._paths: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self._numbers = defaultdict(lambda: [0])  # by thread: where modules begin and end
        self._at = defaultdict(lambda: [""])  # and the module that runs from there on

    def name(self, root: nn.Module) -> None:
        """Name a module and its submodules; a second model's paths begin with its class."""
        with self._lock:
            prefix = type(root).__name__ if self._paths else ""
            for path, module in root.named_modules():
                full = ".".join(filter(None, (prefix, path))) or type(root).__name__
                self._paths.setdefault(module, full)
        self._on_root(root)

    def path_of(self, module: nn.Module) -> str:
        """The path of a module; its class if neither it nor its parent was called or named."""
        return self._paths.get(module, type(module).__name__)

    @property
    def calls(self) -> list[Call]:
        """The modules that run in this thread, the innermost last."""
        return self._running.calls

    @property
    def now(self) -> str:
        """The path of the innermost module that this thread runs, empty outside of all modules."""
        calls = self.calls
        return calls[-1].path if calls else ""

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
        if not self.calls:
            self.roots += 1
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
