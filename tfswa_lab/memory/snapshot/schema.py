"""The contents of a memory snapshot, whichever version of torch wrote it.

Versions differ: `active_awaiting_free` became `active_pending_free`; blocks had a `history` before
they had `frames`; `oom` entries have no address; keys come and go. None of this is an error;
`Contents.notes` lists what a user should know.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from tfswa_lab.memory.display import Shown
from tfswa_lab.memory.snapshot.pickles import SnapshotError
from tfswa_lab.memory.snapshot.shapes import Make, Recalled
from tfswa_lab.memory.trace.stacks import Frame

ACTIONS = (
    "alloc",
    "free_requested",
    "free_completed",
    "segment_alloc",
    "segment_free",
    "segment_map",
    "segment_unmap",
    "snapshot",
    "oom",
    "other",
)
CODES = {action: code for code, action in enumerate(ACTIONS)}
STATES = {
    "active_allocated": "active",
    "active_pending_free": "pending",  # in files
    "active_awaiting_free": "pending",  # in torch's documentation
    "inactive": "inactive",
}
FORWARD = Frame("<forward>", 0, "the forward operation whose gradient is computed")
LARGEST_SIZE = 2**50  # bytes of a block or a segment; more is refused
MOST_JOINED = 2**25  # lines; a small file can join each of many stacks with each
LISTS = (list, Recalled)
ENTRY = (  # the keys of an entry that are read, in the order of `Entries.add`
    "action",
    "frames",
    "forward_frames",
    "user_metadata",
    "category",
    "compile_context",
    "addr",
    "size",
    "device_free",
    "time_us",
)


class RecordedPart(NamedTuple):
    """A part of a segment; torch calls it a block."""

    address: int
    size: int  # bytes of the segment
    requested: int  # bytes that were requested
    state: str  # active, pending (freed, but still used by another stream) or inactive
    stack: int  # number of the stack that allocated it


class Segment(NamedTuple):
    """Memory that the allocator has taken from the device."""

    device: int
    address: int
    size: int
    parts: tuple[RecordedPart, ...]


@dataclass(frozen=True, eq=False, repr=False)
class History(Shown):
    """The entries of one device's history, oldest first, as columns of the same length.

    Args:
        action: indices into `ACTIONS`.
        address: 0 where there is none.
        size: bytes as recorded, for blocks the request.
        device_free: bytes that the device had left, in `oom` entries; else 0.
        time_us: microseconds, 0 if not recorded.
        stack: number of the stack.
        text: number of the `user_metadata`, or of the `category` if there is none.
        context: number of the `compile_context`, which is a text, too.
    """

    action: np.ndarray
    address: np.ndarray
    size: np.ndarray
    device_free: np.ndarray
    time_us: np.ndarray
    stack: np.ndarray
    text: np.ndarray
    context: np.ndarray

    def __len__(self) -> int:
        return len(self.action)

    @property
    def brief(self) -> str:
        """The number of entries."""
        return f"{len(self):,} entries"

    def where(self, *actions: str) -> np.ndarray:
        """A mask of the entries with one of these actions."""
        return np.isin(self.action, [CODES[action] for action in actions])


class Annotation(NamedTuple):
    """The start or the end of something that the program gave a name, such as a step."""

    name: str
    stage: str  # START or END
    device: int
    time_us: int


@dataclass(repr=False)
class Contents(Shown):
    """What a snapshot contains.

    Args:
        segments: of all devices.
        histories: by device.
        stacks: by number, innermost line first; number 0 is the empty stack.
        texts: the distinct `user_metadata` and contexts by number; number 0 is empty.
        notes: entries that were left out, values that were not understood.
        annotations: as they were recorded.
        settings: of the allocator, by name.
    """

    segments: list[Segment] = field(default_factory=list)
    histories: dict[int, History] = field(default_factory=dict)
    stacks: list[tuple[Frame, ...]] = field(default_factory=lambda: [()])
    texts: list[str] = field(default_factory=lambda: [""])
    notes: list[str] = field(default_factory=list)
    annotations: list[Annotation] = field(default_factory=list)
    settings: dict[str, object] = field(default_factory=dict)

    @property
    def brief(self) -> str:
        """How much there is of the main things."""
        entries = sum(map(len, self.histories.values()))
        return f"{len(self.segments):,} segments, {entries:,} entries, {len(self.stacks):,} stacks"


class Row(int):
    """An entry: the number of its row."""

    __slots__ = ()


class Entries:
    """Entries as rows of integers, as soon as they are read: dictionaries would fill the memory.

    Actions, texts and lists of lines become numbers of things; what they mean is decided later, for
    each distinct thing once.
    """

    def __init__(self):
        self.things: list[object] = []
        self._numbers = _Numbers(self.things)
        self._lists: dict[tuple[int, ...], Recalled] = {}  # by the identity of their lines
        self._rows = bytearray()
        self._next_row = map(Row, count()).__next__

    def maker(self, keys: Sequence[str]) -> Make:
        """What to make of the values of dictionaries with these keys: rows if they are entries."""
        if "action" not in keys:
            return lambda values: dict(zip(keys, values, strict=False))
        choose = itemgetter(*(keys.index(key) if key in keys else -1 for key in ENTRY))
        return lambda values: self.add(choose(values))

    def add(self, values: Sequence) -> Row:
        """Add an entry by the values of the keys in `ENTRY`; None where there is none."""
        try:
            self._rows += self._packed(*values)
        except TypeError:  # a list or a dictionary
            self._rows += self._packed(*map(self._hashable, values))
        return self._next_row()

    def _packed(
        self, action, frames, forward, metadata, category, context, address, size, free, time_us
    ) -> bytes:
        numbers = self._numbers
        free = free if action == "oom" else 0
        try:
            return _ROW.pack(
                numbers[action],
                numbers[frames],
                numbers[forward],
                numbers[metadata or category],
                numbers[context],
                address or 0,
                size or 0,
                free or 0,
                time_us or 0,
            )
        except struct.error:
            for key, value in zip(ENTRY[6:], (address, size, free, time_us), strict=True):
                _number({key: value}, key, low=-(2**63))
            raise

    def _hashable(self, thing: object) -> object:
        """Lists of the same lines become the same."""
        if isinstance(thing, list):
            return self._lists.setdefault(tuple(map(id, thing)), Recalled(thing))
        return None if isinstance(thing, dict) else thing

    def columns(self, rows: np.ndarray) -> list[np.ndarray]:
        """The columns of some rows."""
        table = np.frombuffer(self._rows, np.int64).reshape(-1, _ROW.size // 8)
        return [table[rows, column] for column in range(table.shape[1])]


_ROW = struct.Struct("9q")


class _Numbers(dict[object, int]):
    """Numbers things in the order in which they come."""

    def __init__(self, things: list[object]):
        self._things = things

    def __missing__(self, thing: object) -> int:
        number = self[thing] = len(self._things)
        self._things.append(thing)
        return number


def parse(
    raw: object,
    last: int | None = None,
    most: int | None = None,
    entries: Entries | None = None,
) -> Contents:
    """Check and convert an unpickled snapshot.

    Args:
        raw: of `torch.cuda.memory._snapshot()`, or the list of `torch.cuda.memory_snapshot()`.
        last: how many of the newest entries of each device to keep; None for all.
        most: the most segments, blocks and entries that it may have, because a small file can
            repeat one list a million times.
        entries: those of which `raw` has only the `Row`.

    Raises:
        SnapshotError: it is not a snapshot.
    """
    return _Parser(most, entries or Entries()).snapshot(raw, last)


class _Parser:
    """Goes through a snapshot once; equal stacks and equal texts get one number."""

    def __init__(self, most: int | None, entries: Entries):
        self.contents, self._entries = Contents(), entries
        self._most, self._count = most, 0
        self._lines: dict[int, Frame] = {}  # by the identity of their dictionary
        self._lists: dict[tuple[int, ...], int] = {}  # numbers of stacks, by their lines' identity
        self._numbers: dict[tuple[Frame, ...], int] = {(): 0}
        self._texts: dict[str, int] = {"": 0}
        self._joined = 0
        self._odd: Counter[str] = Counter()

    def snapshot(self, raw: object, last: int | None) -> Contents:
        if isinstance(raw, list):
            raw = {"segments": raw}
        if not isinstance(raw, dict) or not {"segments", "device_traces"} & raw.keys():
            raise SnapshotError("not a memory snapshot: it has neither segments nor device_traces")
        contents = self.contents
        contents.segments = [self.segment(one) for one in self.items(raw, "segments")]
        sizes = (one.size + sum(part.size for part in one.parts) for one in contents.segments)
        if sum(sizes) > 2**62:
            raise SnapshotError("its segments hold more memory than any machine has")
        if "segments" not in raw:
            contents.notes.append("no segments: what was allocated before the trace is unknown")
        for device, entries in enumerate(_listed(raw, "device_traces")):
            if not isinstance(entries, LISTS):
                raise SnapshotError(f"the trace of device {device} is not a list")
            if entries:
                contents.histories[device] = self.history(device, entries, last)
        contents.annotations = list(self.annotations(raw))
        settings = raw.get("allocator_settings")
        contents.settings = settings if isinstance(settings, dict) else {}
        contents.texts = list(self._texts)
        contents.notes += [f"{count} {what}" for what, count in self._odd.items()]
        return contents

    def items(self, mapping: Mapping, key: str) -> Iterable[dict]:
        """The dictionaries of a list; they count towards `most`."""
        for item in self.counted(_listed(mapping, key)):
            if not isinstance(item, dict):
                raise SnapshotError(f"{key} holds a {type(item).__name__}, not a dictionary")
            yield item

    def counted(self, items: Sequence) -> Sequence:
        self._count += len(items)
        if self._most is not None and self._count > self._most:
            raise SnapshotError(f"more than {self._most:,} blocks and entries in so small a file")
        return items

    def segment(self, raw: dict) -> Segment:
        address = next_address = _number(raw, "address")
        parts = []
        for one in self.items(raw, "blocks"):
            part = self.part(one, next_address)
            next_address = part.address + part.size
            parts.append(part)
        return Segment(_number(raw, "device"), address, _size(raw, "total_size"), tuple(parts))

    def part(self, raw: dict, address: int) -> RecordedPart:
        """A block; old ones have no address, and keep the request in their history."""
        size = _size(raw, "size")
        source = raw
        history = raw.get("history")
        if isinstance(history, LISTS) and history and isinstance(history[0], dict):
            source = {"frames": history[0].get("frames")}
            source["requested_size"] = history[0].get("real_size", size)
        state = raw.get("state")
        if not isinstance(state, str) or state not in STATES:
            self._odd["blocks in an unknown state, counted as inactive"] += 1
            state = "inactive"
        return RecordedPart(
            _number(raw, "address", address),
            size,
            _size(source, "requested_size", size),
            STATES[state],
            self.joined(*(self.lines(source.get(key)) for key in ("frames", "forward_frames"))),
        )

    def history(self, device: int, entries: Sequence, last: int | None) -> History:
        kept = entries if last is None else entries[max(len(entries) - last, 0) :]
        if len(kept) < len(entries):
            self.contents.notes.append(
                f"device {device}: the last {len(kept):,} of {len(entries):,} entries"
            )
        rows = (one if type(one) is Row else self.row(one) for one in self.counted(kept))
        columns = self._entries.columns(np.fromiter(rows, np.int64, len(kept)))
        action, frames, forward, text, context, address, size, free, time_us = columns
        _check("addr", address)
        _check("size", size, LARGEST_SIZE)
        _check("device_free", free, LARGEST_SIZE)
        return History(
            self.actions(action),
            address,
            size,
            free,
            time_us,
            self.stacks(frames, forward),
            self.each(self.text, text),
            self.each(self.text, context),
        )

    def row(self, raw: object) -> Row:
        if not isinstance(raw, dict):
            raise SnapshotError(f"a trace holds a {type(raw).__name__}, not a dictionary")
        return self._entries.add(tuple(map(raw.get, ENTRY)))

    def each(self, rule: Callable[[object], int], column: np.ndarray) -> np.ndarray:
        """What the rule says of each thing in a column; it is asked once, first come, first."""
        things, order = self._entries.things, np.arange(len(column))[::-1]
        first = np.full(len(things), -1)
        first[column[::-1]] = order  # of several, the last is kept
        present = np.flatnonzero(first >= 0)
        said = np.zeros(len(things), np.int64)
        for number in present[np.argsort(first[present])].tolist():
            said[number] = rule(things[number])
        return said[column]

    def actions(self, column: np.ndarray) -> np.ndarray:
        codes = self.each(lambda thing: CODES.get(thing, -1), column)
        if odd := np.count_nonzero(codes < 0):
            self._odd["entries with an unknown action, ignored"] += odd
            codes[codes < 0] = CODES["other"]
        return codes

    def text(self, thing: object) -> int:
        if not isinstance(thing, str):
            return 0
        return self._texts.setdefault(printable(thing), len(self._texts))

    def stacks(self, frames: np.ndarray, forward: np.ndarray) -> np.ndarray:
        number, forward = self.each(self.lines, frames), self.each(self.lines, forward)
        both = np.flatnonzero(forward)
        count = len(self.contents.stacks)
        pairs, which = np.unique(number[both] * count + forward[both], return_inverse=True)
        joined = [self.joined(*divmod(pair, count)) for pair in pairs.tolist()]
        number[both] = np.array(joined, np.int64)[which]
        return number

    def joined(self, number: int, forward: int) -> int:
        """Lines of the backward pass, then lines of the forward pass."""
        if not forward:
            return number
        stacks = self.contents.stacks
        stack = (*stacks[number], FORWARD, *stacks[forward])
        self._joined += len(stack)
        if self._joined > MOST_JOINED:
            raise SnapshotError(f"more than {MOST_JOINED:,} lines in stacks of two passes")
        return self.number(stack)

    def lines(self, frames: object) -> int:
        """The number of a stack."""
        if not isinstance(frames, LISTS) or not frames:
            return 0
        key = tuple(map(id, frames))
        if key not in self._lists:
            self._lists[key] = self.number(tuple(map(self.line, frames)))
        return self._lists[key]

    def annotations(self, raw: dict) -> Iterable[Annotation]:
        found = raw.get("external_annotations")
        for one in self.counted(found if isinstance(found, LISTS) else ()):
            if isinstance(one, dict):
                texts = (_text(one, key) for key in ("name", "stage"))
                yield Annotation(*texts, _number(one, "device"), _number(one, "time_us"))

    def number(self, stack: tuple[Frame, ...]) -> int:
        number = self._numbers.setdefault(stack, len(self._numbers))
        if number == len(self.contents.stacks):
            self.contents.stacks.append(stack)
        return number

    def line(self, raw: object) -> Frame:
        line = self._lines.get(id(raw))
        if line is None:
            known = raw if isinstance(raw, dict) else {}
            number = known.get("line")
            number = number if isinstance(number, int) else 0
            line = Frame(_text(known, "filename"), number, _text(known, "name"))
            self._lines[id(raw)] = line
        return line


def _listed(mapping: Mapping, key: str) -> list:
    """A list that may be missing."""
    value = mapping.get(key) or []
    if not isinstance(value, LISTS):
        raise SnapshotError(f"{key} is a {type(value).__name__}, not a list")
    return value


def _text(mapping: Mapping, key: str) -> str:
    """A text that may be missing."""
    value = mapping.get(key)
    return printable(value) if isinstance(value, str) else "?"


def printable(text: str) -> str:
    """A text of a stranger, without what could command a terminal or break a line.

    >>> printable("f\\x1b[31m")
    'f�[31m'
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else "�" for each in text)


def _size(mapping: Mapping, key: str, default: int = 0) -> int:
    """A number of bytes that may be missing."""
    return _number(mapping, key, default, high=LARGEST_SIZE)


def _number(mapping: Mapping, key: str, default: int = 0, low: int = 0, high: int = 2**63) -> int:
    """A number that may be missing."""
    value = mapping.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or not low <= value < high:
        raise SnapshotError(f"{key} is not a number in the allowed range: {type(value).__name__}")
    return value


def _check(key: str, column: np.ndarray, high: int = 2**63) -> None:
    """Raise SnapshotError if one of the numbers is impossible."""
    for value in (int(column.min(initial=0)), int(column.max(initial=0))):
        _number({key: value}, key, high=high)
