"""Download a large file over an unreliable network, and unpack it, completely or not at all.

During a download, `NAME.part` holds the bytes that have arrived and `NAME.part.json` says which
version of the remote file they belong to, so that a second run continues where the first one
stopped, and never joins two versions.

No library that we tried does that: pooch starts again from the first byte when a connection drops,
and pypdl continues without checking that the remote file is still the same.

Notebook: 00_start_here
"""

from __future__ import annotations

import json
import re
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pooch  # for its hashes
import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

BLOCK_BYTES = 1 << 14  # at most so many bytes are lost when a connection drops


def fetch(
    url: str,
    dest: str | Path,
    *,
    size: int | None = None,
    checksum: str | None = None,
    retries: int = 5,
    wait_seconds: float = 1.0,
    timeout_seconds: float = 30.0,
    progress: bool = False,
) -> Path:
    """Download a file, from where an earlier attempt or an earlier run stopped.

    An existing `dest` with the right size and checksum is not fetched again. Without either, an
    existing `dest` is trusted, because an incomplete file never gets that name.

    Args:
        url: address; redirects are followed.
        dest: file to write; it appears only when complete and verified.
        size: published size in bytes.
        checksum: published checksum, `"md5:…"` or `"sha256:…"`.
        retries: attempts in a row that may bring no new byte before giving up.
        wait_seconds: pause after a dropped connection, doubled with each fruitless attempt.
        timeout_seconds: longest silence of the server.
        progress: draw a progress bar on stderr.

    Returns:
        `dest`.

    Raises:
        FileNotFoundError: the server has no such file.
        ConnectionError: the server cannot be reached or the file does not arrive completely;
            what has arrived stays for the next run.
        ValueError: the file is not the published one; what has arrived is removed.
    """
    _check_form(checksum)
    dest = Path(dest)
    if dest.is_dir():
        raise ValueError(f"{dest} is a folder; name the file to write")
    if dest.is_file() and not _difference(dest, size, checksum):
        return dest
    dest.parent.mkdir(parents=True, exist_ok=True)
    part = _Part(dest, size)
    with _session(retries, wait_seconds) as session:
        request = partial(session.get, stream=True, timeout=timeout_seconds)
        _complete(part, partial(_transfer, request, url, part, progress), retries, wait_seconds)
    if difference := _difference(part.data, part.version["size"], checksum):
        part.discard()
        raise ValueError(
            f"{url} is not the published file: {difference}; the download was removed. Run it "
            "again; if it happens twice, the remote file has changed: compare with its publisher"
        )
    part.data.replace(dest)
    part.note.unlink()
    return dest


def extract_zip(archive: str | Path, dest: str | Path, required: tuple[str, ...] = ()) -> Path:
    """Unpack a zip archive into a new folder that appears only when complete.

    Args:
        archive: zip file.
        dest: folder to make; it may exist if it is empty.
        required: files or folders that must be at the top of the archive.

    Returns:
        `dest`.

    Raises:
        FileExistsError: `dest` exists and is not empty.
        ValueError: the archive is damaged, lacks a required entry, or has an entry that would
            land outside `dest` ("zip slip").
    """
    dest = Path(dest)
    try:
        with zipfile.ZipFile(archive) as entries, whole_folder(dest) as folder:
            names = [name.replace("\\", "/") for name in entries.namelist()]
            if missing := set(required) - {name.split("/")[0] for name in names}:
                raise ValueError(
                    f"{archive} has no {sorted(missing)} at its top: is it the right file?"
                )
            for name in names:
                if not (folder / name).resolve().is_relative_to(folder):
                    raise ValueError(
                        f"{archive}: entry {name!r} would land outside {dest}; nothing was "
                        "unpacked. Do not trust this file: fetch it from its publisher"
                    )
            entries.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{archive} is not a zip archive or is damaged ({error}); delete it and fetch it again"
        ) from error
    return dest


@contextmanager
def whole_folder(dest: str | Path) -> Iterator[Path]:
    """Fill a folder that gets its name only when complete.

    Args:
        dest: folder to make; it may exist if it is empty.

    Yields:
        An empty folder beside `dest`, renamed to `dest` at the end, removed on an error.

    Raises:
        FileExistsError: `dest` exists and is not an empty folder.
    """
    dest = Path(dest).resolve()
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise FileExistsError(f"{dest} exists and is not empty; remove it or choose another name")
    part = dest.with_name(f".{dest.name}.part")
    if part.exists():  # left by a run that was killed
        shutil.rmtree(part)
    part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        shutil.rmtree(part)
        raise
    if dest.exists():
        dest.rmdir()
    part.rename(dest)


class _Dropped(Exception):
    """The connection ended early, or the server refused to continue: worth another attempt."""


class _Part:
    """The bytes that have arrived, and beside them the version they belong to."""

    def __init__(self, dest: Path, published_size: int | None):
        self.data = dest.with_name(f"{dest.name}.part")
        self.note = dest.with_name(f"{dest.name}.part.json")
        self.published_size = published_size
        try:
            self.version = json.loads(self.note.read_text())
        except (FileNotFoundError, ValueError):  # nothing yet, or killed while writing the note
            self.version = {}
        if published_size not in (None, self.version.get("size")):
            self.discard()

    def bytes(self) -> int:
        return self.data.stat().st_size if self.data.is_file() else 0

    def complete(self) -> bool:
        size = self.version.get("size")
        return size is not None and self.bytes() >= size

    def begin(self, validator: str | None, size: int | None) -> None:
        self.discard()
        self.version = {"validator": validator, "size": size}
        self.note.write_text(json.dumps(self.version))
        self.data.touch()

    def discard(self) -> None:
        self.version = {}
        self.data.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def _check_form(checksum: str | None) -> None:
    name, _, digest = (checksum or "").lower().partition(":")
    digits = {"md5": 32, "sha1": 40, "sha256": 64, "sha512": 128}.get(name)
    if checksum is not None and not (digits and re.fullmatch(f"[0-9a-f]{{{digits}}}", digest)):
        raise ValueError(f"checksum {checksum!r} is not 'md5:' and 32 or 'sha256:' and 64 digits")


def _difference(path: Path, size: int | None, checksum: str | None) -> str:
    """How a file differs from the published one; empty if it does not."""
    if size is not None and path.stat().st_size != size:
        return f"expected {size} bytes, got {path.stat().st_size}"
    if checksum is not None:
        name, _, expected = checksum.lower().partition(":")
        got = pooch.file_hash(path, alg=name)
        if got != expected:
            return f"expected {name}:{expected}, got {name}:{got}"
    return ""


def _session(retries: int, wait_seconds: float) -> requests.Session:
    # urllib3 retries until a response begins, and honours Retry-After. Once the body has begun,
    # only `_complete` can continue after the bytes that have arrived.
    retry = Retry(
        retries,
        backoff_factor=wait_seconds,
        status_forcelist=(429, 500, 502, 503, 504),
        raise_on_status=False,
    )
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session


def _complete(part: _Part, transfer: Callable[[], None], retries: int, wait_seconds: float) -> None:
    """Transfer until the part is complete; only attempts that bring nothing new are counted."""
    furthest, fruitless = part.bytes(), 0
    while not part.complete():
        try:
            transfer()
        except _Dropped as drop:
            fruitless = 0 if part.bytes() > furthest else fruitless + 1
            furthest = max(furthest, part.bytes())
            if fruitless > retries:
                raise ConnectionError(
                    f"{part.bytes()} of {part.version.get('size') or '?'} bytes have arrived, and "
                    f"{fruitless} attempts in a row brought nothing new ({drop}); run it again "
                    f"later to go on from {part.data}, or use another address"
                ) from drop
            time.sleep(wait_seconds * 2**fruitless)


def _transfer(request: Callable, url: str, part: _Part, progress: bool) -> None:
    """One request, whose body is appended to the part as it comes."""
    headers = {"Accept-Encoding": "identity"}  # a compressed body would have another length
    if part.bytes() and part.version.get("validator"):
        headers |= {"Range": f"bytes={part.bytes()}-", "If-Range": part.version["validator"]}
    try:
        response = request(url, headers=headers)
    except requests.RequestException as error:
        reason = f"{url} cannot be reached ({error}); check the network and the address"
        raise ConnectionError(reason) from error
    with response:
        _place(response, part)
        _append(response, part, progress)
    if part.version["size"] is None:  # the server announced no length, and the body ended properly
        part.version["size"] = part.bytes()
    if not part.complete():
        raise _Dropped(f"{url}: the body ended early")


def _place(response: requests.Response, part: _Part) -> None:
    """Decide whether the body continues the part or replaces it."""
    status = response.status_code
    if status == 206 and _continues(response, part):
        return
    if status in (206, 416):
        part.discard()
        raise _Dropped(f"{response.url} cannot continue the part: HTTP {status}")
    if status in (404, 410):
        raise FileNotFoundError(f"{response.url}: HTTP {status}, no such file; check the address")
    if status != 200:
        raise ConnectionError(f"{response.url}: HTTP {status} {response.reason}; try again later")
    length = response.headers.get("Content-Length")
    length = part.published_size if length is None else int(length)
    if part.published_size not in (None, length):
        raise ValueError(
            f"{response.url} has {length} bytes, but {part.published_size} are published: it is "
            "another file; check the address"
        )
    part.begin(_validator(response), length)


def _continues(response: requests.Response, part: _Part) -> bool:
    """Whether a partial answer is the rest of the same version: some servers ignore If-Range."""
    rest = f"bytes {part.bytes()}-\\d+/{part.version.get('size')}"
    return re.fullmatch(rest, response.headers.get("Content-Range", "")) is not None and _validator(
        response
    ) in (None, part.version.get("validator"))


def _validator(response: requests.Response) -> str | None:
    """A value for If-Range: a strong ETag, else the date; None if no resumption is safe."""
    etag = response.headers.get("ETag", "W/")
    return response.headers.get("Last-Modified") if etag.startswith("W/") else etag


def _append(response: requests.Response, part: _Part, progress: bool) -> None:
    bar = {"desc": part.data.stem, "total": part.version["size"], "initial": part.bytes()}
    with (
        part.data.open("ab") as file,
        tqdm.wrapattr(file, "write", **bar, disable=not progress) as counted,
    ):
        try:
            for block in response.iter_content(BLOCK_BYTES):
                counted.write(block)
        except requests.RequestException as error:
            raise _Dropped(f"{response.url}: the connection broke") from error
