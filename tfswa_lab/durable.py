"""Files that are complete or absent, and folders that one process at a time writes to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from secrets import token_hex
from tempfile import gettempdir

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
def parts_of(
    paths: Sequence[Path], overwrite: bool = True, folder: Path | None = None
) -> Iterator[list[Path]]:
    """Hidden files to write to: renamed to `paths` at the end, all of them or none.

    Their names are used by nobody else. After an error or Ctrl-C they are deleted.

    Args:
        paths: of the files wanted; their folders are made at the end.
        overwrite: whether files that are there are replaced.
        folder: of the hidden files, on the same disk; beside each path if None.

    Raises:
        FileExistsError: a file is there and must not be replaced.
        OSError: a file cannot be renamed; what was there is there again.
    """
    with hidden_files([folder or path.parent for path in paths], paths) as parts:
        yield parts
        _publish(parts, paths, overwrite)


@contextmanager
def hidden_files(folders: Sequence[Path], like: Sequence[Path]) -> Iterator[list[Path]]:
    """Names in folders for files to write, ending like others; the files are deleted at the end."""
    with ExitStack() as stack:
        files = [_hidden(path, folder) for folder, path in zip(folders, like, strict=True)]
        for file in files:
            stack.callback(file.unlink, missing_ok=True)
        yield files


def _hidden(path: Path, folder: Path) -> Path:
    """A name that no other process uses, however long the path's own is."""
    return folder / f".{token_hex(8)}.part{path.suffix}"


def refuse_existing(paths: Iterable[Path]) -> None:
    """Refuse to replace files.

    Raises:
        FileExistsError: names the first that is there.
    """
    for path in paths:
        if path.exists():
            raise FileExistsError(
                f"{path} exists; use --overwrite (overwrite=True), or choose another name"
            )


def _publish(parts: Sequence[Path], paths: Sequence[Path], overwrite: bool) -> None:
    """Rename files while no other process of this user does, and undo it where one fails."""
    user = getattr(os, "getuid", lambda: "")()  # Windows has a folder of its own for each user
    with (
        FileLock(Path(gettempdir()) / f"tfswa-lab-{user}.lock"),
        ExitStack() as olds,
        ExitStack() as undo,
    ):
        if not overwrite:
            refuse_existing(paths)
        for part, path in zip(parts, paths, strict=True):
            _make_folder(path.parent, undo)
            if len(paths) > 1 and path.is_file():  # a single rename is whole by itself
                old = _hidden(path, path.parent)
                olds.callback(old.unlink, missing_ok=True)
                _keep(path, old)
                undo.callback(old.replace, path)
            elif len(paths) > 1:
                undo.callback(path.unlink, missing_ok=True)
            part.replace(path)
        undo.pop_all()


def _make_folder(folder: Path, undo: ExitStack) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent, undo)
        folder.mkdir(exist_ok=True)
        undo.callback(folder.rmdir)


def _keep(path: Path, old: Path) -> None:
    """Give a file a second name, so that at no moment it is missing; some disks have one each."""
    try:
        old.hardlink_to(path)
    except OSError:
        path.replace(old)


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
