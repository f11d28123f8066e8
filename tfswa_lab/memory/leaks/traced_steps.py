"""Runs steps under a trace and looks at the heap after each one.

The garbage collector is off while a step runs and is called between steps: so it is known what
only the collector frees. All older objects are frozen meanwhile (`gc.freeze`), which makes a look
through the new ones a matter of milliseconds.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import gc
import inspect
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes

from tfswa_lab.memory.gauges import device_signals
from tfswa_lab.memory.leaks.autograd_graph import graph_of, nodes_in
from tfswa_lab.memory.leaks.census import Boundary, Census
from tfswa_lab.memory.leaks.hooks import hook_counts
from tfswa_lab.memory.leaks.referrers import of_types
from tfswa_lab.memory.out_of_memory import is_out_of_memory
from tfswa_lab.memory.trace.stacks import Frame, user_frame
from tfswa_lab.memory.trace.threads import undone_in_children
from tfswa_lab.memory.trace.timeline import Block
from tfswa_lab.memory.trace.tracer import Tracer, parts_of

END_OF_DATA = (StopIteration, StopAsyncIteration, IndexError, EOFError)


class Outcome(NamedTuple):
    """How a run of steps ended; all is empty if no step raised an error.

    Args:
        error: the step that raised an error, and the error.
        failed: whether that error means anything but the end of the data.
        out_of_memory: whether it means that there was no memory left.
    """

    error: str = ""
    failed: bool = False
    out_of_memory: bool = False


COMPLETED = Outcome()


def outcome_of(error: Exception, step: int) -> Outcome:
    """The outcome of a run in which a step raised an error.

    >>> outcome_of(StopIteration(), 12)
    Outcome(error='step 12 ended with StopIteration', failed=False, out_of_memory=False)
    """
    said = ": ".join(filter(None, (type(error).__name__, str(error))))
    failed = not isinstance(error, END_OF_DATA)
    return Outcome(f"step {step} ended with {said}", failed, is_out_of_memory(error))


POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
GIVEN = (*POSITIONAL, inspect.Parameter.KEYWORD_ONLY)


class StepCaller:
    """Calls a step, and gives it its number if it needs an argument.

    Attributes:
        count: the number of calls that did not fail.

    Raises:
        ValueError: it only makes a generator or a coroutine, or needs several arguments.
        TypeError: it cannot be called, or is a network, which needs an input.

    >>> seen = []
    >>> call = StepCaller(lambda number: seen.append(number))
    >>> call(), call(), seen
    (None, None, [0, 1])
    """

    def __init__(self, step: Callable[..., Any]):
        self.count = 0
        self._step, self._parameter = step, _needed(step)

    def __call__(self) -> None:
        """Run the next step, and drop what it returns."""
        try:
            made = self._step(self.count) if self._parameter else self._step()
        except Exception as error:
            if self._parameter and not self.count:
                error.add_note(f"the step was given its number, 0, as `{self._parameter}`")
            raise
        if _has_not_started(made):
            _refuse_lazy(self._step)
        self.count += 1


def _needed(step: Any) -> str:
    """The name of the argument that the step needs, empty if it needs none."""
    if isinstance(step, nn.Module):
        raise TypeError("step is a network; pass a function that makes its input and calls it")
    if not callable(step):
        raise TypeError(
            f"step is a {type(step).__name__}, not a function; to diagnose `train(x)`, pass "
            "`lambda: train(x)`"
        )
    if inspect.isgeneratorfunction(step) or inspect.iscoroutinefunction(step):
        _refuse_lazy(step)
    try:
        parameters = inspect.signature(step).parameters.values()
    except ValueError:  # some builtins have no signature
        return ""
    needed = [each for each in parameters if each.default is each.empty and each.kind in GIVEN]
    if len(needed) > 1 or any(each.kind not in POSITIONAL for each in needed):
        names = ", ".join(each.name for each in needed)
        raise ValueError(f"step needs {names}; pass one that takes nothing, or only its number")
    return needed[0].name if needed else ""


def _has_not_started(made: Any) -> bool:
    if inspect.isgenerator(made):
        return inspect.getgeneratorstate(made) == inspect.GEN_CREATED
    return inspect.iscoroutine(made) and inspect.getcoroutinestate(made) == inspect.CORO_CREATED


def _refuse_lazy(step: Any) -> None:
    raise ValueError(
        f"{step!r} only makes a generator or coroutine, so nothing runs; pass a function that "
        "runs it to its end"
    )


OWNERS = (Tensor, nn.Module, Optimizer)
TURN = 0.001  # seconds
# Python 3.12 starts with 375 objects frozen, 3.11 and 3.13 with none; a program freezes far more.
FROZEN_BY_PYTHON = 1000


class TracedSteps:
    """Runs steps one after another, and records what the trace and the heap show.

    Args:
        call: runs the next step.
        model: a module whose parts are named by their paths.

    Attributes:
        outcome: how the run ended.
    """

    def __init__(self, call: Callable[[], None], model: nn.Module | None = None):
        self.outcome = COMPLETED
        self._call, self._boundaries = call, []
        self._tracer = Tracer()
        gc.collect()  # older garbage does not count
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # nor an older cache
        self._old = [ref(owner) for owner in of_types(OWNERS)]
        if model is not None:
            self._tracer.modules.name(model)

    @property
    def done(self) -> int:
        """The number of steps that have run to their end."""
        return len(self._boundaries)

    @contextmanager
    def running(self) -> Iterator[TracedSteps]:
        """Trace, with the garbage collector off."""
        with resting_gc(), self._tracer:
            self._register(self._old_owners())
            self._start = self._tracer.event
            yield self

    def run(self, count: int, may_fail: bool = False) -> None:
        """Run steps until `count` are done.

        Args:
            may_fail: whether an error ends the run instead of being raised, because there may be
                no data for more steps than the user asked for. An out-of-memory error always
                ends the run.
        """
        while self.done < count and not self.outcome.error:
            self._tracer.step()
            try:
                self._call()
            except Exception as error:
                self.outcome = outcome_of(error, self.done)
                if not (may_fail or self.outcome.out_of_memory):
                    error.add_note(f"raised in step {self.done} of a diagnosis of leaks")
                    raise
            else:
                self._look()

    def census(self) -> Census:
        """Memory after each step so far."""
        devices = sorted(self._tracer.devices, key=lambda device: device.startswith("cpu"))
        timelines = [self._tracer.timeline(device) for device in devices if device != "meta"]
        return Census(timelines, self._start, self._boundaries)

    def references(self) -> dict[Block, ref]:
        """Weak references to the storages of all blocks that are alive now."""
        return {block: ref(storage) for block, storage in self._tracer.living()}

    def owners(self) -> list[ref]:
        """Weak references to all tensors, modules and optimizers."""
        return [*self._old, *map(ref, of_types(OWNERS))]

    def line_of_graph(self, holder: Any) -> Frame | None:
        """The line of the last operation in a tensor's graph, or in a container of nodes.

        None if no step ran such an operation.
        """
        ends = [holder] if isinstance(holder, Tensor) else nodes_in(holder)
        frames = (self._tracer.lines_of(node) for node in graph_of(ends))
        return next(filter(None, map(user_frame, frames)), None)

    def has_tracebacks(self) -> bool:
        """Whether a traceback that a step made is alive."""
        return bool(of_types((TracebackType,)))

    def _look(self) -> None:
        if len(sys._current_frames()) > 1:
            time.sleep(TURN)  # a step may have given work to threads, and not wait for them
        before = self._tracer.event
        gc.collect()
        new = of_types(OWNERS)
        self._register(new)  # tensors of other threads, or made from arrays
        hooks = hook_counts([*self._old_owners(), *new]) if self.done % 2 else None
        self._boundaries.append(Boundary(before, self._tracer.event, hooks, device_signals()))

    def _old_owners(self) -> list[Any]:
        return [owner for each in self._old if (owner := each()) is not None]

    def _register(self, owners: Iterable[Any]) -> None:
        known = {storage._cdata for _, storage in self._tracer.living()}
        tensors = (owner for owner in owners if isinstance(owner, Tensor))
        with _disable_current_modes():  # looking into a sparse tensor is not part of the step
            parts = [part for tensor in tensors for part in parts_of(tensor)]
        for part in parts:
            if part.untyped_storage()._cdata not in known:
                self._tracer.label(part, "input")


@contextmanager
def resting_gc() -> Iterator[None]:
    """Only explicit garbage collections, which skip all objects that exist already."""
    enabled = gc.isenabled()
    frozen_by_user = gc.get_freeze_count() > FROZEN_BY_PYTHON  # and stays frozen
    gc.disable()
    if not frozen_by_user:
        gc.freeze()
    try:
        with undone_in_children(gc.enable if enabled else gc.disable):
            yield
    finally:
        if not frozen_by_user:
            gc.unfreeze()
        if enabled:
            gc.enable()
