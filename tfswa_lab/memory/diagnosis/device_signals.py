"""What the allocator of a CUDA device, and the device itself, say about memory.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from typing import NamedTuple

import torch


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
    free, total = torch.cuda.mem_get_info()
    stats = torch.cuda.memory_stats()
    signals = DeviceSignals(
        peak=stats.get("allocated_bytes.all.peak", 0),
        reserved=stats.get("reserved_bytes.all.current", 0),
        used=total - free,
        retries=stats.get("num_alloc_retries", 0),
    )
    torch.cuda.reset_peak_memory_stats()
    return signals
