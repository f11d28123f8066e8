"""Host memory from step to step, without a trace: Python's, nodes of graphs, and the process's.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import gc
import math
import sys
import tracemalloc
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from tfswa_lab.memory.gauges import children_memory, heap_in_use
from tfswa_lab.memory.leaks.autograd_graph import graph_of, kept_nodes, last_of
from tfswa_lab.memory.leaks.census import grows, slope, slows
from tfswa_lab.memory.leaks.children import Children
from tfswa_lab.memory.leaks.referrers import of_types, untracked_containers
from tfswa_lab.memory.leaks.traced_steps import COMPLETED, StepCaller, outcome_of, resting_gc
from tfswa_lab.memory.trace.stacks import Frame, user_frame
from tfswa_lab.memory.trace.threads import undone_in_children

FRAMES = 12  # Python frames that are kept for each allocation
SETTLING = 2  # steps that run before the first measurement
# The least growth per step that counts: in nodes; in bytes of Python, where a list of numbers may
# grow; in bytes of the process, which also holds memory of other libraries; and in bytes of its
# children: sound ones copy up to 200 KiB of pages per step that they shared with a large parent.
LEAST = {"nodes": 1, "python": 1024, "process": 32 * 1024, "children": 512 * 1024}
BLOCK = 64  # bytes of a small object, roughly
CONTAINERS = (list, dict, set, deque)


@dataclass(frozen=True)
class HostGrowth:
    """Growth of host memory.

    Args:
        kind: `nodes` of graphs, `python`, `process`, or `children`.
        per_step: nodes or bytes.
        size: bytes per step; for nodes, growth of the process.
        line: the line that allocates, if it is known.
        holder: the object that keeps it alive, as code, if it is known.
        where: where the holder is defined.
        known: classes that are known to hold memory, from `known_classes`.
        children: the child processes that grow.
    """

    kind: str
    per_step: float
    size: float
    line: Frame | None = None
    holder: str = ""
    where: str = ""
    known: tuple[str, ...] = ()
    children: Children | None = None


class HostSteps:
    """Steps whose host memory is measured.

    Args:
        call: runs the next step.
        old: objects that are older than these steps; the tensors among them count.
        kinds: levels that may count as growing.

    Attributes:
        levels: after each step, `nodes` of the graphs of all tensors, bytes that `python` (and
            NumPy) has allocated, bytes of the `process`, and bytes of its `children`.
        children: bytes of each child process, after the first step and after the last.
        kernels: bytes per step that oneDNN keeps for sizes that are new to it.
        line: the line that allocates most of Python's growth, if it is known.
        outcome: how the run ended.
    """

    def __init__(self, call: StepCaller, old: list[ref], kinds: Iterable[str] = LEAST):
        self.levels = {name: _levels() for name in LEAST}
        self.outcome, self.kernels, self.line = COMPLETED, 0.0, None
        self.call = call
        self._old, self.kinds = old, kinds
        self.children: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self._alive = _levels()  # number of child processes
        self._blocks = _levels()  # of Python's allocator for objects up to 512 bytes

    def run(self, steps: int, longest: int) -> None:
        """Run some steps, and on to `longest` if something grows."""
        with resting_gc(), _tracemalloc():
            self._run(SETTLING)
            before = tracemalloc.take_snapshot()
            self._run(steps, self._measure)
            if self.growing:
                self._run(longest - steps, self._measure)
            if self.growing == "process":
                self._run_without_onednn(steps)
            if self.growing == "python":
                self.line = _line_that_grew(before, tracemalloc.take_snapshot())

    @property
    def growing(self) -> str:
        """The name of the level that grows, empty if none does."""
        found = [name for name in self.kinds if self._rises(name)]
        most = max(found, key=lambda name: slope(self.levels[name]), default="")
        first = next(iter(found), "")  # a node is not a byte, and `process` contains `python`
        return most if most == "children" and first != "nodes" else first

    def _rises(self, name: str) -> bool:
        levels = self.levels[name]
        if not levels:
            return False
        enough = grows(levels) and not slows(levels) and slope(levels) >= LEAST[name]
        if name == "children":
            return enough or self.children_are_added
        return enough and (name != "python" or self._python_holds_more)

    @property
    def children_are_added(self) -> bool:
        """Whether there are more and more child processes."""
        return grows(self._alive) and not slows(self._alive)

    @property
    def _python_holds_more(self) -> bool:
        """Whether Python's growth is real, and not new objects in the places of older ones.

        `tracemalloc` counts only objects that are made while it runs. If a new checkpoint replaces
        an older one, it sees growth, and the allocators see none: the C library's for large
        objects, Python's blocks for small ones.
        """
        added = slope(self.levels["python"])
        large = slope(self.levels["process"])
        small = BLOCK * slope(self._blocks)
        return max(large, small) > added / 4

    def grown_container(self) -> Any:
        """The list, dictionary, set or deque that gets most new elements in some more steps."""
        return self._grown(lambda: of_types(CONTAINERS)) or self._grown(
            lambda: list(untracked_containers((dict,)).values())
        )

    def _grown(self, containers: Callable[[], list[Any]], steps: int = 4) -> Any:
        """It has to grow twice: one growth may be a new object with the identity of an old one."""
        lengths = []
        for _ in range(2):
            lengths.append({id(each): len(each) for each in containers()})
            self._run(steps)
            gc.collect()
        first, second = lengths
        grown = [
            (len(each) - first[id(each)], each)
            for each in containers()
            if first.get(id(each), math.inf) < second.get(id(each), 0) < len(each)
        ]
        most, container = max(grown, key=lambda pair: pair[0], default=(0, None))
        return container if most >= steps else None

    def deepest_tensor(self, steps: int = 6) -> Tensor | None:
        """The tensor whose graph gets most new nodes in some more steps, None if none does."""
        before = {id(tensor): _depth(tensor) for tensor in last_of(of_types((Tensor,)))}
        self._run(steps)
        last = last_of(of_types((Tensor,)))
        added = {id(each): _depth(each) - before.get(id(each), 0) for each in last}
        deepest = max(last, key=lambda tensor: added[id(tensor)], default=None)
        return deepest if deepest is not None and added[id(deepest)] >= steps else None

    def _run(self, steps: int, then: Callable[[], None] = lambda: None) -> None:
        for _ in range(steps):
            if self.outcome.error:
                return
            try:
                self.call()
            except Exception as error:  # such as no more data: all requested steps have run
                self.outcome = outcome_of(error, self.call.count)
                return
            then()

    def _run_without_onednn(self, steps: int) -> None:
        """Without oneDNN, does the process still grow? If not, its cache of kernels did."""
        grew = slope(self.levels["process"])
        self.levels["process"] = _levels()
        with torch.backends.mkldnn.flags(False, None, None, None):
            self._run(SETTLING)
            self._run(steps, self._measure)
        self.kernels = 0.0 if self.growing else grew

    def _measure(self) -> None:
        gc.collect()
        self.levels["process"].append(heap_in_use())
        self.levels["python"].append(tracemalloc.get_traced_memory()[0])
        self._blocks.append(sys.getallocatedblocks())
        children = children_memory()  # only two of all are kept: they are memory of Python, too
        self.children = (self.children[0] if self._alive else children, children)
        self._alive.append(len(children))
        self.levels["children"].append(sum(children.values()))
        old = [thing for each in self._old if isinstance(thing := each(), Tensor)]
        self.levels["nodes"].append(len(graph_of([*old, *of_types((Tensor,)), *kept_nodes()])))


def _levels() -> array:
    """Whole numbers of 8 bytes: a list of Python's would grow by 40 bytes more in each step, and
    would be counted among what it measures.
    """
    return array("q")


@contextmanager
def _tracemalloc() -> Iterator[None]:
    running = tracemalloc.is_tracing()
    if running:
        yield
        return
    tracemalloc.start(FRAMES)
    try:
        with undone_in_children(tracemalloc.stop):
            yield
    finally:
        tracemalloc.stop()


def _depth(tensor: Tensor) -> int:
    return len(graph_of([tensor]))


def _line_that_grew(before: tracemalloc.Snapshot, after: tracemalloc.Snapshot) -> Frame | None:
    """The line outside of torch and this package's memory tools that allocates most new memory."""
    for change in after.compare_to(before, "traceback"):  # the largest change first
        inward = [Frame(each.filename, each.lineno, "") for each in change.traceback]
        line = user_frame(inward[::-1])
        if line is not None and change.size_diff > 0:
            return line
    return None
