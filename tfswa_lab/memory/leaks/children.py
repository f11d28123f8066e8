"""Child processes, such as the workers of a DataLoader: whose memory grows, and what they are.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing.pool import Pool
from multiprocessing.process import BaseProcess
from subprocess import Popen
from typing import Any, NamedTuple

import psutil
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from tfswa_lab.memory.leaks.referrers import of_types

# Objects that have child processes: what these are, and where they are listed.
OWNERS = {
    _MultiProcessingDataLoaderIter: ("DataLoader worker", "_workers"),
    Pool: ("multiprocessing worker of a Pool", "_pool"),
    ProcessPoolExecutor: ("multiprocessing worker of a ProcessPoolExecutor", "_processes"),
    BaseProcess: ("multiprocessing worker", ""),
    Popen: ("program that subprocess started", ""),
}


class Children(NamedTuple):
    """Child processes that keep more and more memory.

    Args:
        alive: how many there are.
        grown: how many of them grew; of those that were started meanwhile, all.
        started: whether their number grows, and not the memory of each.
        pid: of the one that grew most; of those that were started, the newest.
        kind: what that one is.
    """

    alive: int
    grown: int
    started: bool
    pid: int
    kind: str

    def __str__(self) -> str:
        which = f"pid {self.pid}, a {self.kind}"
        if self.started:
            return (
                f"{self.alive} are alive, which were started and never ended, the last is {which}"
            )
        plural, verb = "" if self.alive == 1 else "es", "s" if self.grown == 1 else ""
        most = "most of all " if self.grown > 1 else ""
        return f"{self.grown} of {self.alive} process{plural} grow{verb}, {most}{which}"

    @property
    def advice(self) -> str:
        """What to do about them."""
        if self.started:
            return "end children: `.join()` or `.terminate()` them, or start them in a `with` block"
        if "DataLoader" in self.kind:
            return (
                "a worker copies each page with Python objects that it reads (pytorch issue 13246)"
                ", or keeps results: keep the data in tensors or NumPy arrays, or restart the "
                "workers (persistent_workers=False)"
            )
        return (
            "empty what the child keeps from task to task, or restart it: "
            "Pool(maxtasksperchild=…), ProcessPoolExecutor(max_tasks_per_child=…)"
        )


LEAST = 0.1  # of the growth: children that grow less are not counted


def children_of(first: dict[int, int], last: dict[int, int], added: bool) -> Children:
    """The child processes that grew.

    Args:
        first: bytes by process id, after an early step.
        last: and after the last step.
        added: whether their number grows.
    """
    if added:
        new = [pid for pid in last if pid not in first]  # the newest last
        return Children(len(last), len(new), True, new[-1], kind_of(new[-1]))
    growth = {pid: size - first.get(pid, 0) for pid, size in last.items()}
    most = max(growth, key=growth.get)
    grown = sum(each > LEAST * growth[most] for each in growth.values())
    return Children(len(last), grown, False, most, kind_of(most))


def kind_of(pid: int) -> str:
    """What a child process is, such as `DataLoader worker`.

    It is known of those that objects of this process have started; else it is the program's name.
    """
    for owner in sorted(of_types(tuple(OWNERS)), key=_rank):
        what, listed = OWNERS[_known(owner)]
        for process in _processes(owner, listed):
            with suppress(ValueError):  # the process was closed
                if getattr(process, "pid", None) == pid:
                    name = getattr(process, "name", "")
                    return f"{what}, `{name}`" if name else what
    try:
        return f"program `{psutil.Process(pid).name()}`"
    except psutil.Error:
        return "program that has ended"


def _known(owner: Any) -> type:
    return next(kind for kind in OWNERS if isinstance(owner, kind))


def _rank(owner: Any) -> int:
    return list(OWNERS).index(_known(owner))


def _processes(owner: Any, listed: str) -> Iterable[Any]:
    if not listed:
        return [owner]
    processes = getattr(owner, listed, None) or ()
    return list(processes.values() if isinstance(processes, dict) else processes)
