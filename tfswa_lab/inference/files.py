"""Separate a sound file of any length within the memory that a few segments take.

Axis letters: `n` stems, `c` audio channels, `s` samples.

Notebook: 08_evaluation
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import soundfile
import torch
from torch import Tensor

from tfswa_lab import audio
from tfswa_lab.decode import TruncatedError, open_sound
from tfswa_lab.durable import hidden_files, parts_of, refuse_existing
from tfswa_lab.inference.blocks import read_blocks, resample_blocks, write_blocks
from tfswa_lab.inference.separate import Progress, Segmentation, separate_stream
from tfswa_lab.models.separator import Separator

SUBTYPES = {
    "wav": {"16": "PCM_16", "24": "PCM_24", "32f": "FLOAT"},
    "flac": {"16": "PCM_16", "24": "PCM_24"},
    "mp3": {None: "MPEG_LAYER_III"},
    "ogg": {None: "VORBIS"},
}
OGG_RATE = 200_000  # Hz; above it, libsndfile ends the whole process
CLIPS = ("rescale", "clamp", "none")


@dataclass(frozen=True)
class Reading:
    """The part of a song that is separated, and whether a damaged song is.

    Args:
        start: seconds into the song.
        duration: seconds, None to the end.
        allow_truncated: separate what there is of a song that ends too early.

    Raises:
        ValueError: a time makes no sense.
    """

    start: float = 0.0
    duration: float | None = None
    allow_truncated: bool = False

    def __post_init__(self):
        if not (audio.is_number(self.start) and 0 <= self.start <= audio.LONGEST):
            raise ValueError(f"start={self.start!r} must be seconds into the song, 0 or more")
        if self.duration is not None:
            audio.check_seconds("duration", self.duration)


@dataclass(frozen=True)
class Writing:
    """Which stems are written, and how.

    Args:
        format: wav, flac, mp3 or ogg.
        bits: "16", "24" or, in a WAV file, "32f" for floats; None for 16 where there is a choice.
        clip: what is done with stems beyond full scale. "rescale" gives all stems of a song one
            gain, "clamp" cuts the peaks off, "none" refuses what the format cannot hold. None is
            "none" for floats and "rescale" for all others.
        stems: names of the stems to write, None for all.
        residual: also write the song without these stems, as `no_STEM` or `residual`.
        pattern: of the files' paths below the output folder; `{stem}` and `{ext}` are filled in.
        overwrite: whether files that are there are replaced.

    Raises:
        ValueError: there is no such choice.
    """

    format: str = "wav"
    bits: str | None = None
    clip: str | None = None
    stems: Sequence[str] | None = None
    residual: bool = False
    pattern: str = "{stem}.{ext}"
    overwrite: bool = False

    def __post_init__(self):
        if self.format not in SUBTYPES:
            raise ValueError(f"format={self.format!r} is unknown; use {', '.join(SUBTYPES)}")
        known = SUBTYPES[self.format]
        if self.bits is None and None not in known:
            object.__setattr__(self, "bits", "16")
        if self.bits not in known:
            choice = ", ".join(filter(None, known)) or "no number of bits"
            raise ValueError(f"bits={self.bits!r}: {self.format} files take {choice}")
        if self.clip is None:
            object.__setattr__(self, "clip", "none" if self.bits == "32f" else "rescale")
        if self.clip not in CLIPS:
            raise ValueError(f"clip={self.clip!r} is unknown; use {', '.join(CLIPS)}")
        if self.stems is not None and not self.stems:
            raise ValueError("stems is empty; leave it out for all")
        if isinstance(self.stems, str):
            raise ValueError(f"stems={self.stems!r} is a string; write [{self.stems!r}]")

    @property
    def subtype(self) -> str:
        """libsndfile's name for the samples."""
        return SUBTYPES[self.format][self.bits]

    def chosen(self, stems: Sequence[str]) -> tuple[str, ...]:
        """Those of a separator's stems that are wanted, each once."""
        return tuple(stems) if self.stems is None else tuple(dict.fromkeys(self.stems))

    def names(self, stems: Sequence[str]) -> tuple[str, ...]:
        """Names of the files that are written of a separator with these stems.

        Raises:
            ValueError: the separator has no such stem.

        >>> Writing(stems=["vocals"], residual=True).names(("vocals", "drums", "bass", "other"))
        ('vocals', 'no_vocals')
        """
        chosen = self.chosen(stems)
        for stem in chosen:
            if stem not in stems:
                raise ValueError(f"the model has no stem {stem!r}; it has {', '.join(stems)}")
        rest = f"no_{chosen[0]}" if len(chosen) == 1 else "residual"
        return (*chosen, rest) if self.residual else chosen

    def paths(self, folder: Path, stems: Sequence[str]) -> dict[str, Path]:
        """Stem → path of the files that are written of a separator with these stems.

        >>> writing = Writing("flac", pattern="song/{stem}.{ext}")
        >>> writing.paths(Path("out"), ["vocals"])["vocals"].as_posix()
        'out/song/vocals.flac'
        """
        names = self.names(stems)
        return {x: folder / self.pattern.format(stem=x, ext=self.format) for x in names}

    def check_rate(self, rate: int) -> None:
        """Refuse a sample rate that the format has not, before the work.

        Raises:
            ValueError: names both.
        """
        try:
            fits = self.format != "ogg" or rate <= OGG_RATE
            if fits:
                form = self.format.upper()
                soundfile.SoundFile(io.BytesIO(), "w", rate, 2, self.subtype, format=form).close()
        except soundfile.LibsndfileError:
            fits = False
        if not fits:
            raise ValueError(
                f"{self.format} files cannot hold {rate} Hz; write wav or flac, or resample "
                "the song first"
            )


class SeparatedFile(NamedTuple):
    """What `separate_file` wrote.

    `files` is stem → path, `gain` what all stems were multiplied by so that none clips, `seconds`
    the length of the stems, and `notes` what a reader should know of the song.
    """

    files: dict[str, Path]
    gain: float
    seconds: float
    notes: tuple[str, ...]


def separate_file(
    separator: Separator,
    song: str | Path,
    out: str | Path,
    segmentation: Segmentation = Segmentation(),
    reading: Reading = Reading(),
    writing: Writing = Writing(),
    progress: Progress = iter,
) -> SeparatedFile:
    """Separate a file of any length and sample rate into one file for each stem.

    The song is read twice, first to see that all of it can be decoded. The stems are written as
    32-bit floats and then as what is wanted: whether they would clip there is known at the end
    only. All files appear at the end, or none does.

    Args:
        separator: in evaluation mode; the song is resampled to its rate, and the stems back.
        song: any file that libsndfile or ffmpeg reads; ffmpeg mixes more than two channels down.
        out: a folder for the stems, made if absent.
        segmentation: how the song is cut.
        reading: which part of the song.
        writing: which stems, and how.
        progress: wraps the list of segment starts, e.g. `tqdm`.

    Raises:
        FileExistsError: a file is there, and `writing` does not overwrite.
        OSError: there is no such song, or the stems cannot be written.
        ValueError: the song is truncated, damaged or shorter than `reading` wants; or a number
            makes no sense.
        torch.OutOfMemoryError: there is no memory even for one segment.
    """
    song, out = Path(song), Path(out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; name a folder for the stems")
    paths = writing.paths(out, separator.stems)
    if not writing.overwrite:
        refuse_existing(paths.values())
    excerpt = _check_song(song, reading)
    writing.check_rate(excerpt.rate)
    stems = _stems_of(separator, song, excerpt, segmentation, writing, progress)
    out.mkdir(parents=True, exist_ok=True)
    shape = separator.audio_channels, excerpt.length
    with parts_of(list(paths.values()), writing.overwrite, out) as parts:
        gain = _write(parts, stems, excerpt.rate, shape, writing)
    return SeparatedFile(paths, gain, excerpt.length / excerpt.rate, excerpt.notes)


class Excerpt(NamedTuple):
    """The samples of a song that are separated, from `start` on, and what is said of the song."""

    rate: int
    start: int
    length: int
    notes: tuple[str, ...]


def _check_song(song: Path, reading: Reading) -> Excerpt:
    """Decode the whole song, so that damage is found before the work."""
    there = 0
    with open_sound(song, channels=2) as sound:
        rate, notes = sound.rate, tuple(filter(None, [sound.note]))
        try:
            for block in sound.blocks():
                audio.check_finite(block, song)
                there += block.shape[-1]
        except TruncatedError as error:
            if not (reading.allow_truncated and there):
                raise ValueError(
                    f"{error}, or separate what is there: --allow-truncated (allow_truncated=True)"
                ) from error
            notes += (f"{error}",)
    if not there:
        raise ValueError(f"{song} holds no samples; export it again")
    start = round(reading.start * rate)
    length = max(0, there - start)
    if reading.duration is not None:
        length = min(length, round(reading.duration * rate))
    if not length:
        raise ValueError(f"{song} ends at {there / rate:.2f} s, before start={reading.start} s")
    return Excerpt(rate, start, length, notes)


def _stems_of(
    separator: Separator,
    song: Path,
    excerpt: Excerpt,
    segmentation: Segmentation,
    writing: Writing,
    progress: Progress,
) -> Iterator[Tensor]:
    """Blocks `(n, c, s)` of the files to write, at the song's rate."""
    own, channels = separator.sample_rate, separator.audio_channels
    mixture = resample_blocks(_mixture(song, excerpt, channels), excerpt.rate, own)
    samples = -(-excerpt.length * own // excerpt.rate)
    estimates = separate_stream(separator, mixture, samples, segmentation, progress)
    rows = [separator.stems.index(stem) for stem in writing.chosen(separator.stems)]
    chosen = (block[rows] for block in estimates)
    stems = resample_blocks(chosen, own, excerpt.rate)
    return _with_residual(stems, _mixture(song, excerpt, channels)) if writing.residual else stems


def _mixture(song: Path, excerpt: Excerpt, channels: int) -> Iterator[Tensor]:
    """The part as blocks `(c, s)` in mono or stereo."""
    missing = excerpt.length
    with suppress(TruncatedError):  # which `_check_song` has found, and was allowed
        for block in read_blocks(song, start=excerpt.start, channels=2):
            block = block[:, :missing]
            missing -= block.shape[-1]
            yield audio.to_channels(block, channels)
            if not missing:
                return


def _with_residual(stems: Iterable[Tensor], mixture: Iterator[Tensor]) -> Iterator[Tensor]:
    """Blocks `(n, c, s)` with one more row, what is left of the mixture's blocks `(c, s)`.

    >>> stems = torch.ones(1, 1, 5).split(3, dim=-1)
    >>> blocks = _with_residual(stems, iter(torch.full((1, 5), 3.0).split(2, dim=-1)))
    >>> [block[:, 0].tolist() for block in blocks]
    [[[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]], [[1.0, 1.0], [2.0, 2.0]]]
    """
    held = next(mixture)
    for block in stems:
        samples = block.shape[-1]
        while held.shape[-1] < samples and (more := next(mixture, None)) is not None:
            held = torch.cat([held, more], dim=-1)
        block = block[..., : held.shape[-1]]  # resampling there and back may add a sample
        rest = held[:, :samples] - block.sum(0)
        held = held[:, samples:]
        yield torch.cat([block, rest[None]])


def _write(
    files: Sequence[Path],
    stems: Iterable[Tensor],
    rate: int,
    shape: tuple[int, int],
    writing: Writing,
) -> float:
    """Write floats first, then the files that are wanted; returns the gain of all stems."""
    with hidden_files([file.parent for file in files], files) as floats:
        peak = write_blocks(floats, stems, rate, shape, "FLOAT")
        if writing.clip == "none" and peak > 1 and writing.bits in ("16", "24"):
            raise ValueError(
                f"a stem reaches {peak:.3f}, and {writing.bits} bits end at 1: use clip rescale or "
                "clamp, or 32f bits"
            )
        gain = 1 / max(1.0, peak) if writing.clip == "rescale" else 1.0
        limit = 1.0 if writing.clip == "clamp" else torch.inf
        for source, target in zip(floats, files, strict=True):
            scaled = ((gain * block[None]).clamp(-limit, limit) for block in read_blocks(source))
            form = writing.format.upper()
            write_blocks([target], scaled, rate, shape, writing.subtype, form)
            source.unlink()  # the next one may need its space
    return gain
