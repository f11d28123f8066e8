"""The files that strangers send: unpacked if need be, and named if they are something else.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import gzip
import mmap
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tfswa_lab.memory.sizes import GIB, MIB
from tfswa_lab.memory.snapshot.pickles import PROTOCOLS, SnapshotError

LARGEST = 16 * GIB  # bytes of a file, unpacked


@contextmanager
def opened(path: str | Path, largest: int = LARGEST) -> Iterator[mmap.mmap]:
    """The bytes of a pickle; a gzip file, or a zip of one file, is unpacked for the time being.

    A SnapshotError inside of the `with` block gets the path in front.

    Raises:
        FileNotFoundError: there is no such file.
        SnapshotError: it is too large, damaged, or something else than a pickle.
    """
    path = Path(path)
    if path.is_dir():
        raise SnapshotError(f"{path} is a folder; give one file, or use snapshot.ranks.compare")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such memory snapshot; check the path")
    try:
        with path.open("rb") as file, tempfile.TemporaryFile() as unpacked:
            plain = unpacked if _unpack(file, unpacked, largest) else file
            _check_size(plain.seek(0, 2), largest)
            with mmap.mmap(plain.fileno(), 0, access=mmap.ACCESS_READ) as program:
                _check_kind(program)
                yield program
    except SnapshotError as error:
        raise SnapshotError(f"{path}: {error}") from None


def _check_size(size: int, largest: int) -> None:
    if not size:
        raise SnapshotError("it is empty; copy it again")
    if size > largest:
        raise SnapshotError(
            f"it has {size:,} bytes, more than {largest:,}; record with fewer max_entries, or "
            "raise `largest`"
        )


def _unpack(file: BinaryIO, unpacked: BinaryIO, largest: int) -> bool:
    """Whether a file is compressed; if so, its contents are copied, but no more than allowed."""
    magic = file.read(4)
    file.seek(0)
    try:
        if magic[:2] == b"\x1f\x8b":
            with gzip.open(file) as source:
                return _copy(source, unpacked, largest)
        if magic == b"PK\x03\x04":
            with zipfile.ZipFile(file) as archive, archive.open(_only(archive)) as source:
                return _copy(source, unpacked, largest)
    except SnapshotError:
        raise
    except Exception as error:  # a damaged archive can raise anything
        raise SnapshotError(f"it cannot be unpacked ({type(error).__name__}: {error})") from error
    return False


def _copy(source: BinaryIO, unpacked: BinaryIO, largest: int) -> bool:
    while piece := source.read(MIB):
        _check_size(unpacked.tell() + len(piece), largest)
        unpacked.write(piece)
    return True


def _only(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """The only file of a zip."""
    files = [one for one in archive.infolist() if not one.is_dir()]
    if any(one.filename.endswith("data.pkl") for one in files):
        raise SnapshotError(f"it seems to be a checkpoint that torch.save wrote; {INSTEAD}")
    if len(files) != 1 or files[0].flag_bits & 1:  # encrypted
        raise SnapshotError(f"it is a zip of {len(files)} files, or has a password; {INSTEAD}")
    return files[0]


INSTEAD = "pass the file that torch.cuda.memory._dump_snapshot or memory.snapshot.dump wrote"
KINDS = {  # how a file of that kind begins
    rb"\s*[{\[].*traceEvents": "a trace of torch.profiler (JSON)",
    rb"\s*[{\[]": "JSON",
    rb"(?i)\s*<(!doctype|html|svg|\?xml|script)": "a page or picture for a browser",
    rb"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19\.": "a checkpoint that torch.save wrote",
    rb"PK|\x1f\x8b|BZh|\xfd7z|7z\xbc|\x28\xb5\x2f\xfd": "compressed, but by no gzip or simple zip",
}


def _check_kind(program: bytes | mmap.mmap) -> None:
    """Raise SnapshotError, with a guess, unless it begins as a pickle."""
    head = program[:4096]
    kinds = (kind for begin, kind in KINDS.items() if re.match(begin, head, re.DOTALL))
    kind = next(kinds, "")
    is_pickle = head[:1] == b"\x80" and len(head) > 1 and head[1] in PROTOCOLS
    if kind or not is_pickle:
        raise SnapshotError(f"it seems to be {kind or 'no pickle of protocol 2 to 5'}; {INSTEAD}")
