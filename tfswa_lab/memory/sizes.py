"""Bytes in words.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

KIB, MIB, GIB = 2**10, 2**20, 2**30


def in_words(size: int) -> str:
    """A number of bytes in the unit that suits it; units are powers of 1024.

    Notebook: 05_where_memory_goes

    >>> in_words(512), in_words(3 * MIB // 2), in_words(-5 * GIB)
    ('512 B', '1.50 MiB', '-5.00 GiB')
    """
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} B"
