"""Every operator of some steps: when it ran, inside of which operator, and for which module.

The profiler is torch's; modules are marked from outside, so no hook is ever put on them. The
operators of a backward pass belong to the modules whose forward pass made their node.

Notebook: 09_running_lean
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from tfswa_lab.memory.trace.module_paths import ModulePaths
from tfswa_lab.performance.timing import refuse_another_profiler, synchronise

STEP = "one step"
MODULE = "module: "
DATA = "waiting for data"
BACKWARD = "autograd::engine::evaluate_function: "
OPTIMIZER = "Optimizer."
COMPILED = "## Call CompiledFxGraph"
IS_OPERATOR = re.compile(rf"(?!autograd::|torch::autograd::|profiler::)\w+::|{COMPILED}")
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


class _Waiting(threading.local):
    depth = 0


_waiting = _Waiting()


@contextmanager
def waiting() -> Iterator[None]:
    """A range in which this thread waits for data."""
    _waiting.depth += 1
    try:
        with record_function(DATA):
            yield
    finally:
        _waiting.depth -= 1


def is_waiting() -> bool:
    """Whether this thread is inside `waiting`."""
    return _waiting.depth > 0


def loading(batches: Iterable) -> Iterator:
    """Iterate over batches, so that a profile counts the time of each as waiting for data.

    A `DataLoader` needs no such help.

    >>> list(loading([1, 2]))
    [1, 2]
    """
    iterator, end = iter(batches), object()
    while True:
        with waiting():
            batch = next(iterator, end)
        if batch is end:
            return
        yield batch


@dataclass(eq=False)
class Event:
    """An operator, module or other range on the host; times are in seconds since the first event.

    Args:
        name: as in torch's profiler.
        start: begin.
        stop: end.
        parent: the range that it ran in, on the same thread.
        modules: modules that it belongs to, the innermost last.
        is_data: whether it is, or is part of, waiting for data.
        is_backward: whether it is part of a backward pass.
        children_seconds: time in ranges directly inside.
        children: how many these are.
        kernel_seconds: time of the GPU's kernels that it started itself.
    """

    name: str
    start: float
    stop: float
    parent: Event | None = None
    modules: tuple[str, ...] = ()
    is_data: bool = False
    is_backward: bool = False
    children_seconds: float = 0.0
    children: int = 0
    kernel_seconds: float = 0.0

    @property
    def own_seconds(self) -> float:
        """Host time outside of the ranges inside."""
        return self.stop - self.start - self.children_seconds

    @property
    def is_operator(self) -> bool:
        """Whether it computes: neither a module nor a part of the profiler or of autograd."""
        return IS_OPERATOR.match(self.name) is not None

    @property
    def label(self) -> str:
        """The name to show: a compiled graph's is long and different in every process."""
        return "compiled graph" if self.name.startswith(COMPILED) else self.name


@dataclass
class Recording:
    """What the profiler saw in some steps.

    Args:
        steps: ranges of the steps.
        events: the steps and all ranges inside, parents before what is in them.
        kernels: begin and end of what ran on a GPU.
        profiler: torch's, which has the trace.
    """

    steps: list[Event]
    events: list[Event]
    kernels: list[tuple[float, float]]
    profiler: torch_profile = field(repr=False)


def record(step: Callable[[], Any], steps: int) -> Recording:
    """Run one step more than asked for under the profiler; the first only warms it up.

    Raises:
        RuntimeError: another profiler of torch runs, or the step has one.
    """
    refuse_another_profiler()
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_initialized():
        activities.append(ProfilerActivity.CUDA)
    with marked_modules(), marked_loaders(), torch_profile(activities=activities) as profiler:
        for _ in range(1 + steps):
            with record_function(STEP):
                step()
                synchronise()
    if not profiler.profiler.kineto_results.events():
        raise RuntimeError("the step runs torch's profiler itself, and both lose their events")
    return read(profiler)


@contextmanager
def marked_modules() -> Iterator[None]:
    """Each call of a module is a range of the profiler, also one that ends with an exception.

    What `torch.compile` traces is left out: inside a compiled graph no module is called.
    """
    paths, original = ModulePaths(), nn.Module.__call__

    def marked(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with record_function(MODULE + paths.now):
            return original(module, *args, **kwargs)

    with patch.object(nn.Module, "__call__", marked), paths.watching():
        watched = nn.Module.__call__

        def unless_traced(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            call = original if torch.compiler.is_compiling() else watched
            return call(module, *args, **kwargs)

        with patch.object(nn.Module, "__call__", unless_traced):
            yield


@contextmanager
def marked_loaders() -> Iterator[None]:
    """Each batch of a `DataLoader` is waiting for data, and so is the start of its workers."""
    with ExitStack() as stack:
        for of, name in ((DataLoader, "__iter__"), (_BaseDataLoaderIter, "__next__")):
            stack.enter_context(patch.object(of, name, _marked(getattr(of, name))))
        yield


def _marked(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def marked(self: Any) -> Any:
        with waiting():
            return original(self)

    return marked


def read(profiler: torch_profile) -> Recording:
    """Take the events out of torch's profiler, without the first step.

    torch's own list of events is made at a rate of 25 per millisecond; this takes a tenth of that.
    """
    raw = profiler.profiler.kineto_results.events()
    on_host = [e for e in raw if _is_range(e)]
    on_gpu = [e for e in raw if e.activity_type() in ON_GPU]
    origin = min(e.start_ns() for e in on_host)
    events = _nested(on_host, on_gpu, origin)
    steps = [event for event in events if event.name == STEP][1:]
    began = steps[0].start
    kernels = [((e.start_ns() - origin) / 1e9, (e.end_ns() - origin) / 1e9) for e in on_gpu]
    return Recording(
        steps,
        [event for event in events if event.start >= began],
        [kernel for kernel in kernels if kernel[0] >= began],
        profiler,
    )


def _is_range(event: Any) -> bool:
    """Whether it begins and ends on one thread, and is no note about memory or of CUDA's driver."""
    is_call = event.activity_type() in ("cpu_op", "user_annotation")
    on_one_thread = event.start_thread_id() == event.end_thread_id()
    return is_call and on_one_thread and event.name() != "[memory]"


def _nested(on_host: list, on_gpu: list, origin: int) -> list[Event]:
    """Events by begin, each with its parent and its modules."""
    started = _kernel_seconds(on_gpu)
    makers: dict[tuple[int, int], tuple[str, ...]] = {}  # modules by node of the graph
    running: dict[int, list[Event]] = {}  # by thread
    events = []
    for raw in sorted(on_host, key=lambda e: (e.start_ns(), -e.end_ns())):
        start, stop = ((ns - origin) / 1e9 for ns in (raw.start_ns(), raw.end_ns()))
        stack = running.setdefault(raw.start_thread_id(), [])
        while stack and stack[-1].stop <= start:
            stack.pop()
        event = Event(raw.name(), start, stop, stack[-1] if stack else None)
        event.kernel_seconds = started.get(raw.correlation_id(), 0.0)
        node = (raw.start_thread_id(), raw.sequence_nr())
        maker = makers.get((raw.fwd_thread_id(), raw.sequence_nr()), ())
        _place(event, maker)
        if not event.is_backward and raw.sequence_nr() >= 0:
            makers[node] = event.modules  # the last before the node is its maker
        stack.append(event)
        events.append(event)
    return events


def _place(event: Event, maker: tuple[str, ...]) -> None:
    """Fill in what follows from the parent, and for a node's backward from who made the node."""
    parent = event.parent
    if parent is not None:
        parent.children += 1
        parent.children_seconds += event.stop - event.start
        event.modules, event.is_data = parent.modules, parent.is_data
        event.is_backward = parent.is_backward
    event.is_data |= event.name == DATA
    if event.name.startswith(BACKWARD):
        event.modules, event.is_backward = maker, True
    elif event.name.startswith(MODULE):
        event.modules += (event.name.removeprefix(MODULE),)
    elif event.name.startswith(OPTIMIZER):
        event.modules = (event.name.partition("#")[0],)


def _kernel_seconds(on_gpu: list) -> dict[int, float]:
    """Seconds on the GPU by the operator that started them."""
    seconds: dict[int, float] = {}
    for kernel in on_gpu:
        operator = kernel.linked_correlation_id()
        seconds[operator] = seconds.get(operator, 0.0) + kernel.duration_ns() / 1e9
    return seconds
