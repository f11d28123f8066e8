"""Pickles of plain data: written in one piece, and read safely even from a stranger.

A pickle is a program. Refusing to look up names (`find_class`) keeps it from executing code, but
five bytes can still make Python's reader take all memory, or hash a tuple for years. So the program
is checked first: it may contain only the few opcodes that write numbers, strings, lists and
dictionaries, and no length or index that is too large for the file. Such a program takes time and
memory in proportion to the file.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import gc
import mmap
import pickle
import pickletools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from tfswa_lab.durable import parts_of
from tfswa_lab.memory.sizes import GIB

LARGEST = 2 * GIB  # bytes of a file
SHORT = 64  # the regular expression itself skips shorter strings


class SnapshotError(ValueError):
    """The file is not a memory snapshot, is damaged, or is hostile."""


def write_plain(path: str | Path, data: object) -> Path:
    """Write plain data as a pickle; an error leaves no part of a file.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with parts_of([path]) as (part,), part.open("wb") as file:
        pickle.dump(data, file, protocol=4)
    return path


def read_plain(path: str | Path, largest: int = LARGEST) -> object:
    """Read a pickle that contains only numbers, strings, lists, dictionaries and pairs of integers.

    Args:
        path: the file.
        largest: the most bytes that the file may have.

    Raises:
        FileNotFoundError: there is no such file.
        SnapshotError: it is too large, not a pickle, damaged, or contains anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such memory snapshot; check the path")
    size = path.stat().st_size
    if not 0 < size <= largest:
        raise SnapshotError(
            f"{path} has {size:,} bytes, not 1 to {largest:,}; record with fewer max_entries, "
            "or raise `largest`"
        )
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as program:
                check(program)
            with no_garbage_collection():
                return _Reader(file).load()
        except SnapshotError as error:
            raise SnapshotError(f"{path}: {error}") from None
        except Exception as error:  # a damaged program can raise anything
            raise SnapshotError(f"{path} is damaged ({type(error).__name__}: {error})") from error


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Reading makes millions of containers and no garbage; collections would double the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class _Reader(pickle.Unpickler):
    """Refuses to look up names, even if the check missed one."""

    def find_class(self, module: str, name: str) -> object:
        raise SnapshotError(f"it asks for {module}.{name}, and plain data need no code")


def check(program: bytes | mmap.mmap) -> None:
    """Raise SnapshotError unless this is a pickle of plain data; nothing is executed.

    >>> check(pickle.dumps({"size": 512}))
    >>> check(pickle.dumps(print))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    tfswa_lab.memory.snapshot.pickles.SnapshotError: opcode STACK_GLOBAL at byte 30 has no ...
    """
    harmless = _harmless((len(program) // 4).bit_length())
    at = 0
    while True:
        at = harmless.match(program, at).end()
        opcode = program[at : at + 1]
        if opcode == b".":
            return
        if opcode not in _LENGTHS:
            raise SnapshotError(_refusal(opcode, at))
        start = at + 1 + _LENGTHS[opcode]
        length = int.from_bytes(program[at + 1 : start], "little")
        if start + length > len(program):
            raise SnapshotError(f"{length:,} bytes announced at byte {at} are not there")
        at = start + length


_LENGTHS = {b"\x8c": 1, b"X": 4, b"\x8d": 8}  # strings, and the width of their lengths


def _refusal(opcode: bytes, at: int) -> str:
    if not opcode:
        return "it ends in the middle"
    known = pickletools.code2op.get(opcode.decode("latin-1"))
    name = known.name if known else repr(opcode)
    return f"opcode {name} at byte {at} has no place in plain data"


@lru_cache(maxsize=8)
def _harmless(bits: int) -> re.Pattern[bytes]:
    """Matches runs of opcodes that build plain data; `check` skips strings from `SHORT` bytes on.

    Args:
        bits: of the largest length of a frame and of the largest index into the reader's memory,
            which allocates twice that index. A frame has at most 64 KiB and one object, and every
            index takes 6 bytes of the file, so the bits of a quarter of its size are enough.
    """
    frame = rb"\x95...%b\x00{4}" % _below(2 ** max(bits - 24, 0))
    remembered = rb"\x94|q.|r..%b%b" % (
        _below(2 ** min(max(bits - 16, 0), 8)),
        _below(2 ** max(bits - 24, 0)),
    )
    integer = rb"(?:K.|M..|J....|\x8a(?:%b))(?:%b)?+" % (_counted(10), frame)
    # Tuples may only hold two integers: hashing nested tuples can take for ever.
    pair = rb"%b(?:%b\x86?+)?+" % (integer, integer)
    string = rb"\x8c(?:%b)|X(?:%b)" % (_counted(SHORT), _counted(SHORT, rb"\x00\x00\x00"))
    recalled = rb"h.|j...."
    others = rb"[(\]}aeusN\x88\x89]|G.{8}|\x80[\x02-\x05]"
    tokens = [recalled, pair, remembered, string, others, frame]
    return re.compile(rb"(?:%b)*+" % b"|".join(tokens), re.DOTALL)


def _below(count: int) -> bytes:
    """One byte below a count."""
    return rb"[\x00-%b]" % re.escape(bytes([min(count, 256) - 1]))


def _counted(count: int, then: bytes = b"") -> bytes:
    """A length below `count`, and as many bytes."""
    return b"|".join(
        re.escape(bytes([length])) + then + rb".{%d}" % length for length in range(count)
    )
