"""A snapshot as large as one likes, written without holding it in memory.

It has the structure of `pickle.dump(torch.cuda.memory._snapshot(), file)`: all stacks share the
dictionaries of their lines, an allocation and its request to be freed have a list of lines each,
and the completion shares the request's.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

BASE = 0x7F00_0000_0000  # address of the first slot
SLOT = 2**21  # bytes between two slots, one block in each
LIVE = 2_000  # slots
LINES = 5_000  # distinct lines of code
SIZES = (512, 4_096, 77, 2**20, 3 * 2**18, 2**21)
BATCH = 1_000  # items that pickle adds to a list at once
FRAME = 64 * 1024  # bytes after which pickle begins a new frame


def write_synthetic(
    path: str | Path,
    entries: int,
    depth: int = 30,
    stacks: int = 3_000,
    seed: int = 0,
    protocol: int = 4,
) -> Path:
    """Write a snapshot of one device whose history has this many entries.

    Args:
        path: of the file.
        entries: of the history; a block makes three.
        depth: lines of a stack.
        stacks: distinct ones.
        seed: of all choices.
        protocol: of pickle, 2 to 5.
    """
    chance = random.Random(seed)
    numbers = range(LINES)
    lines = [{"name": f"f{n}", "filename": f"/home/me/x{n % 99}.py", "line": n} for n in numbers]
    known = [chance.choices(lines, k=depth) for _ in range(stacks)]
    with Path(path).open("wb") as file:
        writer = _Writer(file, protocol)
        writer.write(b"}" + writer.put() + b"(")
        writer.save("segments")
        writer.save([_segment()])
        writer.save("device_traces")
        writer.write(b"]" + writer.put() + b"(]" + writer.put())
        for number, entry in enumerate(_history(chance, known, entries)):
            writer.write(b"" if number % BATCH else b"(" if number == 0 else b"e(")
            writer.save(entry)
        writer.write(b"eeu.")
        writer.flush()
    return Path(path)


def _segment() -> dict:
    """All slots, free at the end."""
    block = {"size": SLOT, "requested_size": 0, "state": "inactive", "frames": []}
    blocks = [block | {"address": BASE + slot * SLOT} for slot in range(LIVE)]
    return {"device": 0, "address": BASE, "total_size": LIVE * SLOT, "blocks": blocks}


def _history(chance: random.Random, known: list[list[dict]], entries: int) -> Iterator[dict]:
    """A block of each slot lives until the slot is needed again; the last are released, too."""
    events, time_us, alive = _events(chance, entries), 1_700_000_000_000_000, {}
    for action, slot in events:
        time_us += chance.randrange(1, 2_000)
        if action == "alloc":
            alive[slot] = chance.choice(SIZES)
        if action != "free_completed":
            frames = list(chance.choice(known))
        yield {
            "action": action,
            "addr": BASE + slot * SLOT,
            "size": alive[slot],
            "stream": 0,
            "time_us": time_us,
            "compile_context": "N/A",  # torch makes a new text for each entry, and so does `_text`
            "user_metadata": "",
            "pool_id": (0, 0),
            "frames": frames,
        }


def _events(chance: random.Random, entries: int) -> Iterator[tuple[str, int]]:
    """Actions and slots; 3 entries for each block."""
    release = ("free_requested", "free_completed")
    alive, blocks = set(), entries // 3
    for _ in range(blocks):
        slot = chance.randrange(LIVE)
        if slot in alive:
            yield from ((action, slot) for action in release)
        alive.add(slot)
        yield "alloc", slot
    for slot in alive:
        yield from ((action, slot) for action in release)


class _Writer:
    """Writes as pickle does, but remembers only lines, keys and what was written just now."""

    def __init__(self, file: BinaryIO, protocol: int):
        self._file, self._protocol = file, protocol
        self._buffer = bytearray()
        self._count = 0  # of things that the reader remembers
        self._places: dict[object, int] = {}  # of keys by text, of lines by identity
        self._last: tuple[list, int] | None = None  # list of lines, and its place
        self._lines: dict[tuple[int, ...], bytes] = {}  # recalled, by identity
        file.write(bytes([0x80, protocol]))

    def write(self, code: bytes) -> None:
        self._buffer += code
        if len(self._buffer) >= FRAME:
            self.flush()

    def flush(self) -> None:
        if self._protocol >= 4:
            self._file.write(b"\x95" + len(self._buffer).to_bytes(8, "little"))
        self._file.write(self._buffer)
        self._buffer.clear()

    def put(self) -> bytes:
        """Remember what was written last."""
        self._count += 1
        if self._protocol >= 4:
            return b"\x94"
        place = self._count - 1
        return bytes([113, place]) if place < 256 else b"r" + place.to_bytes(4, "little")

    def save(self, thing: object) -> None:
        kind = type(thing)
        if kind is int:
            self.write(pickle.dumps(thing, protocol=2)[2:-1])
        elif kind is str:
            self._text(thing)
        elif kind is tuple:
            self.write(b"K%cK%c\x86" % thing + self.put())
        elif kind is dict:
            self._dictionary(thing)
        elif thing and "filename" in thing[0]:
            self._stack(thing)
        else:
            self._list(thing)

    def _text(self, text: str) -> None:
        if text in self._places:
            return self.write(_recall(self._places[text]))
        if text != "N/A":
            self._places[text] = self._count
        length = len(text).to_bytes(1 if self._protocol >= 4 else 4, "little")
        code = b"\x8c" if self._protocol >= 4 else b"X"
        return self.write(code + length + text.encode() + self.put())

    def _dictionary(self, items: dict) -> None:
        if "filename" in items:
            self._places[id(items)] = self._count
        self.write(b"}" + self.put() + b"(")
        for key, value in items.items():
            self.save(key)
            self.save(value)
        self.write(b"u")

    def _list(self, items: list) -> None:
        self.write(b"]" + self.put())
        for start in range(0, len(items), BATCH):
            self.write(b"(")
            for item in items[start : start + BATCH]:
                self.save(item)
            self.write(b"e")

    def _stack(self, lines: list[dict]) -> None:
        if self._last and self._last[0] is lines:
            return self.write(_recall(self._last[1]))
        self._last = lines, self._count
        self.write(b"]" + self.put() + b"(")
        key = tuple(map(id, lines))
        if code := self._lines.get(key):
            self.write(code)
        else:
            for line in lines:
                known = self._places.get(id(line))
                self.save(line) if known is None else self.write(_recall(known))
            self._lines[key] = b"".join(_recall(self._places[one]) for one in key)
        return self.write(b"e")


def _recall(place: int) -> bytes:
    return bytes([104, place]) if place < 256 else b"j" + place.to_bytes(4, "little")
