"""Record the history of CUDA's allocator and write it to a file.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from tfswa_lab.memory.snapshot.pickles import write_plain
from tfswa_lab.memory.trace.trace import ENTRIES, recorded_history

QUIET_SECONDS = 1.0


@contextmanager
def record(
    max_entries: int = ENTRIES, stacks: str = "python", context: str = "all"
) -> Iterator[None]:
    """Record the allocator's history in a `with` block; dump inside, because its end clears it.

    Args:
        max_entries: of the history, of several hundred bytes each; the oldest are dropped.
        stacks: `python`, or `all` for lines of C++ too.
        context: `all`, `alloc` (no stacks of releases) or `state` (stacks of living blocks only).

    Raises:
        RuntimeError: CUDA is not available.
    """
    _need_cuda()
    with recorded_history(max_entries, stacks, context):
        yield


def dump(path: str | Path) -> Path:
    """Write a snapshot of all devices; an error leaves no part of a file.

    Raises:
        RuntimeError: CUDA is not available.
        OSError: the folder cannot be written to.
    """
    _need_cuda()
    return write_plain(path, torch.cuda.memory._snapshot())


def dump_on_oom(path: str | Path, most: int = 3) -> OomDump:
    """From now on, dump a snapshot whenever CUDA runs out of memory; the error is still raised.

    cuDNN may try several algorithms and fail several times before it gives up, so all failures
    within a second make one file. Later ones are numbered: `oom.pickle`, `oom-2.pickle`, … Use it
    inside of `record`, which records the stacks.

    Args:
        path: of the first file.
        most: how many files to write.

    Returns:
        A context manager that lists the files it has written; its end or `close` stops it.

    Raises:
        RuntimeError: CUDA is not available, or this torch has no hook for out-of-memory.
    """
    _need_cuda()
    attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
    if attach is None:
        raise RuntimeError("this torch cannot report an out-of-memory; use 2.0 or later")
    torch.cuda.init()  # initialisation discards observers attached before it
    observer = OomDump(Path(path), most)
    attach(observer.observe)
    return observer


class OomDump(AbstractContextManager):
    """Writes snapshots of failures until it is closed.

    Args:
        path: of the first file.
        most: how many files to write.
    """

    def __init__(self, path: Path, most: int):
        self.path, self.most = path, most
        self.written: list[Path] = []
        self.failures: list[str] = []  # texts, because a stored error keeps its frames alive
        self._active, self._last = True, -math.inf

    def close(self) -> None:
        """Write no more. torch cannot detach an observer, so it stays attached and does nothing."""
        self._active = False

    def __exit__(self, *_error: object) -> None:
        self.close()

    def observe(self, _device: int, _asked: int, _total: int, _free: int) -> None:
        """Called by the allocator, so it must not raise."""
        again = time.monotonic() - self._last < QUIET_SECONDS
        if self._active and not again and len(self.written) < self.most:
            try:
                self.written.append(dump(self._next_path()))
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")
        self._last = time.monotonic()

    def _next_path(self) -> Path:
        number = len(self.written) + 1
        path = self.path
        return path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")


def _need_cuda() -> None:
    if not torch.cuda.is_available():
        raise RuntimeError(
            "no CUDA: torch finds no GPU here, so there is no allocator to record; "
            "trace on the CPU with memory.trace, and write it with memory.snapshot.write_snapshot"
        )
