"""Find the songs of a MUSDB18-shaped tree, and refuse broken ones before training starts.

    root/{train,test}/<Artist - Title>/{mixture,vocals,drums,bass,other}.wav     or
    root/{train,test}/<Artist - Title>.stem.mp4

musdb lists the tracks and knows the validation split. WAV files are read by seeking here, because
musdb starts ffprobe and ffmpeg for each file that it reads.

Axis letters: `s` samples.

Notebook: 00_start_here
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from tfswa_lab import audio

Header = tuple[int, int, int]  # sample rate in Hz, channels, samples

STREAMS = ("mixture", "drums", "bass", "other", "vocals")  # the order inside a .stem.mp4
SHAPE = "root/{train,test}/<track>/{mixture,vocals,drums,bass,other}.wav"


@dataclass(frozen=True)
class Track:
    """One song: its path, its sample rate in Hz and its length in samples."""

    name: str
    path: Path
    rate: int
    samples: int

    def length(self, rate: int) -> int:
        """Number of samples after resampling to `rate`."""
        return math.ceil(self.samples * rate / self.rate)

    def read(self, sources: Sequence[str], start: int, frames: int, rate: int) -> dict[str, Tensor]:
        """Read a segment of some sources at any sample rate.

        It equals the same segment of the whole song after resampling: some context is read on both
        sides, and the first sample read has a whole number at both rates.

        Args:
            sources: names among `mixture` and the four stems.
            start: first sample, counted at `rate`.
            frames: number of samples at `rate`.
            rate: sample rate of the result in Hz.

        Returns:
            Waveform `(2, s)` of each source, float32.
        """
        if rate == self.rate:
            return self._decode(sources, start, frames)
        # `step_in` samples of the file last as long as `step_out` samples of the result.
        divisor = math.gcd(rate, self.rate)
        step_in, step_out = self.rate // divisor, rate // divisor
        # The filter of `audio.resample` reaches 6 zero crossings of the lower rate to each side.
        context = 1 + math.ceil(7 / min(step_in, step_out))
        first = max(0, start // step_out - context)
        last = (start + frames) // step_out + 1 + context
        begin, end = first * step_in, min(last * step_in, self.samples)
        offset = start - first * step_out
        waveforms = self._decode(sources, begin, end - begin)
        return {
            source: audio.resample(waveform, self.rate, rate)[:, offset : offset + frames]
            for source, waveform in waveforms.items()
        }

    def _decode(self, sources: Sequence[str], start: int, frames: int) -> dict[str, Tensor]:
        raise NotImplementedError


class WavTrack(Track):
    """A folder with one WAV file for each source: reading a segment takes one seek."""

    @classmethod
    def open(cls, folder: Path, sources: Sequence[str]) -> WavTrack:
        """Check that the headers of the sources agree, and keep their rate and length."""
        paths = [folder / f"{source}.wav" for source in sources]
        rate, samples = _agree({str(path): read_header(path) for path in paths})
        return cls(folder.name, folder, rate, samples)

    def _decode(self, sources: Sequence[str], start: int, frames: int) -> dict[str, Tensor]:
        waveforms = {}
        for source in sources:
            path = self.path / f"{source}.wav"
            waveform, _ = audio.read(path, start, frames)
            waveforms[source] = _check_end(waveform, path, start, frames)
        return waveforms


class StemTrack(Track):
    """One `.stem.mp4`: slow, because ffmpeg decodes it from its beginning up to the segment."""

    @classmethod
    def open(cls, path: Path) -> StemTrack:
        """Check that the headers of all five streams agree, and keep their rate and length."""
        rate, samples = _agree(read_mp4_headers(path))
        return cls(path.name.removesuffix(".stem.mp4"), path, rate, samples)

    def _decode(self, sources: Sequence[str], start: int, frames: int) -> dict[str, Tensor]:
        audio.ensure_ffmpeg()
        import stempeg

        # 16 bit as in musdb, so that both read the same numbers. ffmpeg gets the times rounded to
        # microseconds, which it rounds to the nearest sample: the right one.
        waveforms, _ = stempeg.read_stems(
            str(self.path),
            start=start / self.rate,
            duration=frames / self.rate,
            stem_id=[STREAMS.index(source) for source in sources],
            always_3d=True,
            dtype=np.float32,
            ffmpeg_format="s16le",
            sample_rate=self.rate,
        )
        return {
            source: _check_end(torch.from_numpy(samples.T.copy()), self.path, start, frames)
            for source, samples in zip(sources, waveforms, strict=True)
        }


def _check_end(waveform: Tensor, path: Path, start: int, frames: int) -> Tensor:
    if waveform.shape[-1] < frames:
        raise ValueError(
            f"{path} ends at sample {start + waveform.shape[-1]}, {start + frames} were expected "
            "from its header; the file is damaged or has changed: copy or download it again"
        )
    return waveform


def find_tracks(
    root: str | Path,
    split: str,
    sources: Sequence[str],
    valid_fraction: float = 0.2,
    seed: int = 0,
) -> list[Track]:
    """List the songs of a split and check the headers of the sources that will be read.

    `valid` holds those of musdb's 14 validation tracks that are in the train folder. Where there
    are none, it is a seeded draw of `valid_fraction` of that folder. `train` is always the rest.
    Folders inside a track and hidden ones are no tracks.

    Args:
        root: folder that holds `train` and `test`.
        split: `train`, `valid` or `test`.
        sources: what will be read, of `mixture` and the four stems.
        valid_fraction: share of the train folder, 0 for none; otherwise at least one track.
        seed: seed of that draw.

    Raises:
        FileNotFoundError: no such folder, an empty one, or a missing source file.
        ValueError: the split is empty, or a header is broken or disagrees with another one.
    """
    folder = _subset_folder(Path(root).expanduser(), "test" if split == "test" else "train")
    is_wav = _check_mixtures(folder)
    names, official = _list_with_musdb(folder, is_wav)
    if split != "test":
        valid = _validation_names(names, official, valid_fraction, seed)
        names = [name for name in names if (name in valid) == (split == "valid")]
    if not names:
        raise ValueError(
            f"no track of {folder} is left for split={split!r} with "
            f"valid_fraction={valid_fraction}; expected {SHAPE}"
        )
    if is_wav:
        return [WavTrack.open(folder / name, sources) for name in names]
    return [StemTrack.open(folder / f"{name}.stem.mp4") for name in names]


def _subset_folder(root: Path, subset: str) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected {SHAPE}")
    folder = root / subset
    if (root / "mixture.wav").is_file():
        raise ValueError(f"{root} is a single track; pass the folder above train/ and test/")
    if not folder.is_dir():
        if any(root.glob("*/mixture.wav")) or any(root.glob("*.stem.mp4")):
            raise FileNotFoundError(
                f"{root} holds tracks but no {subset}/ folder; if it is {subset}/ itself, pass its "
                f"parent {root.resolve().parent}, otherwise move the tracks into {folder}"
            )
        raise FileNotFoundError(f"{root} has no {subset}/ folder; expected {SHAPE}")
    if not any(path for path in folder.iterdir() if not path.name.startswith(".")):
        raise FileNotFoundError(f"{folder} is empty; expected {SHAPE}")
    return folder


def _check_mixtures(folder: Path) -> bool:
    """Whether the tracks are WAV folders; musdb fails on a broken mixture without naming it."""
    stem_files = sorted(folder.glob("[!.]*.stem.mp4"))
    mixtures = sorted(folder.glob("[!.]*/mixture.wav"))
    if stem_files and mixtures:
        raise ValueError(f"{folder} holds .stem.mp4 files and WAV folders; move one kind elsewhere")
    for path in stem_files:
        read_mp4_headers(path)
    for path in mixtures:
        read_header(path)
    return not stem_files


def _list_with_musdb(folder: Path, is_wav: bool) -> tuple[list[str], set[str]]:
    """Names of the tracks, and of musdb's validation tracks."""
    audio.ensure_ffmpeg()
    import musdb

    database = musdb.DB(root=str(folder.parent), is_wav=is_wav, subsets=[folder.name])
    # musdb also lists folders inside of tracks, as if they were tracks.
    names = [
        track.name
        for track in database
        if not track.name.startswith(".") and (not is_wav or (folder / track.name).is_dir())
    ]
    return names, set(database.setup["validation_tracks"])


def _validation_names(names: list[str], official: set[str], fraction: float, seed: int) -> set[str]:
    present = official.intersection(names)
    if present or fraction == 0 or len(names) < 2:
        return present
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    return set(np.random.default_rng(seed).permutation(sorted(names))[:count].tolist())


def read_header(path: Path) -> Header:
    """Sample rate, channels and samples of an audio file that is as long as its header says.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not audio, empty, or truncated.
    """
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.wav"))
        raise FileNotFoundError(
            f"{path} is missing (the folder holds {there or 'no WAV file'}); "
            "add the file or correct its name"
        )
    try:
        info = soundfile.info(path)
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"{path} is not readable as audio ({error}); copy or download it again"
        ) from error
    missing = _expected_bytes(path) - path.stat().st_size
    if missing > 0:
        raise ValueError(
            f"{path} is truncated: {missing} bytes shorter than its header says; "
            "copy or download it again"
        )
    if info.frames == 0:
        raise ValueError(f"{path} holds no samples; export it again")
    return info.samplerate, info.channels, info.frames


def _expected_bytes(path: Path) -> int:
    """File size up to the end of the RIFF `data` chunk by the headers; 0 if they do not say.

    libsndfile reads a truncated file as a shorter one without an error, so this walks the chunks.
    """
    with path.open("rb") as file:
        form, _, kind = struct.unpack("<4sI4s", file.read(12))
        if (form, kind) != (b"RIFF", b"WAVE"):
            return 0
        while len(chunk := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", chunk)
            if name == b"data":
                # Programs that write into a pipe cannot know the size, and write ones.
                return 0 if size == 0xFFFFFFFF else file.tell() + size
            file.seek(size + size % 2, 1)
    return 0


def read_mp4_headers(path: Path) -> dict[str, Header]:
    """Sample rate, channels and samples of each of the five streams of a `.stem.mp4`.

    Raises:
        ValueError: it is not readable, or does not hold five audio streams.
    """
    audio.ensure_ffmpeg()
    import ffmpeg
    import stempeg

    try:
        info = stempeg.Info(str(path))
    except ffmpeg.Error as error:
        reason = error.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ValueError(
            f"{path} is not readable by ffmpeg {reason}; copy or download it again"
        ) from error
    if info.nb_audio_streams != len(STREAMS):
        raise ValueError(
            f"{path} holds {info.nb_audio_streams} audio streams instead of {len(STREAMS)} "
            f"({', '.join(STREAMS)}); write it again with stempeg"
        )
    headers = {}
    for stream, facts in zip(STREAMS, info.audio_streams, strict=True):
        rate = int(facts["sample_rate"])
        samples = round(float(facts.get("duration", 0)) * rate)
        if samples == 0:
            raise ValueError(f"{path} [{stream}] holds no samples; download it again")
        headers[f"{path} [{stream}]"] = (rate, facts["channels"], samples)
    return headers


def _agree(headers: dict[str, Header]) -> tuple[int, int]:
    """The sample rate and length of a track, whose sources must agree and be stereo."""
    first, (rate, _, samples) = next(iter(headers.items()))
    for source, (other_rate, channels, other_samples) in headers.items():
        if channels != 2:
            raise ValueError(
                f"{source} has {channels} channel(s), expected 2; convert it to stereo"
            )
        if other_rate != rate:
            raise ValueError(
                f"{source} has {other_rate} Hz but {first} has {rate} Hz; resample one of them"
            )
        if other_samples != samples:
            raise ValueError(
                f"{source} has {other_samples} samples but {first} has {samples}; "
                "cut or pad them to one length"
            )
    return rate, samples
