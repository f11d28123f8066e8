"""Find the songs of a MUSDB18-shaped tree, and refuse broken ones before training starts.

    root/{train,test}/<Artist - Title>/{mixture,vocals,drums,bass,other}.wav     or
    root/{train,test}/<Artist - Title>.stem.mp4

Folders may hold FLAC or any other kind of sound file instead of WAV. musdb knows the validation
split. Files are read by seeking here, because musdb knows no FLAC, and starts ffprobe and ffmpeg
for each file that it reads.

Axis letters: `s` samples.

Notebook: 00_start_here
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tfswa_lab import audio
from tfswa_lab.decode import Header, is_sound_file, read_header

STREAMS = ("mixture", "drums", "bass", "other", "vocals")  # the order inside a .stem.mp4
SHAPE = "root/{train,test}/<track>/{mixture,vocals,drums,bass,other}.wav (or .flac)"


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
        context = 1 + math.ceil(audio.REACH / min(step_in, step_out))
        first = max(0, start // step_out - context)
        last = (start + frames) // step_out + 1 + context
        begin, end = first * step_in, min(last * step_in, self.samples)
        offset = start - first * step_out
        waveforms = self._decode(sources, begin, end - begin)
        return {
            source: audio.resample(waveform, self.rate, rate)[:, offset : offset + frames]
            for source, waveform in waveforms.items()
        }

    def files(self) -> list[Path]:
        """The files that it is read from."""
        return [self.path]

    def adding(self, sources: Sequence[str]) -> Track:
        """The same track with more sources to read, after a check of their headers.

        Raises:
            FileNotFoundError: there is no file of a source.
            ValueError: there are two, or a header is broken or disagrees with another one.
        """
        return self

    def _decode(self, sources: Sequence[str], start: int, frames: int) -> dict[str, Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class FolderTrack(Track):
    """A folder with one file for each source: reading a segment takes one seek.

    Args:
        paths: source → its file.
    """

    paths: dict[str, Path]

    @classmethod
    def open(cls, folder: Path, sources: Sequence[str]) -> FolderTrack:
        """Find the files, check that their headers agree, and keep their rate and length.

        Raises:
            FileNotFoundError: there is no file of a source.
            ValueError: there are two, or a header is broken or disagrees with another one.
        """
        paths = {source: audio_file(folder, source) for source in dict.fromkeys(sources)}
        rate, samples = _agree({str(path): read_header(path) for path in paths.values()})
        return cls(folder.name, folder, rate, samples, paths)

    def files(self) -> list[Path]:
        """One of each source."""
        return list(self.paths.values())

    def adding(self, sources: Sequence[str]) -> FolderTrack:
        """Open again with more sources."""
        return FolderTrack.open(self.path, [*self.paths, *sources])

    def _decode(self, sources: Sequence[str], start: int, frames: int) -> dict[str, Tensor]:
        waveforms = {}
        for source in sources:
            waveform, _ = audio.read(self.paths[source], start, frames)
            waveforms[source] = _check_end(waveform, self.paths[source], start, frames)
        return waveforms


def audio_files(folder: Path) -> list[Path]:
    """All sound files in a folder, sorted by name; none where there is no such folder."""
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in there if is_sound_file(path)]


def audio_file(folder: Path, name: str) -> Path:
    """The only sound file of this name in a folder, whatever its kind.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several, such as vocals.wav and vocals.flac.
    """
    there = audio_files(folder)
    found = [path for path in there if path.stem == name]
    if not found:
        suffix = there[0].suffix if there else ".wav"
        raise FileNotFoundError(
            f"{folder / name}{suffix} is missing (the folder holds "
            f"{[path.name for path in there] or 'no sound file'}); add the file or correct its name"
        )
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds {' and '.join(path.name for path in found)}; keep one of them"
        )
    return found[0]


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
    places = _list_tracks(folder)
    names = list(places)
    if split != "test":
        valid = _validation_names(names, official_validation(), valid_fraction, seed)
        names = [name for name in names if (name in valid) == (split == "valid")]
    if not names:
        raise ValueError(
            f"no track of {folder} is left for split={split!r} with "
            f"valid_fraction={valid_fraction}; expected {SHAPE}"
        )
    return [_open(places[name], sources) for name in names]


def _subset_folder(root: Path, subset: str) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected {SHAPE}")
    folder = root / subset
    if _has_mixture(root):
        raise ValueError(f"{root} is a single track; pass the folder above train/ and test/")
    if not folder.is_dir():
        if any(map(_has_mixture, root.iterdir())) or any(root.glob("*.stem.mp4")):
            raise FileNotFoundError(
                f"{root} holds tracks but no {subset}/ folder; if it is {subset}/ itself, pass its "
                f"parent {root.resolve().parent}, otherwise move the tracks into {folder}"
            )
        raise FileNotFoundError(f"{root} has no {subset}/ folder; expected {SHAPE}")
    if not any(path for path in folder.iterdir() if not path.name.startswith(".")):
        raise FileNotFoundError(f"{folder} is empty; expected {SHAPE}")
    return folder


def _has_mixture(folder: Path) -> bool:
    return any(path.stem == "mixture" for path in audio_files(folder))


def _list_tracks(folder: Path) -> dict[str, Path]:
    """Name → path of each track of a subset: all `.stem.mp4` files, or all folders."""
    stem_files = sorted(folder.glob("[!.]*.stem.mp4"))
    folders = [path for path in sorted(folder.glob("[!.]*")) if path.is_dir()]
    if stem_files and any(map(_has_mixture, folders)):
        raise ValueError(
            f"{folder} holds .stem.mp4 files and folders of stems; move one kind elsewhere"
        )
    return {path.name.removesuffix(".stem.mp4"): path for path in stem_files or folders}


def _open(path: Path, sources: Sequence[str]) -> Track:
    return FolderTrack.open(path, sources) if path.is_dir() else StemTrack.open(path)


def official_validation() -> set[str]:
    """Names of the 14 tracks that musdb keeps for validation."""
    audio.ensure_ffmpeg()
    import musdb

    return set(musdb.DB(root="", subsets=[]).setup["validation_tracks"])


def _validation_names(names: list[str], official: set[str], fraction: float, seed: int) -> set[str]:
    present = official.intersection(names)
    if present or fraction == 0 or len(names) < 2:
        return present
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    return set(np.random.default_rng(seed).permutation(sorted(names))[:count].tolist())


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
        headers[f"{path} [{stream}]"] = Header(rate, facts["channels"], samples)
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
