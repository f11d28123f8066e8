"""Which node of autograd's graph is which: its number, and the thread that gave it out.

Autograd numbers nodes in the order of their making, in every thread from 0 on. On a CPU, the thread
that calls `backward` makes all nodes. On a GPU, the backward pass runs in a thread of autograd's
own, so what is recomputed there has small numbers that other nodes have, too.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch


class NodeId(NamedTuple):
    """A node: the thread that made it, and its number among that thread's nodes."""

    thread: int
    number: int


def next_node() -> NodeId:
    """The node that this thread will make next."""
    return NodeId(threading.get_ident(), torch._C._autograd._get_sequence_nr())


class NodeNumbers:
    """Tells new nodes, and whose nodes a backward pass goes through."""

    def __init__(self):
        self.begin()
        self._thread_of: dict[int, int] = {}  # by backward pass: who made the nodes it goes through

    def begin(self) -> None:
        """This thread makes the graphs; nodes that there are already are not new."""
        self._home, number = next_node()
        self._next = {self._home: number}  # by thread
        self._newest = self._home  # the thread that made the newest node

    def new(self, task: int) -> NodeId | None:
        """The newest node, if this thread has made one since it asked last.

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
        """A node that a backward pass has come to, or one of the graphs that are there."""
        return NodeId(self._thread_of.get(task, self._home), node._sequence_nr())
