"""Dictionaries of a pickle that repeat, such as the entries of a history, read in one match each.

They differ in their values only. A regular expression is learned for each series of keys that comes
often; it also says how many things the reader has to remember of such a dictionary.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import mmap
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import compress
from typing import NamedTuple

LONGEST = 9  # bytes of an integer
SHORT = 64  # bytes; a dictionary with longer strings is read opcode by opcode
OFTEN = 500  # dictionaries of the same keys, before an expression is worth its compilation
MOST_SHAPES = 64  # series of keys that are counted; each may cost an expression
MOST_VALUES = 2**20  # that are kept by their bytes
_LONG, _SIGNED = b"\x8a"[0], b"J"[0]


class Recalled(tuple):
    """A list of things that the program had built before.

    Equal ones are one object, which is why it cannot change, and is compared by identity.
    """

    __slots__ = ()
    __eq__ = object.__eq__
    __hash__ = object.__hash__


Make = Callable[[list], object]  # of the values of a dictionary, and None behind the last


def integer_of(token: bytes) -> int:
    """The integer that an opcode and its bytes write."""
    if token[0] == _LONG:
        return int.from_bytes(token[2:], "little", signed=True)
    return int.from_bytes(token[1:], "little", signed=token[0] == _SIGNED)


class _Shape(NamedTuple):
    """The expression of a series of keys, and what to make of the values."""

    match: Callable[[bytes | mmap.mmap, int], re.Match | None]
    make: Make


class Shapes:
    """Reads a dictionary in one match if its keys are known.

    Args:
        maker: chooses what to make of the values of such keys.
        memory: of the reader.
    """

    def __init__(self, maker: Callable[[tuple], Make], memory: list):
        self._maker, self._memory = maker, memory
        self._value = _Values(memory).__getitem__
        self._known: list[_Shape] = []  # the last one used is the first
        self._seen: Counter[tuple[bytes, ...]] = Counter()

    def match(self, program: bytes | mmap.mmap, at: int) -> tuple[object, int] | None:
        """What is made of the dictionary at a position, and where it ends; None if unknown."""
        for shape in self._known:
            if found := shape.match(program, at):
                break
        else:
            return self._learn(program, at)
        if shape is not self._known[0]:
            self._known.remove(shape)
            self._known.insert(0, shape)
        groups = found.groups()
        tokens, built = groups[1::2], groups[2::2]
        if groups[0] != _REMEMBER:
            tokens = self._renumbered(groups[0], list(tokens), built)
        try:
            values = [*map(self._value, tokens), None]
        except (IndexError, TypeError):  # a place in this same dictionary, or a wrong one
            return None
        made = shape.make(values)
        self._memory.append(made)
        self._memory.extend(compress(values, built))
        return made, found.end()

    def _learn(self, program: bytes | mmap.mmap, at: int) -> None:
        """Count the keys of the dictionary at a position, and make an expression if they repeat."""
        found = _FLAT.match(program, at) if len(self._seen) < MOST_SHAPES else None
        if not found:
            return
        keys = tuple(_ITEM.findall(found[2]))
        self._seen[keys] += 1
        if self._seen[keys] != OFTEN:
            return
        names = tuple(map(self._value, keys))
        if all(isinstance(name, str) for name in names) and len(set(names)) == len(names):
            put = _REMEMBER if found[1] == _REMEMBER else _PUT
            built, other = _value(put)
            value = rb"(%b|(%b))" % (other, built)
            items = b"".join(re.escape(key) + value for key in keys)
            pattern = re.compile(rb"}(%b)\(%bu" % (put, items), re.DOTALL)
            self._known.insert(0, _Shape(pattern.match, self._maker(names)))

    def _renumbered(self, put: bytes, tokens: list, built: Sequence[bytes | None]) -> list | None:
        """Tokens without the places that old protocols write; None unless these are the next."""
        place = len(self._memory)
        right = put == _place(place)
        for number in compress(range(len(tokens)), built):
            place += 1
            put, token = _place(place), tokens[number]
            at = 1 if token[:1] == b"]" else len(token) - len(put)
            right &= token[at : at + len(put)] == put
            tokens[number] = token[:at] + token[at + len(put) :]
        return tokens if right else None


class _Values(dict[bytes, object]):
    """Values by the bytes that write them: these stay the same, as the memory only grows."""

    def __init__(self, memory: list):
        self._memory = memory

    def __missing__(self, token: bytes) -> object:
        if token[0] == _LONG and len(token) == token[1] + 2 > 8:  # times are too many to be kept
            return int.from_bytes(token[2:], "little", signed=True)
        value = self._value(token)
        if type(value) is str or token[:1] not in b"hj":  # lists are rarely recalled twice
            if len(self) == MOST_VALUES:
                self.clear()
            self[token] = value
        return value

    def _value(self, token: bytes) -> object:
        code = token[:1]
        if code in b"hj":
            return self._memory[int.from_bytes(token[1:], "little")]
        if code == b"]":
            return Recalled(map(self._value, _RECALL_TOKEN.findall(token, 1)))
        if code in b"\x8cX":
            start = 2 if code == b"\x8c" else 5
            return token[start : start + token[1]].decode("utf-8", "surrogatepass")
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        numbers = tuple(map(integer_of, _INTEGER.findall(token)))
        return numbers if len(numbers) == 2 else numbers[0]


def _place(number: int) -> bytes:
    """How old protocols remember something at a place."""
    return b"q%c" % number if number < 256 else b"r" + number.to_bytes(4, "little")


def _counted(count: int, then: bytes = b"") -> bytes:
    """A length below `count`, and as many bytes."""
    return b"|".join(
        re.escape(bytes([length])) + then + rb".{%d}" % length for length in range(count)
    )


_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False}
_REMEMBER, _PUT = b"\x94", rb"(?:q.|r....)"
_RECALL = rb"h.|j...."
_INTEGERS = rb"K.|M..|J....|\x8a(?:%b)" % _counted(LONGEST + 1)
_TEXTS = rb"(?:\x8c(?:%b)|X(?:%b))" % (_counted(SHORT), _counted(SHORT, rb"\x00\x00\x00"))


def _value(put: bytes) -> tuple[bytes, bytes]:
    """Values that are remembered once they are built, and others."""
    # Most places are long ones; without a choice, these match faster.
    recalls = rb"(?:j....)*+(?:%b)*+" % _RECALL
    listed = rb"\]%b(?:\(%be|(?:%b)a)?+" % (put, recalls, _RECALL)
    pair = rb"(?:%b){2}\x86%b" % (_INTEGERS, put)
    built = rb"%b|%b%b|%b" % (listed, _TEXTS, put, pair)
    return built, rb"%b|%b|[N\x88\x89]" % (_RECALL, _INTEGERS)


_ANY_PUT = rb"(?:\x94|q.|r....)"
_RECALL_TOKEN = re.compile(_RECALL, re.DOTALL)
_INTEGER = re.compile(_INTEGERS, re.DOTALL)
_VALUE = rb"(?:%b|%b)" % _value(_ANY_PUT)
_ITEM = re.compile(rb"(%b)%b" % (_RECALL, _VALUE), re.DOTALL)
_FLAT = re.compile(rb"}(%b)\(((?:(?:%b)%b)++)u" % (_ANY_PUT, _RECALL, _VALUE), re.DOTALL)
