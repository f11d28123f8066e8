"""Downloads against a local server that drops, truncates, changes and refuses."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from tfswa_lab.data.download import BLOCK_BYTES, extract_zip, fetch, whole_folder

ROOT = Path(__file__).resolve().parents[2]
BODY = np.random.default_rng(0).bytes(1_000_003)
CHUNK = 10_000


@dataclass
class Remote:
    """A remote file, how it misbehaves, and what was asked of it and sent."""

    body: bytes = BODY
    headers: dict = field(default_factory=lambda: {"ETag": '"v1"'})
    ranges: bool = True
    heeds_if_range: bool = True
    range_step: int = 1  # a cache that answers from the start of its own block
    announces_length: bool = True
    statuses: list = field(default_factory=list)  # answers to give first
    drops: list = field(default_factory=list)  # bytes after which to hang up, per answer
    truncated_at: int | None = None  # the disk of the server ends here
    pause_at: int | None = None
    paused: threading.Event = field(default_factory=threading.Event)
    resume: threading.Event = field(default_factory=threading.Event)
    log: list = field(default_factory=list)  # (status, first byte asked for, bytes sent)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        remote = self.server.remotes.get(self.path)
        if remote is None:
            self.answer(404)
            return
        start = self.start(remote)
        if remote.statuses:
            status = remote.statuses.pop(0)
        elif start and start >= len(remote.body):
            status = 416
        else:
            status = 206 if start else 200
        entry = [status, start, 0]
        remote.log.append(entry)
        if status not in (200, 206):
            self.answer(status)
            return
        self.answer(status, self.content_headers(remote, start))
        self.send_body(remote, start, entry)

    def start(self, remote: Remote) -> int:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        changed = condition not in (None, *remote.headers.values())
        if asked is None or not remote.ranges or (changed and remote.heeds_if_range):
            return 0
        return int(asked[1]) // remote.range_step * remote.range_step

    def content_headers(self, remote: Remote, start: int) -> dict:
        # After a successful If-Range, RFC 9110 lets a server leave the validators out.
        headers = {} if start and remote.heeds_if_range else dict(remote.headers)
        if remote.announces_length:
            headers["Content-Length"] = len(remote.body) - start
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(remote.body) - 1}/{len(remote.body)}"
        return headers

    def answer(self, status: int, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {"Content-Length": 0}).items():
            self.send_header(name, str(value))
        self.end_headers()

    def send_body(self, remote: Remote, start: int, entry: list) -> None:
        end = len(remote.body) if remote.truncated_at is None else remote.truncated_at
        if remote.drops:
            end = min(end, start + remote.drops.pop(0))
        with suppress(ConnectionError):  # the client was killed
            for first in range(start, end, CHUNK):
                if remote.pause_at is not None and first >= remote.pause_at:
                    remote.paused.set()
                    remote.resume.wait(20)
                chunk = remote.body[first : min(first + CHUNK, end)]
                entry[2] += len(chunk)  # before the client has them, and may be done
                self.wfile.write(chunk)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.remotes: dict[str, Remote] = {}

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def serve(self, path: str, remote: Remote) -> tuple[str, Remote]:
        self.remotes[path] = remote
        return self.url(path), remote


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(url: str, dest: Path, **options) -> Path:
    return fetch(url, dest, **{"wait_seconds": 0.001, "retries": 3, **options})


def md5(body: bytes) -> str:
    return "md5:" + hashlib.md5(body).hexdigest()


def beside(dest: Path) -> list[str]:
    return sorted(path.name for path in dest.parent.iterdir())


def test_whole_file_arrives_in_one_request(server, tmp_path, capfd):
    url, remote = server.serve("/file", Remote())
    dest = get(url, tmp_path / "new" / "file", size=len(BODY), checksum=md5(BODY))
    assert dest.read_bytes() == BODY
    assert remote.log == [[200, 0, len(BODY)]]
    assert beside(dest) == ["file"]
    assert capfd.readouterr() == ("", "")


def test_progress_goes_to_stderr_only_when_asked(server, tmp_path, capfd):
    url, _ = server.serve("/file", Remote())
    get(url, tmp_path / "file", progress=True)
    assert "file: 100%" in capfd.readouterr().err


@pytest.mark.parametrize(
    "known",
    [
        {},
        {"size": len(BODY)},
        {"checksum": md5(BODY)},
        {"checksum": "sha256:" + hashlib.sha256(BODY).hexdigest().upper()},
    ],
)
def test_a_complete_file_is_not_fetched_again(server, tmp_path, known):
    url, remote = server.serve("/file", Remote())
    for _ in range(2):
        get(url, tmp_path / "file", **known)
    assert len(remote.log) == 1


@pytest.mark.parametrize("known", [{"size": len(BODY)}, {"checksum": md5(BODY)}])
def test_an_existing_file_that_is_another_one_is_replaced(server, tmp_path, known):
    url, _ = server.serve("/file", Remote())
    (tmp_path / "file").write_bytes(b"something else")
    assert get(url, tmp_path / "file", **known).read_bytes() == BODY


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"v1"'},
        {"Last-Modified": "Tue, 01 Jul 2025 10:00:00 GMT"},
        {"ETag": 'W/"v1"', "Last-Modified": "Tue, 01 Jul 2025 10:00:00 GMT"},
    ],
)
def test_dropped_connections_cost_no_byte_twice(server, tmp_path, headers):
    url, remote = server.serve("/file", Remote(headers=headers, drops=[400_000, 300_000]))
    assert get(url, tmp_path / "file", checksum=md5(BODY)).read_bytes() == BODY
    assert [status for status, *_ in remote.log] == [200, 206, 206]
    # The server's own count: each answer began where the client's bytes ended.
    for (_, start, sent), (_, following, _) in zip(remote.log, remote.log[1:], strict=False):
        assert start + sent - BLOCK_BYTES <= following <= start + sent
    assert remote.log[-1][1] + remote.log[-1][2] == len(BODY)
    assert sum(sent for *_, sent in remote.log) <= len(BODY) + 2 * BLOCK_BYTES


def test_more_drops_than_retries_are_fine_while_bytes_arrive(server, tmp_path):
    url, remote = server.serve("/file", Remote(drops=[100_000] * 8))
    assert get(url, tmp_path / "file", retries=1).read_bytes() == BODY
    assert len(remote.log) > 8


def test_a_later_run_goes_on_from_the_part(server, tmp_path):
    url, remote = server.serve("/file", Remote(drops=[500_000, 0]))
    with pytest.raises(ConnectionError, match="run it again later"):
        get(url, tmp_path / "file", retries=0)
    kept = (tmp_path / "file.part").stat().st_size
    assert kept >= 500_000 - BLOCK_BYTES
    assert get(url, tmp_path / "file").read_bytes() == BODY
    assert remote.log[-1] == [206, kept, len(BODY) - kept]


def test_server_without_ranges_starts_from_zero(server, tmp_path):
    url, remote = server.serve("/file", Remote(ranges=False, drops=[400_000]))
    assert get(url, tmp_path / "file", checksum=md5(BODY)).read_bytes() == BODY
    assert [entry[:2] for entry in remote.log] == [[200, 0], [200, 0]]


def test_server_without_ranges_that_always_drops_is_given_up(server, tmp_path):
    url, remote = server.serve("/file", Remote(ranges=False, drops=[400_000] * 99))
    with pytest.raises(ConnectionError, match="4 attempts in a row"):
        get(url, tmp_path / "file")
    assert len(remote.log) <= 10


def test_without_a_validator_nothing_is_glued(server, tmp_path):
    url, remote = server.serve("/file", Remote(headers={}, drops=[400_000]))
    assert get(url, tmp_path / "file").read_bytes() == BODY
    assert [status for status, *_ in remote.log] == [200, 200]


def test_truncated_file_is_an_error_and_its_part_stays(server, tmp_path):
    url, remote = server.serve("/file", Remote(truncated_at=600_000))
    with pytest.raises(ConnectionError, match=rf"of {len(BODY)} bytes.*file\.part"):
        get(url, tmp_path / "file")
    kept = (tmp_path / "file.part").read_bytes()
    assert kept == BODY[: len(kept)]
    assert 600_000 - BLOCK_BYTES <= len(kept) <= 600_000
    assert not (tmp_path / "file").exists()
    remote.truncated_at = None  # the publisher repairs it
    assert get(url, tmp_path / "file").read_bytes() == BODY
    assert remote.log[-1] == [206, len(kept), len(BODY) - len(kept)]


def test_wrong_file_is_refused_and_removed(server, tmp_path):
    url, _ = server.serve("/file", Remote())
    expected = md5(b"published")
    with pytest.raises(ValueError, match=f"expected {expected}, got {md5(BODY)}.*Run it again"):
        get(url, tmp_path / "file", checksum=expected)
    assert beside(tmp_path / "file") == []


def test_wrong_length_is_refused_before_the_body(server, tmp_path):
    url, _ = server.serve("/file", Remote())
    with pytest.raises(ValueError, match=f"{len(BODY)} bytes, but 22000000000 are published"):
        get(url, tmp_path / "file", size=22_000_000_000)
    assert beside(tmp_path / "file") == []


def test_unannounced_length_is_checked_against_the_published_one(server, tmp_path):
    url, _ = server.serve("/file", Remote(announces_length=False))
    assert get(url, tmp_path / "a").read_bytes() == BODY
    assert get(url, tmp_path / "b", size=len(BODY)).read_bytes() == BODY
    with pytest.raises(ValueError, match=f"expected 1000 bytes, got {len(BODY)}"):
        get(url, tmp_path / "c", size=1000)


@pytest.mark.parametrize("heeds_if_range", [True, False])
@pytest.mark.parametrize("length", [len(BODY), 700_001])
def test_a_changed_file_starts_anew(server, tmp_path, heeds_if_range, length):
    url, remote = server.serve("/file", Remote(drops=[500_000, 0]))
    with pytest.raises(ConnectionError):
        get(url, tmp_path / "file", retries=0)
    remote.body, remote.headers = BODY[::-1][:length], {"ETag": '"v2"'}
    remote.heeds_if_range = heeds_if_range
    assert get(url, tmp_path / "file").read_bytes() == remote.body
    assert remote.log[-1] == [200, 0, length]


def test_an_answer_from_another_byte_is_not_glued(server, tmp_path):
    url, remote = server.serve("/file", Remote(drops=[500_000], range_step=100_001))
    assert get(url, tmp_path / "file").read_bytes() == BODY
    assert [status for status, *_ in remote.log] == [200, 206, 200]


def test_unsatisfiable_range_starts_anew(server, tmp_path):
    url, remote = server.serve("/file", Remote(drops=[500_000], statuses=[200, 416]))
    assert get(url, tmp_path / "file").read_bytes() == BODY
    assert [status for status, *_ in remote.log] == [200, 416, 200]


def test_killed_between_last_byte_and_rename(server, tmp_path):
    url, remote = server.serve("/file", Remote())
    (tmp_path / "file.part").write_bytes(BODY)
    (tmp_path / "file.part.json").write_text(json.dumps({"validator": '"v1"', "size": len(BODY)}))
    assert get(url, tmp_path / "file", checksum=md5(BODY)).read_bytes() == BODY
    assert remote.log == []


def test_a_part_with_a_broken_note_is_not_used(server, tmp_path):
    url, remote = server.serve("/file", Remote())
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    (tmp_path / "file.part.json").write_text('{"valid')
    assert get(url, tmp_path / "file").read_bytes() == BODY
    assert remote.log == [[200, 0, len(BODY)]]


def test_busy_server_is_asked_again(server, tmp_path):
    url, remote = server.serve("/file", Remote(statuses=[503, 429]))
    assert get(url, tmp_path / "file").read_bytes() == BODY
    assert [status for status, *_ in remote.log] == [503, 429, 200]


def test_refusals_name_address_and_status(server, tmp_path):
    with pytest.raises(FileNotFoundError, match="/absent: HTTP 404"):
        get(server.url("/absent"), tmp_path / "file")
    url, _ = server.serve("/file", Remote(statuses=[403]))
    with pytest.raises(ConnectionError, match="/file: HTTP 403 Forbidden"):
        get(url, tmp_path / "file")
    assert beside(tmp_path / "file") == []


def test_bad_arguments(tmp_path):
    for checksum in ("md5:abc", "crc:12345678", "baee34e5", "md5:" + "x" * 32):
        with pytest.raises(ValueError, match=f"checksum '{checksum}' is not"):
            fetch("http://127.0.0.1:9/file", tmp_path / "file", checksum=checksum)
    with pytest.raises(ValueError, match="is a folder"):
        fetch("http://127.0.0.1:9/file", tmp_path)
    with pytest.raises(ConnectionError, match="cannot be reached"):
        get("not an address", tmp_path / "file")


def test_nobody_listens(server, tmp_path):
    url = server.url("/file")
    server.socket.close()
    with pytest.raises(ConnectionError, match="cannot be reached"):
        get(url, tmp_path / "file")


def test_killed_run_is_continued_by_the_next(server, tmp_path):
    url, remote = server.serve("/file", Remote(pause_at=500_000))
    dest, part = tmp_path / "file", tmp_path / "file.part"
    code = f"from tfswa_lab.data.download import fetch; fetch({url!r}, {str(dest)!r})"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as child:
        assert remote.paused.wait(30)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and not (part.is_file() and part.stat().st_size):
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    remote.resume.set()
    kept = part.stat().st_size
    assert kept > 0
    assert not dest.exists()
    assert get(url, dest, checksum=md5(BODY)).read_bytes() == BODY
    assert remote.log[-1] == [206, kept, len(BODY) - kept]
    assert beside(dest) == ["file"]


def zip_of(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def test_zip_is_unpacked_whole(tmp_path):
    archive = zip_of(tmp_path / "a.zip", {"train/a/x.wav": b"x", "test/b.txt": BODY})
    dest = extract_zip(archive, tmp_path / "deep" / "data", required=("train", "test"))
    assert (dest / "train/a/x.wav").read_bytes() == b"x"
    assert (dest / "test/b.txt").read_bytes() == BODY
    assert beside(dest) == ["data"]


@pytest.mark.parametrize("name", ["../evil", "train/../../evil", "/evil", "..\\evil"])
def test_zip_slip_is_refused(tmp_path, name):
    outside = tmp_path / "in" / "side"
    archive = zip_of(tmp_path / "a.zip", {"good": b"x", name: b"x"})
    with pytest.raises(ValueError, match="would land outside"):
        extract_zip(archive, outside)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.zip", "in"]


def damage(archive: Path, how: str) -> None:
    content = bytearray(archive.read_bytes())
    if how == "a web page":
        content = b"<html>Not found</html>"
    elif how == "cut short":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 0xFF
    archive.write_bytes(content)


@pytest.mark.parametrize("how", ["a web page", "cut short", "one byte flipped"])
def test_damaged_zip_leaves_nothing(tmp_path, how):
    archive = zip_of(tmp_path / "a.zip", {"train/x": BODY})
    damage(archive, how)
    with pytest.raises(ValueError, match=r"a\.zip is not a zip archive or is damaged"):
        extract_zip(archive, tmp_path / "data")
    assert beside(archive) == ["a.zip"]


def test_zip_of_something_else_is_refused(tmp_path):
    archive = zip_of(tmp_path / "a.zip", {"musdb/train/x": b"x"})
    with pytest.raises(ValueError, match=r"no \['test', 'train'\] at its top"):
        extract_zip(archive, tmp_path / "data", required=("train", "test"))


def test_whole_folder_never_touches_what_is_there(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / ".data.part").mkdir()
    (tmp_path / ".data.part" / "left by a killed run").touch()
    with whole_folder(tmp_path / "data") as folder:
        (folder / "file").touch()
    assert beside(tmp_path / "data") == ["data"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["file"]
    with pytest.raises(FileExistsError, match="not empty"), whole_folder(tmp_path / "data"):
        pass
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "new"):
        raise KeyboardInterrupt
    assert beside(tmp_path / "data") == ["data"]


def get_musdb(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "data_scripts" / "get_musdb.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_get_musdb_sample(server, tmp_path):
    tracks = {f"{split}/A - B.stem.mp4": split.encode() for split in ("train", "test")}
    archive = zip_of(tmp_path / "a.zip", tracks).read_bytes()
    url, remote = server.serve("/MUSDB18-7-STEMS.zip", Remote(archive))
    dest = tmp_path / "out" / "musdb7"
    run = get_musdb("7s", dest, "--url", url)
    assert run.returncode == 0, run.stderr
    assert "academic use only" in run.stdout
    assert (dest / "test" / "A - B.stem.mp4").read_bytes() == b"test"
    assert beside(dest) == ["musdb7"]
    assert "nothing to do" in get_musdb("7s", dest, "--url", url).stdout
    assert len(remote.log) == 1


def zenodo_record(link: str, body: bytes) -> Remote:
    entry = {"key": "musdb18hq.zip", "size": len(body), "checksum": md5(body)}
    record = {"id": 3338373, "files": [{"key": "README"}, entry | {"links": {"self": link}}]}
    return Remote(json.dumps(record).encode())


def test_get_musdb_hq(server, tmp_path):
    stems = ("mixture", "vocals", "drums", "bass", "other")
    tracks = {f"{split}/A - B/{s}.wav": b"RIFF" for split in ("train", "test") for s in stems}
    archive = zip_of(tmp_path / "a.zip", tracks).read_bytes()
    link, remote = server.serve("/files/musdb18hq.zip/content", Remote(archive))
    record, _ = server.serve("/records/3338373", zenodo_record(link, archive))
    mirror, _ = server.serve("/mirror.zip", Remote(archive[:-1] + b"!"))

    run = get_musdb("hq", tmp_path / "hq", "--record-url", record, "--url", mirror)
    assert run.returncode == 1
    assert f"expected {md5(archive)}" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "hq").exists()

    run = get_musdb("hq", tmp_path / "hq", "--record-url", record, "--keep-archive")
    assert run.returncode == 0, run.stderr
    assert len(list((tmp_path / "hq").glob("*/A - B/*.wav"))) == 10
    assert (tmp_path / "hq.zip").read_bytes() == archive
    assert len(remote.log) == 1


def test_get_musdb_hq_with_a_strange_record(server, tmp_path):
    record, _ = server.serve("/records/1", Remote(b"<html>"))
    run = get_musdb("hq", tmp_path / "hq", "--record-url", record)
    assert run.returncode == 1
    assert "is not a Zenodo record that lists musdb18hq.zip" in run.stderr
