"""Files that are complete or absent, and folders that one process at a time writes to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


def write_whole(files: Mapping[Path, Iterable[bytes | memoryview]]) -> None:
    """Write files, each given as byte strings: under other names, flushed to disk, then renamed.

    A process that dies leaves the old files, and at most parts (`.NAME.part`) that are never read.

    Raises:
        OSError: the disk is full or the folder cannot be written to; no part is left.
    """
    try:
        for path, blocks in files.items():
            with _part(path).open("wb") as file:
                file.writelines(blocks)
                file.flush()
                os.fsync(file.fileno())
    except OSError:
        for path in files:
            _part(path).unlink(missing_ok=True)  # a full disk needs the space
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


@contextmanager
def parts_of(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Hidden files to write to: renamed to `paths` at the end, deleted after an error or Ctrl-C."""
    parts = [path.with_name(f".{path.stem}.part{path.suffix}") for path in paths]
    try:
        yield parts
        for part, path in zip(parts, paths, strict=True):
            part.replace(path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Be the only process that writes to a folder; the lock ends with the process, however it ends.

    Args:
        folder: one that exists.
        doing: the purpose, for the error: "another process is training in …".

    Raises:
        FileExistsError: another process holds it.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(
            f"another process is {doing} in {folder}; let it end or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()
