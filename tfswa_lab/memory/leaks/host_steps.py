"""Host memory from step to step, without a trace: Python's own, nodes of graphs, and the process's.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import gc
import math
import sys
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from tfswa_lab.memory.gauges import heap_in_use
from tfswa_lab.memory.leaks.autograd_graph import graph_of, last_of
from tfswa_lab.memory.leaks.referrers import of_types, overlooked
from tfswa_lab.memory.leaks.traced_steps import Ending, Numbered, ending_of, resting_gc
from tfswa_lab.memory.leaks.trend import grows, slope, slows
from tfswa_lab.memory.trace.stacks import Frame, user_frame

FRAMES = 12  # of Python that are kept for each allocation
SETTLING = 2  # steps that are run before the first look
# Growth per step that is worth a word: of nodes; of bytes, as lists of numbers may grow; and of
# bytes of the whole process, which has others' in it.
LEAST = {"nodes": 1, "python": 1024, "process": 32 * 1024}
BLOCK = 64  # bytes of a small object, about
CONTAINERS = (list, dict, set, deque)


class HostSteps:
    """Steps whose host memory is watched.

    Args:
        call: runs the next step.
        old: tensors, among others, that were there before.
        kinds: levels that are to be judged.

    Attributes:
        levels: after each step, `nodes` of the graphs of all tensors, bytes that `python` (and
            NumPy) has allocated, and bytes of the `process`.
        kernels: bytes per step that oneDNN kept, for sizes that it had not met.
        ended: how the run ended, if it did so early.
    """

    def __init__(self, call: Numbered, old: list[ref], kinds: Iterable[str] = LEAST):
        self.levels: dict[str, list[int]] = {name: [] for name in LEAST}
        self.ended, self.kernels = Ending(), 0.0
        self.call = call
        self._old, self.kinds = old, kinds
        self._lines: list[tuple[int, Frame]] = []
        self._blocks: list[int] = []  # of Python's own allocator, which has those up to 512 bytes

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
                self._lines = _lines_that_grew(before, tracemalloc.take_snapshot())

    @property
    def growing(self) -> str:
        """The name of the level that grows, empty if none does."""
        for name in self.kinds:
            levels = self.levels[name]
            going_on = bool(levels) and grows(levels) and not slows(levels)
            enough = going_on and slope(levels) >= LEAST[name]
            if enough and (name != "python" or self._is_borne_out):
                return name
        return ""

    @property
    def _is_borne_out(self) -> bool:
        """Whether what Python holds more is not made up for by what it held before it was watched.

        Where old objects make room for new ones, as the fourth best checkpoint does for a better
        one, only the new ones are counted. Large objects are the C library's, small ones blocks.
        """
        added = slope(self.levels["python"])
        large = slope(self.levels["process"])
        small = BLOCK * slope(self._blocks)
        return max(large, small) > added / 4

    @property
    def line(self) -> Frame | None:
        """That allocates most of what Python holds more than before, if it is known."""
        return self._lines[0][1] if self._lines else None

    def grown_container(self) -> Any:
        """The list, dictionary, set or deque that got most new elements in some more steps."""
        return self._grown(lambda: of_types(CONTAINERS)) or self._grown(
            lambda: list(overlooked((dict,)).values())
        )

    def _grown(self, containers: Callable[[], list[Any]], steps: int = 4) -> Any:
        """Grown twice: once may be another object at the place of one that has gone."""
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

    def deepest_tensor(self, steps: int = 6) -> Tensor:
        """The tensor whose graph got most new nodes in some more steps."""
        before = {id(tensor): _depth(tensor) for tensor in last_of(of_types((Tensor,)))}
        self._run(steps)
        last = last_of(of_types((Tensor,)))
        return max(last, key=lambda tensor: _depth(tensor) - before.get(id(tensor), 0))

    def _run(self, steps: int, then: Callable[[], None] = lambda: None) -> None:
        for _ in range(steps):
            if self.ended.words:
                return
            try:
                self.call()
            except Exception as error:  # such as no more data: it has run all steps asked for
                self.ended = ending_of(error, self.call.count)
                return
            then()

    def _run_without_onednn(self, steps: int) -> None:
        """Whether the process grows all the same; if not, it was oneDNN's cache of kernels."""
        grew = slope(self.levels["process"])
        self.levels["process"] = []
        with torch.backends.mkldnn.flags(False, None, None, None):
            self._run(SETTLING)
            self._run(steps, self._measure)
        self.kernels = 0.0 if self.growing else grew

    def _measure(self) -> None:
        gc.collect()
        self.levels["process"].append(heap_in_use())
        self.levels["python"].append(tracemalloc.get_traced_memory()[0])
        self._blocks.append(sys.getallocatedblocks())
        old = [thing for each in self._old if isinstance(thing := each(), Tensor)]
        self.levels["nodes"].append(len(graph_of([*old, *of_types((Tensor,))])))


@contextmanager
def _tracemalloc() -> Iterator[None]:
    running = tracemalloc.is_tracing()
    if not running:
        tracemalloc.start(FRAMES)
    try:
        yield
    finally:
        if not running:
            tracemalloc.stop()


def _depth(tensor: Tensor) -> int:
    return len(graph_of([tensor]))


def _lines_that_grew(
    before: tracemalloc.Snapshot, after: tracemalloc.Snapshot
) -> list[tuple[int, Frame]]:
    """Bytes by which each line outside of torch and of this room holds more, most first."""
    grown = []
    for change in after.compare_to(before, "traceback"):
        inward = [Frame(each.filename, each.lineno, "") for each in change.traceback]
        line = user_frame(inward[::-1])
        if line is not None and change.size_diff > 0:
            grown.append((change.size_diff, line))
    return sorted(grown, key=lambda pair: -pair[0])
