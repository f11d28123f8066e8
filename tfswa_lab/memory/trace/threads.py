"""Follows a program into its threads, and lets go of it in child processes.

A dispatch mode belongs to the thread that enters it, so each other thread has to enter it, too. A
forked child inherits all modes and patches of its parent, which nobody there will ever read.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import multiprocessing.pool
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import thread as executors
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any
from unittest.mock import patch

from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

_numbers = count()
_here = threading.local()


def this_thread() -> int:
    """A number of the running thread; unlike `get_ident`, no later thread gets it again."""
    try:
        return _here.number
    except AttributeError:
        _here.number = next(_numbers)
        return _here.number


# Threads of pools outlive a trace: not their loops enter the mode, but each of their tasks.
POOL_LOOPS = (executors._worker, multiprocessing.pool.worker)
POOL_CALLS = ("apply_async", "_map_async", "imap", "imap_unordered")


@contextmanager
def entered_in_threads(mode: TorchDispatchMode) -> Iterator[None]:
    """Inside of the block, threads that start and tasks of pools of threads enter a mode.

    Args:
        mode: the running thread has entered it before, and no mode around it.
    """
    pool = multiprocessing.pool.ThreadPool
    patches = [(threading.Thread, "start", _starting), (executors._WorkItem, "run", _running)]
    patches += [(pool, name, _giving) for name in POOL_CALLS]
    with ExitStack() as stack:
        for owner, name, way in patches:
            stack.enter_context(patch.object(owner, name, way(getattr(owner, name), mode)))
        yield


def _starting(start: Callable, mode: TorchDispatchMode) -> Callable:
    """`Thread.start`, so that any `run`, also that of a subclass, runs inside the mode."""

    def start_inside(thread: threading.Thread) -> None:
        if thread.ident is None and getattr(thread, "_target", None) not in POOL_LOOPS:

            def run() -> None:
                del thread.run  # the class's own is there again
                with _inside(mode):
                    thread.run()

            thread.run = run
        start(thread)

    return start_inside


def _running(run: Callable, mode: TorchDispatchMode) -> Callable:
    """The `run` of an executor's task, inside the mode."""

    def run_inside(*arguments: Any) -> None:
        with _inside(mode):
            run(*arguments)

    return run_inside


def _giving(give: Callable, mode: TorchDispatchMode) -> Callable:
    """A method that gives a function to a pool of threads, so that it runs inside the mode."""

    def give_inside(pool: Any, function: Callable, *rest: Any, **options: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            with _inside(mode):
                return function(*arguments, **named)

        return give(pool, call, *rest, **options)

    return give_inside


@contextmanager
def _inside(mode: TorchDispatchMode) -> Iterator[None]:
    if mode in _get_current_dispatch_mode_stack():
        yield
        return
    _push_mode(mode)
    try:
        yield
    finally:
        _pop_mode()


_undo: list[Callable[[], None]] = []


@contextmanager
def undone_in_children(undo: Callable[[], None]) -> Iterator[None]:
    """Inside of the block, a function is called in each child process that is forked."""
    _undo.append(undo)
    try:
        yield
    finally:
        if undo in _undo:  # not in a child that leaves the block itself
            _undo.remove(undo)


def _undo_all() -> None:
    while _undo:
        _undo.pop()()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_undo_all)
