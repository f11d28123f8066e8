"""What the headers of sound files state of their length, and whether the files keep it.

WAV, AIFF and their like have a chunk of samples with its size, MP3 may have a Xing header, and the
pages of Ogg files have checksums.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

EVERY_BIT = 0xFFFFFFFF


class Chunk(NamedTuple):
    """The part of a file that holds the samples: its size as stated, its real one, in bytes."""

    stated: int
    there: int
    field: int  # where the header states the size

    @property
    def unknown(self) -> bool:
        """Whether the size is what programs write that cannot know it yet, or never will.

        >>> [Chunk(size, 1000, 40).unknown for size in (0, 0x7FFFF000, 0xFFFFFFFF, 2000, 1000)]
        [True, True, True, False, False]
        """
        kept_free = not self.stated or self.stated >> 16 in (0x7FFF, 0x8000, 0xFFFF)
        return kept_free and self.stated != self.there > 0

    @property
    def wrapped(self) -> bool:
        """Whether 32 bits were too few for the size."""
        return self.stated <= EVERY_BIT and self.there - self.stated >= 2**32

    @property
    def promises(self) -> bool:
        """Whether it states more than there is; all of 64 bits mean that nobody knows."""
        return self.there < self.stated < 2**62


def sample_chunk(file: io.BufferedIOBase) -> Chunk | None:
    """The chunk of samples of a WAV, RF64, W64, AIFF, AU or CAF file; None for others."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(40)
    if start[:4] in (b"RIFF", b"RF64", b"BW64", b"RIFX") and start[8:12] == b"WAVE":
        return _walk(file, end, ">" if start[:4] == b"RIFX" else "<", b"data")
    if start[:4] == b"FORM" and start[8:12] in (b"AIFF", b"AIFC"):
        return _walk(file, end, ">", b"SSND")
    if start[:4] == b".snd" and len(start) >= 12:
        offset, size = struct.unpack(">II", start[4:12])
        return Chunk(size, end - offset, 8)
    if start[:4] == b"riff" and start[24:28] == b"wave":
        return _walk_long(file, end, 40, "<16xQ", b"data", 24)
    if start[:4] == b"caff":
        return _walk_long(file, end, 8, ">4xQ", b"data", 0)
    return None


def _walk(file: io.BufferedIOBase, end: int, order: str, wanted: bytes) -> Chunk | None:
    """Find a chunk among those that follow each other from byte 12 on."""
    position, long = 12, None
    while file.seek(position) < end and len(head := file.read(8)) == 8:
        name, size = struct.unpack(f"{order}4sI", head)
        if name == b"ds64":  # sizes of more than 32 bits
            long = struct.unpack("<Q", file.read(16)[8:].ljust(8, b"\0"))[0]
        if name == wanted:
            stated = long if size == EVERY_BIT and long else size
            return Chunk(stated, end - position - 8, position + 4)
        position += 8 + size + size % 2
    return None


def _walk_long(
    file: io.BufferedIOBase, end: int, position: int, head: str, wanted: bytes, counted: int
) -> Chunk | None:
    """The same for W64 and CAF, whose sizes have 64 bits; W64's count the head as well."""
    width = struct.calcsize(head)
    while file.seek(position) < end and len(found := file.read(width)) == width:
        size = struct.unpack(head, found)[0] - counted
        if found[:4] == wanted:
            return Chunk(size, end - position - width, position + width - 8)
        if not 0 <= size <= end:
            return None
        position += width + size + (-size % 8 if counted else 0)
    return None


def open_without_tag(path: Path) -> io.IOBase:
    """A file to read, without an ID3 tag that libsndfile would count as samples of a WAV file."""
    file = path.open("rb", buffering=0)
    start = file.read(10)
    if start[:3] == b"ID3":
        file.seek(_tag_bytes(start), 1)
        if (magic := file.read(4)) in (b"RIFF", b"RF64", b"BW64", b"RIFX", b"FORM", b"fLaC"):
            with file:
                return io.BytesIO(magic + file.read())
    file.seek(0)
    return file


def _tag_bytes(start: bytes) -> int:
    """Size of an ID3 tag after its first 10 bytes: four times seven bits."""
    return sum(byte << 7 * place for place, byte in enumerate(start[:5:-1]))


class WithLength(io.FileIO):
    """A file that is read as if its header stated the size that is there."""

    def __init__(self, path: Path, chunk: Chunk):
        super().__init__(path)
        big = self.read(4) in (b"FORM", b"RIFX", b".snd")
        self._size = struct.pack(">I" if big else "<I", min(chunk.there, EVERY_BIT - 1))
        self._field = chunk.field
        self.seek(0)

    def readinto(self, buffer: Any) -> int:
        """Read, and replace the bytes of the size if they are among those read."""
        start = self.tell()
        count = super().readinto(buffer)
        view = memoryview(buffer).cast("B")
        for place in range(max(start, self._field), min(start + count, self._field + 4)):
            view[place - start] = self._size[place - self._field]
        return count


def states_length(path: Path) -> bool:
    """Whether an MP3 file's Xing header states the length of the whole file.

    Without it, the length can only be guessed; of joined files it speaks of the first.
    """
    with path.open("rb") as file:
        start = file.read(10)
        if start[:3] == b"ID3":
            file.seek(_tag_bytes(start), 1)
        begins, frame = file.tell(), file.read(4096)
    place = max(frame.find(b"Xing"), frame.find(b"Info"))
    if place < 0:
        return False
    flags, _, size = struct.unpack(">III", frame[place + 4 : place + 16].ljust(12, b"\0"))
    return flags & 3 == 3 and path.stat().st_size - begins < 1.1 * size + 4096


class OggPages(NamedTuple):
    """What the pages of an Ogg file say: how many streams it has, and what is wrong with it."""

    streams: int
    fault: str


def read_ogg(path: Path) -> OggPages:
    """Walk over the pages; each holds a checksum, and the last says that it is the last.

    Source: RFC 3533, section 6.
    """
    content, position, streams, is_last = path.read_bytes(), 0, 0, False
    while content[position : position + 4] == b"OggS" and position + 27 <= len(content):
        flags, sizes = content[position + 5], content[position + 26]
        end = position + 27 + sizes + sum(content[position + 27 : position + 27 + sizes])
        page = content[position:end]
        if ogg_checksum(page) != struct.unpack("<I", page[22:26])[0]:
            return OggPages(streams, f"the page at byte {position} is damaged")
        streams += flags >> 1 & 1
        is_last, position = bool(flags & 4), end
    if position < len(content) and b"OggS" in content[position:]:
        return OggPages(streams, f"there is no page at byte {position}")
    return OggPages(streams, "" if is_last else "its end is missing")


def ogg_checksum(page: bytes) -> int:
    """The checksum of a page, as if it held none: zlib's, with all bits in the other order."""
    bare = page[:22] + bytes(4) + page[26:]
    turned = ~zlib.crc32(bare.translate(TURNED), EVERY_BIT) & EVERY_BIT
    return int(f"{turned:032b}"[::-1], 2)


TURNED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
