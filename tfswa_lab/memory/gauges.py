"""Memory as it is now: of the process, its heap, the allocator, and the whole GPU.

The only place that reads memory; every other one asks here.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from tfswa_lab.memory.sizes import format_bytes

NO_CUDA = "no CUDA"
Device = torch.device | str | int | None

# The host ----------------------------------------------------------------------------------------


def process_rss() -> int:
    """Bytes of this process in RAM, all libraries included."""
    return psutil.Process().memory_info().rss


def process_peak(process: psutil.Process | None = None) -> int:
    """Most bytes that a process (this one if None) has had in RAM; now, where no system keeps that.

    Not getrusage's `ru_maxrss`: a process inherits that from the one that started it.

    Raises:
        psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError: it has ended.

    >>> process_peak() >= 2**20
    True
    """
    process = process or psutil.Process()
    status = Path(f"/proc/{process.pid}/status")
    if status.exists() and (peak := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(peak[1]) * 1024
    return process.memory_info().rss


def host_available() -> int:
    """Bytes that new programs can take without swapping."""
    return psutil.virtual_memory().available


FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks")


class MallocInfo(ctypes.Structure):
    """What glibc 2.33 and later report of their allocator (`man mallinfo2`)."""

    _fields_ = [(name, ctypes.c_size_t) for name in (*FIELDS, "fordblks", "keepcost")]


def heap_in_use() -> int:
    """Bytes in use of the C library's heap; with another library than glibc, bytes in RAM.

    RSS grows late, because freed memory is used first, and it fluctuates.

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


def allocated(device: Device = None) -> int:
    """Bytes of tensors on a GPU, rounded up by the allocator."""
    return torch.cuda.memory_allocated(device)


def reserved(device: Device = None) -> int:
    """Bytes that the allocator has taken from a GPU, in tensors or cached."""
    return torch.cuda.memory_reserved(device)


def peak_allocated(device: Device = None) -> int:
    """Most bytes of tensors since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device)


def peak_reserved(device: Device = None) -> int:
    """Most bytes taken from a GPU since `reset_peak`."""
    return torch.cuda.max_memory_reserved(device)


def reset_peak(device: Device = None) -> None:
    """Peaks are counted anew from here."""
    torch.cuda.reset_peak_memory_stats(device)


class DeviceMemory(NamedTuple):
    """Bytes of a whole GPU, whoever uses them."""

    free: int
    total: int

    @property
    def used(self) -> int:
        """By all processes, with their CUDA contexts."""
        return self.total - self.free


def device_memory(device: Device = None) -> DeviceMemory:
    """What the driver says of a GPU."""
    return DeviceMemory(*torch.cuda.mem_get_info(device))


class DeviceSignals(NamedTuple):
    """Bytes at the end of a step.

    Notebook: 06_leak_diagnosis
    """

    peak: int  # most that tensors took in this step
    reserved: int  # taken from the device, in tensors or cached
    used: int  # of the whole device, by all its users
    retries: int  # how often the cache was emptied to find room, since the start of the process


def device_signals() -> DeviceSignals | None:
    """Signals of the current CUDA device, the peak since they were last read; None without one.

    Notebook: 06_leak_diagnosis
    """
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    stats = torch.cuda.memory_stats()
    signals = DeviceSignals(
        peak=stats.get("allocated_bytes.all.peak", 0),
        reserved=stats.get("reserved_bytes.all.current", 0),
        used=device_memory().used,
        retries=stats.get("num_alloc_retries", 0),
    )
    reset_peak()
    return signals


# Everything at once ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Status:
    """Bytes in use. What cannot be known without CUDA is None, not 0.

    Args:
        host_rss: of this process in the host's memory, all libraries included.
        device: such as `cuda:0`, None without CUDA.
        allocated: by tensors, as the allocator counts them.
        reserved: by the allocator, in use or cached.
        device_used: of the device by everybody: other processes and the CUDA context too.
        device_total: of the device.
    """

    host_rss: int
    device: str | None = None
    allocated: int | None = None
    reserved: int | None = None
    device_used: int | None = None
    device_total: int | None = None

    def __str__(self) -> str:
        host = f"host RSS {format_bytes(self.host_rss)}"
        if self.device is None:
            return f"{NO_CUDA} · {host}"
        return (
            f"{self.device}: allocated {format_bytes(self.allocated)} · "
            f"reserved {format_bytes(self.reserved)} · "
            f"device {format_bytes(self.device_used)} of {format_bytes(self.device_total)} · {host}"
        )


def status(device: Device = None) -> Status:
    """Read all gauges once.

    torch counts 0 bytes allocated where there is no CUDA at all; here it says that there is none.

    Args:
        device: a GPU; the current one if None.

    Raises:
        ValueError: a device is named, and is no GPU of this machine.
    """
    if device is None and not torch.cuda.is_available():
        return Status(process_rss())
    index = _index(device)
    whole = device_memory(index)
    return Status(
        process_rss(),
        f"cuda:{index}",
        allocated(index),
        reserved(index),
        whole.used,
        whole.total,
    )


def _index(device: Device) -> int:
    if device is None:
        return torch.cuda.current_device()
    named = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    count = torch.cuda.device_count()
    if named.type != "cuda" or (named.index or 0) >= count:
        raise ValueError(
            f"device={str(named)!r} is none of the {count} CUDA GPUs here; leave it out for the "
            "current one, or for the host alone"
        )
    return torch.cuda.current_device() if named.index is None else named.index
