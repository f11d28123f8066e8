"""Files that are there whole or not at all, whatever moment the machine dies at."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path


def write_whole(files: Mapping[Path, Iterable[bytes | memoryview]]) -> None:
    """Write files, given in pieces: all under other names, forced to the disk, and then renamed.

    A process that dies leaves the old files, and at most parts (`.NAME.part`) that nobody reads.

    Raises:
        OSError: the disk is full or the folder cannot be written to; no part is left.
    """
    try:
        for path, pieces in files.items():
            with _part(path).open("wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
    except OSError:
        for path in files:
            _part(path).unlink(missing_ok=True)  # a full disk needs the room
        raise
    for path in files:
        _part(path).replace(path)
    for folder in {path.parent for path in files}:
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Force a rename to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")
