"""Runs steps under a trace and takes stock in between.

The collector of cycles rests while a step runs and is called between steps, so that what only it
frees is told apart. All that existed before is frozen meanwhile (`gc.freeze`): what is new can be
looked through in milliseconds.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import gc
import inspect
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
from tfswa_lab.memory.leaks.autograd_graph import graph_of
from tfswa_lab.memory.leaks.census import Boundary, Census
from tfswa_lab.memory.leaks.hooks import hook_counts
from tfswa_lab.memory.leaks.referrers import of_types
from tfswa_lab.memory.out_of_memory import is_out_of_memory
from tfswa_lab.memory.trace.stacks import Frame, user_frame
from tfswa_lab.memory.trace.timeline import Block
from tfswa_lab.memory.trace.tracer import Tracer, parts_of

END_OF_DATA = (StopIteration, StopAsyncIteration, IndexError, EOFError)


class Ending(NamedTuple):
    """Why a run ended; of one that did not end early, all is empty.

    Args:
        words: which step, and the error.
        failed: whether the error is another one than those that tell the end of data.
        out_of_memory: whether there was no memory left.
    """

    words: str = ""
    failed: bool = False
    out_of_memory: bool = False


NOTHING = Ending()  # ended early


def ending_of(error: Exception, step: int) -> Ending:
    """The ending that an error makes of a run.

    >>> ending_of(StopIteration(), 12)
    Ending(words='step 12 ended with StopIteration', failed=False, out_of_memory=False)
    """
    said = ": ".join(filter(None, (type(error).__name__, str(error))))
    failed = not isinstance(error, END_OF_DATA)
    return Ending(f"step {step} ended with {said}", failed, is_out_of_memory(error))


POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
GIVEN = (*POSITIONAL, inspect.Parameter.KEYWORD_ONLY)


class Numbered:
    """Calls a step, with its number if it needs an argument.

    Attributes:
        count: how often it was called, without those that failed.

    Raises:
        ValueError: it only makes a generator or a coroutine, or needs several arguments.
        TypeError: it cannot be called, or is a network, which needs an input.

    >>> seen = []
    >>> call = Numbered(lambda number: seen.append(number))
    >>> call(), call(), seen
    (None, None, [0, 1])
    """

    def __init__(self, step: Callable[..., Any]):
        self.count = 0
        self._step, self._parameter = step, _needed(step)

    def __call__(self) -> None:
        """Run the next step; what it returns is let go."""
        try:
            made = self._step(self.count) if self._parameter else self._step()
        except Exception as error:
            if self._parameter and not self.count:
                error.add_note(f"the step was given its number, 0, as `{self._parameter}`")
            raise
        if _never_began(made):
            _refuse_lazy(self._step)
        self.count += 1


def _needed(step: Any) -> str:
    """The name of the argument that it cannot do without, empty if there is none."""
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
    except ValueError:  # of builtins that do not tell
        return ""
    needed = [each for each in parameters if each.default is each.empty and each.kind in GIVEN]
    if len(needed) > 1 or any(each.kind not in POSITIONAL for each in needed):
        names = ", ".join(each.name for each in needed)
        raise ValueError(f"step needs {names}; pass one that takes nothing, or only its number")
    return needed[0].name if needed else ""


def _never_began(made: Any) -> bool:
    if inspect.isgenerator(made):
        return inspect.getgeneratorstate(made) == inspect.GEN_CREATED
    return inspect.iscoroutine(made) and inspect.getcoroutinestate(made) == inspect.CORO_CREATED


def _refuse_lazy(step: Any) -> None:
    raise ValueError(
        f"{step!r} makes a generator or coroutine, of which nothing runs; pass a function that "
        "runs it to its end"
    )


OWNERS = (Tensor, nn.Module, Optimizer)
# Python 3.12 starts with 375 objects frozen, 3.11 and 3.13 with none; a program freezes far more.
FROZEN_BY_PYTHON = 1000


class TracedSteps:
    """Steps that are run one after another, and what is known of them.

    Args:
        call: runs the next step.
        model: whose parts are to be called by their paths.

    Attributes:
        ended: how the run ended, if it did so early.
    """

    def __init__(self, call: Callable[[], None], model: nn.Module | None = None):
        self.ended = Ending()
        self._call, self._boundaries = call, []
        self._tracer = Tracer()
        gc.collect()  # what is lost already is not to be counted
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # nor what was cached before
        self._old = [ref(owner) for owner in of_types(OWNERS)]
        if model is not None:
            self._tracer.modules.name(model)

    @property
    def done(self) -> int:
        """How many steps have been run to their end."""
        return len(self._boundaries)

    @contextmanager
    def running(self) -> Iterator[TracedSteps]:
        """Trace, with the collector of cycles at rest."""
        with resting_gc(), self._tracer:
            self._register(self._old_owners())
            self._start = self._tracer.event
            yield self

    def run(self, count: int, may_fail: bool = False) -> None:
        """Run steps until `count` are done.

        Args:
            may_fail: an error ends the run instead of being raised, as steps beyond those that
                were asked for may find no more data. Running out of memory always does.
        """
        while self.done < count and not self.ended.words:
            self._tracer.step()
            try:
                self._call()
            except Exception as error:
                self.ended = ending_of(error, self.done)
                if not (may_fail or self.ended.out_of_memory):
                    error.add_note(f"raised in step {self.done} of a diagnosis of leaks")
                    raise
            else:
                self._take_stock()

    def census(self) -> Census:
        """What is known so far."""
        devices = sorted(self._tracer.devices, key=lambda device: device.startswith("cpu"))
        timelines = [self._tracer.timeline(device) for device in devices if device != "meta"]
        return Census(timelines, self._start, self._boundaries)

    def references(self) -> dict[Block, ref]:
        """Weak references to the storages of all blocks that are there now."""
        return {block: ref(storage) for block, storage in self._tracer.living()}

    def owners(self) -> list[ref]:
        """All tensors, modules and optimizers that there are."""
        return [*self._old, *map(ref, of_types(OWNERS))]

    def line_of_graph(self, tensor: Tensor) -> Frame | None:
        """The line of the last operation in a tensor's graph that was made in these steps."""
        frames = (self._tracer.lines_of(node) for node in graph_of([tensor]))
        return next(filter(None, map(user_frame, frames)), None)

    def has_tracebacks(self) -> bool:
        """Whether any traceback is kept that was made since the start."""
        return bool(of_types((TracebackType,)))

    def _take_stock(self) -> None:
        before = self._tracer.event
        gc.collect()
        new = of_types(OWNERS)
        self._register(new)  # what was made unseen: in other threads, or from arrays
        hooks = hook_counts([*self._old_owners(), *new]) if self.done % 2 else None
        self._boundaries.append(Boundary(before, self._tracer.event, hooks, device_signals()))

    def _old_owners(self) -> list[Any]:
        return [owner for each in self._old if (owner := each()) is not None]

    def _register(self, owners: Iterable[Any]) -> None:
        known = {storage._cdata for _, storage in self._tracer.living()}
        tensors = (owner for owner in owners if isinstance(owner, Tensor))
        with _disable_current_modes():  # to look into a sparse tensor is no work of the step's
            parts = [part for tensor in tensors for part in parts_of(tensor)]
        for part in parts:
            if part.untyped_storage()._cdata not in known:
                self._tracer.label(part, "input")


@contextmanager
def resting_gc() -> Iterator[None]:
    """No collection of cycles but those asked for; these leave alone what is there already."""
    enabled = gc.isenabled()
    frozen_by_user = gc.get_freeze_count() > FROZEN_BY_PYTHON  # and stays so
    gc.disable()
    if not frozen_by_user:
        gc.freeze()
    try:
        yield
    finally:
        if not frozen_by_user:
            gc.unfreeze()
        if enabled:
            gc.enable()
