"""How much memory a process has asked the C library for.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import ctypes
import os

import psutil

FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks")


class MallocInfo(ctypes.Structure):
    """What glibc 2.33 and later tell of its allocator (`man mallinfo2`)."""

    _fields_ = [(name, ctypes.c_size_t) for name in (*FIELDS, "fordblks", "keepcost")]


def process_memory() -> int:
    """Bytes in use of the C library's heap; with another library than glibc, bytes in RAM.

    What is in RAM grows late, as freed memory is used first, and wavers.

    Notebook: 06_leak_diagnosis

    >>> process_memory() > 0
    True
    """
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None) if os.name == "posix" else None
    if mallinfo is None:
        return psutil.Process().memory_info().rss
    mallinfo.restype = MallocInfo
    info = mallinfo()
    return info.uordblks + info.hblkhd
