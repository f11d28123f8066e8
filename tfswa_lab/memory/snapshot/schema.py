"""The contents of a memory snapshot, whichever version of torch wrote it.

Versions differ: `active_awaiting_free` became `active_pending_free`; blocks had a `history` before
they had `frames`; `oom` entries have no address; keys come and go. None of this is an error;
`Contents.notes` lists what a user should know.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tfswa_lab.memory.snapshot.pickles import SnapshotError
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
LARGEST_SIZE = 2**50  # bytes of a block or a segment; more is refused


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


@dataclass(frozen=True, eq=False)
class History:
    """The entries of one device's history, oldest first, as columns of the same length.

    Args:
        action: indices into `ACTIONS`.
        address: 0 where there is none.
        size: bytes as recorded, for blocks the request.
        device_free: bytes that the device had left, in `oom` entries; else 0.
        time_us: microseconds, 0 if not recorded.
        stack: number of the stack.
        text: number of the `user_metadata`.
    """

    action: np.ndarray
    address: np.ndarray
    size: np.ndarray
    device_free: np.ndarray
    time_us: np.ndarray
    stack: np.ndarray
    text: np.ndarray

    def __len__(self) -> int:
        return len(self.action)

    def where(self, *actions: str) -> np.ndarray:
        """A mask of the entries with one of these actions."""
        return np.isin(self.action, [CODES[action] for action in actions])


@dataclass
class Contents:
    """What a snapshot contains.

    Args:
        segments: of all devices.
        histories: by device.
        stacks: by number, innermost line first; number 0 is the empty stack.
        texts: the distinct `user_metadata` by number; number 0 is empty.
        notes: entries that were left out, values that were not understood.
    """

    segments: list[Segment] = field(default_factory=list)
    histories: dict[int, History] = field(default_factory=dict)
    stacks: list[tuple[Frame, ...]] = field(default_factory=lambda: [()])
    texts: list[str] = field(default_factory=lambda: [""])
    notes: list[str] = field(default_factory=list)


def parse(raw: object, last: int | None = None, most: int | None = None) -> Contents:
    """Check and convert an unpickled snapshot.

    Args:
        raw: of `torch.cuda.memory._snapshot()`, or the list of `torch.cuda.memory_snapshot()`.
        last: how many of the newest entries of each device to keep; None for all.
        most: the most segments, blocks and entries that it may have, because a small file can
            repeat one list a million times.

    Raises:
        SnapshotError: it is not a snapshot.
    """
    return _Parser(most).snapshot(raw, last)


class _Parser:
    """Goes through a snapshot once; equal stacks and equal texts get one number."""

    def __init__(self, most: int | None):
        self.contents = Contents()
        self._most, self._count = most, 0
        self._lines: dict[int, Frame] = {}  # by the identity of their dictionary
        self._lists: dict[tuple[int, ...], int] = {}  # numbers of stacks, by their lines' identity
        self._numbers: dict[tuple[Frame, ...], int] = {(): 0}
        self._texts: dict[str, int] = {"": 0}
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
            if not isinstance(entries, list):
                raise SnapshotError(f"the trace of device {device} is not a list")
            if entries:
                contents.histories[device] = self.history(device, entries, last)
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
        if isinstance(history, list) and history and isinstance(history[0], dict):
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
            self.stack(source),
        )

    def history(self, device: int, entries: list, last: int | None) -> History:
        kept = entries if last is None else entries[max(len(entries) - last, 0) :]
        if len(kept) < len(entries):
            self.contents.notes.append(
                f"device {device}: the last {len(kept):,} of {len(entries):,} entries"
            )
        rows = array("q")
        for entry in self.counted(kept):
            rows.extend(self.entry(entry))
        return History(*np.array(rows, np.int64).reshape(len(kept), -1).T.copy())

    def entry(self, raw: object) -> tuple[int, ...]:
        """One row of a history."""
        if not isinstance(raw, dict):
            raise SnapshotError(f"a trace holds a {type(raw).__name__}, not a dictionary")
        action = raw.get("action")
        code = CODES.get(action) if isinstance(action, str) else None
        if code is None:
            self._odd["entries with an unknown action, ignored"] += 1
            code = CODES["other"]
        free = _size(raw, "device_free") if action == "oom" else 0
        text = raw.get("user_metadata")
        return (
            code,
            _number(raw, "addr"),
            _size(raw, "size"),
            free,
            _number(raw, "time_us", low=-(2**63)),
            self.stack(raw),
            self._texts.setdefault(text, len(self._texts)) if isinstance(text, str) else 0,
        )

    def stack(self, raw: dict) -> int:
        """The number of a stack: lines of the backward pass, then lines of the forward pass."""
        number, forward = self.lines(raw.get("frames")), self.lines(raw.get("forward_frames"))
        if not forward:
            return number
        stacks = self.contents.stacks
        return self.number(stacks[number] + stacks[forward])

    def lines(self, frames: object) -> int:
        if not isinstance(frames, list) or not frames:
            return 0
        key = tuple(map(id, frames))
        if key not in self._lists:
            self._lists[key] = self.number(tuple(map(self.line, frames)))
        return self._lists[key]

    def number(self, stack: tuple[Frame, ...]) -> int:
        number = self._numbers.setdefault(stack, len(self._numbers))
        if number == len(self.contents.stacks):
            self.contents.stacks.append(stack)
        return number

    def line(self, raw: object) -> Frame:
        line = self._lines.get(id(raw))
        if line is None:
            known = raw if isinstance(raw, dict) else {}
            name, file = known.get("name"), known.get("filename")
            number = known.get("line")
            line = Frame(
                file if isinstance(file, str) else "?",
                number if isinstance(number, int) else 0,
                name if isinstance(name, str) else "?",
            )
            self._lines[id(raw)] = line
        return line


def _listed(mapping: Mapping, key: str) -> list:
    """A list that may be missing."""
    value = mapping.get(key) or []
    if not isinstance(value, list):
        raise SnapshotError(f"{key} is a {type(value).__name__}, not a list")
    return value


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
