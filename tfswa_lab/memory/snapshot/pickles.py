"""Pickles of plain data: written in one piece, and read safely even from a stranger.

A pickle is a program. This machine knows only the opcodes that build numbers, strings, lists,
dictionaries and pairs of integers, so no program can make it execute anything, and it makes no room
for bytes that are only announced. Time and memory are in proportion to the file.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import mmap
import pickle
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path

from tfswa_lab.durable import parts_of
from tfswa_lab.memory.sizes import MIB
from tfswa_lab.memory.snapshot.shapes import LONGEST, Make, Shapes, integer_of

PROTOCOLS = range(2, 6)
PIECE = 64 * MIB  # of a file, that is mapped into memory at a time


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


class Reader:
    """Executes the program of a pickle.

    >>> Reader(pickle.dumps({"size": 512})).load()
    {'size': 512}
    >>> Reader(pickle.dumps(print)).load()  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    tfswa_lab.memory.snapshot.pickles.SnapshotError: opcode STACK_GLOBAL at byte 30 has no ...

    Args:
        program: the pickle.
        maker: chooses, for a series of keys that is met often, what to make of the values; the list
            of such a dictionary is `Recalled`. Without it, all is built as pickle would.
    """

    def __init__(self, program: bytes | mmap.mmap, maker: Callable[[tuple], Make] | None = None):
        self.program, self.memory = program, []
        self.stack: list = []
        self.below: list[list] = []  # what was on the stack at each mark
        self.shapes = Shapes(maker, self.memory) if maker else None

    def load(self) -> object:
        """What the program builds.

        Raises:
            SnapshotError: the program is damaged, or builds anything but plain data.
        """
        at = read = 0
        try:
            while (opcode := self.program[at]) != _STOP:
                at = _OPERATIONS[opcode](self, at + 1)
                if at - read > PIECE:
                    read = self._let_go(at)
            return self.stack.pop()
        except (IndexError, TypeError, ValueError, OverflowError, struct.error) as error:
            if isinstance(error, SnapshotError):
                raise
            if at >= len(self.program):
                raise SnapshotError("it ends in the middle; copy it again") from None
            raise SnapshotError(f"it is damaged at byte {at:,} ({error})") from error

    def _let_go(self, at: int) -> int:
        """Release the pages that were read, which would count as memory of the process."""
        read = at // PIECE * PIECE
        if isinstance(self.program, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            self.program.madvise(mmap.MADV_DONTNEED, 0, read)
        return read

    def take(self, at: int, length: int) -> bytes:
        """Bytes of the program that must be there."""
        if at + length > len(self.program):
            raise SnapshotError(
                f"{length:,} bytes announced at byte {at:,} are not there: it is incomplete"
            )
        return self.program[at : at + length]

    def since_mark(self) -> list:
        """What was put on the stack since the last mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def top(self, kind: type) -> list | dict:
        """The list or dictionary to be filled."""
        if type(self.stack[-1]) is not kind:
            raise TypeError(f"a {kind.__name__} is expected")
        return self.stack[-1]


# The operations get the position after their opcode, and return that of the next opcode.


def _refuse(reader: Reader, at: int) -> int:
    opcode = reader.program[at - 1]
    known = pickletools.code2op.get(chr(opcode))
    name = known.name if known else hex(opcode)
    raise SnapshotError(f"opcode {name} at byte {at - 1} has no place in plain data")


def _protocol(reader: Reader, at: int) -> int:
    if reader.program[at] not in PROTOCOLS:
        raise SnapshotError(f"protocol {reader.program[at]} is not one of 2 to 5")
    return at + 1


def _frame(reader: Reader, at: int) -> int:
    length = int.from_bytes(reader.take(at, 8), "little")
    if at + 8 + length > len(reader.program):
        raise SnapshotError(
            f"{length:,} bytes announced at byte {at:,} are not there: it is incomplete"
        )
    return at + 8


def _integer(width: int) -> Callable[[Reader, int], int]:
    def operation(reader: Reader, at: int) -> int:
        reader.stack.append(integer_of(reader.take(at - 1, width + 1)))
        return at + width

    return operation


def _long(reader: Reader, at: int) -> int:
    length = reader.program[at]
    if length > LONGEST:
        raise SnapshotError(f"an integer of {length} bytes at byte {at:,}")
    reader.stack.append(integer_of(reader.take(at - 1, length + 2)))
    return at + 1 + length


def _float(reader: Reader, at: int) -> int:
    reader.stack.append(struct.unpack(">d", reader.take(at, 8))[0])
    return at + 8


def _string(width: int) -> Callable[[Reader, int], int]:
    def operation(reader: Reader, at: int) -> int:
        length = int.from_bytes(reader.take(at, width), "little")
        reader.stack.append(reader.take(at + width, length).decode("utf-8", "surrogatepass"))
        return at + width + length

    return operation


def _constant(value: bool | None) -> Callable[[Reader, int], int]:
    def operation(reader: Reader, at: int) -> int:
        reader.stack.append(value)
        return at

    return operation


def _pair(reader: Reader, at: int) -> int:
    """Tuples may only hold two integers: hashing nested tuples can take for ever."""
    second, first = reader.stack.pop(), reader.stack.pop()
    if type(first) is not int or type(second) is not int:
        raise TypeError("a pair may only hold integers")
    reader.stack.append((first, second))
    return at


def _list(reader: Reader, at: int) -> int:
    reader.stack.append([])
    return at


def _mark(reader: Reader, at: int) -> int:
    reader.below.append(reader.stack)
    reader.stack = []
    return at


def _append(reader: Reader, at: int) -> int:
    item = reader.stack.pop()
    reader.top(list).append(item)
    return at


def _extend(reader: Reader, at: int) -> int:
    items = reader.since_mark()
    reader.top(list).extend(items)
    return at


def _dictionary(reader: Reader, at: int) -> int:
    known = reader.shapes.match(reader.program, at - 1) if reader.shapes else None
    made, end = known or ({}, at)
    reader.stack.append(made)
    return end


def _set_item(reader: Reader, at: int) -> int:
    value, key = reader.stack.pop(), reader.stack.pop()
    reader.top(dict)[key] = value
    return at


def _set_items(reader: Reader, at: int) -> int:
    items = reader.since_mark()
    reader.top(dict).update(zip(items[::2], items[1::2], strict=True))
    return at


def _remember(reader: Reader, at: int) -> int:
    reader.memory.append(reader.stack[-1])
    return at


def _remember_at(width: int) -> Callable[[Reader, int], int]:
    """Pickle numbers what it remembers 0, 1, 2, …, in protocols that write the number, too."""

    def operation(reader: Reader, at: int) -> int:
        place = int.from_bytes(reader.take(at, width), "little")
        if place != len(reader.memory):
            raise SnapshotError(f"place {place:,} is remembered out of order at byte {at:,}")
        reader.memory.append(reader.stack[-1])
        return at + width

    return operation


def _recall(width: int) -> Callable[[Reader, int], int]:
    def operation(reader: Reader, at: int) -> int:
        place = int.from_bytes(reader.take(at, width), "little")
        reader.stack.append(reader.memory[place])
        return at + width

    return operation


_STOP = b"."[0]
_KNOWN = {
    b"\x80": _protocol,
    b"\x95": _frame,
    b"K": _integer(1),
    b"M": _integer(2),
    b"J": _integer(4),
    b"\x8a": _long,
    b"G": _float,
    b"\x8c": _string(1),
    b"X": _string(4),
    b"\x8d": _string(8),
    b"N": _constant(None),
    b"\x88": _constant(True),
    b"\x89": _constant(False),
    b"\x86": _pair,
    b"]": _list,
    b"(": _mark,
    b"a": _append,
    b"e": _extend,
    b"}": _dictionary,
    b"s": _set_item,
    b"u": _set_items,
    b"\x94": _remember,
    b"q": _remember_at(1),
    b"r": _remember_at(4),
    b"h": _recall(1),
    b"j": _recall(4),
}
_OPERATIONS = [_KNOWN.get(bytes([opcode]), _refuse) for opcode in range(256)]
