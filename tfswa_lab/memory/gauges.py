"""Memory in use now: by the process, its heap, the allocator, and the whole GPU.

All other modules read memory through this one.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import ctypes
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

from tfswa_lab.memory.display import Shown, table
from tfswa_lab.memory.sizes import format_bytes

if TYPE_CHECKING:
    from types import ModuleType

    import torch

    Device = torch.device | str | int | None

NO_CUDA = "no CUDA"

# The host ----------------------------------------------------------------------------------------


def process_rss() -> int:
    """Bytes of this process in RAM, including all libraries."""
    return psutil.Process().memory_info().rss


def process_peak(process: psutil.Process | None = None) -> int:
    """Most bytes that a process (None: this one) has had in RAM; its RSS where nothing counts it.

    It is not getrusage's `ru_maxrss`, which a process inherits from its parent.

    Raises:
        psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError: the process has ended.

    >>> process_peak() >= 2**20
    True
    """
    process = process or psutil.Process()
    status = Path(f"/proc/{process.pid}/status")
    if status.exists() and (peak := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(peak[1]) * 1024
    return process.memory_info().rss


def host_available() -> int:
    """Bytes of RAM that a program can take without swapping."""
    return psutil.virtual_memory().available


def host_total() -> int:
    """Bytes of RAM of this machine."""
    return psutil.virtual_memory().total


def children_memory() -> dict[int, int]:
    """Bytes in RAM that child processes, and theirs, do not share, by process id.

    They are what goes when a child ends. Where the system tells it, pages that the child has only
    read from a file do not count. A child that has ended has no memory.

    Notebook: 06_leak_diagnosis

    >>> all(size >= 0 for size in children_memory().values())
    True
    """
    found = {}
    for child in [] if _has_no_child() else psutil.Process().children(recursive=True):
        with suppress(psutil.Error, OSError):  # it has ended, or belongs to another user
            found[child.pid] = _unshared(child)
    return {pid: size for pid, size in found.items() if size}


def _has_no_child() -> bool:
    """Whether the system knows of no child; psutil would look at all processes of the machine."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # waits for nothing
    except ChildProcessError:
        return True
    except (AttributeError, OSError):  # another system
        return False
    return False


def _unshared(process: psutil.Process) -> int:
    pages = Path(f"/proc/{process.pid}/smaps_rollup")
    if pages.exists() and (found := re.search(r"Private_Dirty:\s+(\d+) kB", pages.read_text())):
        return int(found[1]) * 1024
    try:
        known = process.memory_full_info()
    except psutil.AccessDenied:
        return process.memory_info().rss
    return known.uss if hasattr(known, "uss") else known.rss


FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks")


class MallocInfo(ctypes.Structure):
    """The state of the C library's allocator, from glibc 2.33 on (`man mallinfo2`)."""

    _fields_ = [(name, ctypes.c_size_t) for name in (*FIELDS, "fordblks", "keepcost")]


def heap_in_use() -> int:
    """Bytes in use on the C library's heap; RSS where that library is not glibc.

    RSS shows a leak late and fluctuates, because the heap reuses freed memory before it grows.

    Notebook: 06_leak_diagnosis

    >>> heap_in_use() > 0
    True
    """
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None) if os.name == "posix" else None
    if mallinfo is None:
        return process_rss()
    mallinfo.restype = MallocInfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


# A GPU -------------------------------------------------------------------------------------------


def _cuda() -> ModuleType:
    """`torch.cuda`; imported here, because some programs read the host only."""
    import torch.cuda

    return torch.cuda


def allocated(device: Device = None) -> int:
    """Bytes of tensors on a GPU, each rounded up by the allocator."""
    return _cuda().memory_allocated(device)


def reserved(device: Device = None) -> int:
    """Bytes that the allocator has taken from a GPU, in use or cached."""
    return _cuda().memory_reserved(device)


def peak_allocated(device: Device = None) -> int:
    """Most bytes of tensors since `reset_peak`."""
    return _cuda().max_memory_allocated(device)


def peak_reserved(device: Device = None) -> int:
    """Most bytes taken from a GPU since `reset_peak`."""
    return _cuda().max_memory_reserved(device)


def reset_peak(device: Device = None) -> None:
    """Count the peaks from here on."""
    _cuda().reset_peak_memory_stats(device)


class DeviceMemory(NamedTuple):
    """Bytes of a whole GPU, used by any process."""

    free: int
    total: int

    @property
    def used(self) -> int:
        """Bytes in use by all processes, with their CUDA contexts."""
        return self.total - self.free


def device_memory(device: Device = None) -> DeviceMemory:
    """The free and total memory that the driver reports."""
    return DeviceMemory(*_cuda().mem_get_info(device))


class DeviceSignals(NamedTuple):
    """Bytes at the end of a step.

    Notebook: 06_leak_diagnosis
    """

    peak: int  # the most that tensors took in this step
    reserved: int  # taken from the device, in use or cached
    used: int  # on the whole device, by all processes
    retries: int  # how often the process has emptied its cache to make room, not bytes


def device_signals() -> DeviceSignals | None:
    """Signals of the current CUDA device, with the peak since the last call; None without CUDA.

    Notebook: 06_leak_diagnosis
    """
    if not _cuda().is_available() or not _cuda().is_initialized():
        return None
    stats = _cuda().memory_stats()
    signals = DeviceSignals(
        peak=stats.get("allocated_bytes.all.peak", 0),
        reserved=stats.get("reserved_bytes.all.current", 0),
        used=device_memory().used,
        retries=stats.get("num_alloc_retries", 0),
    )
    reset_peak()
    return signals


# Everything at once ------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Status(Shown):
    """Bytes in use. Without CUDA all fields but `host_rss` are None, not 0.

    Args:
        host_rss: this process in the host's memory, including all libraries.
        device: such as `cuda:0`.
        allocated: by tensors, as the allocator counts them.
        reserved: by the allocator, in use or cached.
        device_used: by all processes, with their CUDA contexts.
        device_total: all memory of the device.
    """

    host_rss: int
    device: str | None = None
    allocated: int | None = None
    reserved: int | None = None
    device_used: int | None = None
    device_total: int | None = None

    @property
    def brief(self) -> str:
        """All in one line."""
        return str(self)

    def __str__(self) -> str:
        host = f"host RSS {format_bytes(self.host_rss)}"
        if self.device is None:
            return f"{NO_CUDA} · {host}"
        return (
            f"{self.device}: allocated {format_bytes(self.allocated)} · "
            f"reserved {format_bytes(self.reserved)} · "
            f"device {format_bytes(self.device_used)} of {format_bytes(self.device_total)} · {host}"
        )

    def _repr_html_(self) -> str:
        sizes = {name.replace("_", " "): size for name, size in vars(self).items()}
        known = {name: size for name, size in sizes.items() if isinstance(size, int)}
        return table(self.device or NO_CUDA, known)


def status(device: Device = None) -> Status:
    """Read all gauges once.

    torch reports 0 bytes allocated where there is no CUDA; here the fields are None.

    Args:
        device: a GPU; the current one if None.

    Raises:
        ValueError: the named device is not a GPU of this machine.
    """
    if device is None and not _cuda().is_available():
        return Status(process_rss())
    index = _index(device)
    whole = device_memory(index)
    return Status(
        process_rss(), f"cuda:{index}", allocated(index), reserved(index), whole.used, whole.total
    )


def _index(device: Device) -> int:
    import torch

    if device is None:
        return _cuda().current_device()
    count, named = _cuda().device_count(), None
    with suppress(RuntimeError, TypeError):  # no device has such a name
        named = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if named is None or named.type != "cuda" or (named.index or 0) >= count:
        raise ValueError(
            f"device={str(device)!r} is not one of the {count} CUDA GPUs of this machine; leave it "
            "out for the current GPU, or for the host alone"
        )
    return _cuda().current_device() if named.index is None else named.index
