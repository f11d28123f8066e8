"""Format numbers of bytes, and the sizes that CUDA's allocator rounds to.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

KIB, MIB, GIB = 2**10, 2**20, 2**30


def format_bytes(size: int) -> str:
    """A number of bytes in the largest unit that fits; units are powers of 1024.

    >>> format_bytes(512), format_bytes(3 * MIB // 2), format_bytes(-5 * GIB)
    ('512 B', '1.50 MiB', '-5.00 GiB')
    """
    unit, name = unit_of(size)
    return f"{size / unit:.2f} {name}" if unit > 1 else f"{size} B"


def unit_of(size: int) -> tuple[int, str]:
    """The unit that suits a number of bytes.

    >>> unit_of(3_000_000)
    (1048576, 'MiB')
    """
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size) >= unit:
            return unit, name
    return 1, "B"


QUANTUM = 512  # every request is rounded up to a multiple of this
SMALL = MIB  # the largest request of the small pool
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB  # shared by requests of the large pool below `OWN_SEGMENT`
OWN_SEGMENT = 10 * MIB  # from here on, a request gets a segment of its own
SEGMENT_QUANTUM = 2 * MIB  # such a segment is rounded up to a multiple of this


def rounded(requested: int) -> int:
    """Bytes that the allocator sets aside for a request, at least.

    >>> rounded(1), rounded(512), rounded(513)
    (512, 512, 1024)
    """
    return -(-requested // QUANTUM) * QUANTUM


def segment_size(size: int) -> int:
    """Bytes that the allocator takes from the device when no cached part is large enough.

    >>> [segment_size(n * MIB) // MIB for n in (1, 2, 10, 11)]
    [2, 20, 10, 12]
    """
    if size <= SMALL:
        return SMALL_SEGMENT
    if size < OWN_SEGMENT:
        return LARGE_SEGMENT
    return -(-size // SEGMENT_QUANTUM) * SEGMENT_QUANTUM


def is_whole(number: Any) -> bool:
    """Whether it is a whole number of Python or numpy; a bool is none.

    >>> is_whole(3), is_whole(True), is_whole(3.0)
    (True, False, False)
    """
    return isinstance(number, Integral) and not isinstance(number, bool)
