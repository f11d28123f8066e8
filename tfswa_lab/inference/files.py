"""Separate a sound file of any length within the memory that a few segments take.

Axis letters: `n` stems, `c` audio channels, `s` samples.

Notebook: 08_evaluation
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tfswa_lab import audio
from tfswa_lab.durable import parts_of
from tfswa_lab.inference.blocks import read_blocks, resample_blocks, write_blocks
from tfswa_lab.inference.separate import Progress, Segmentation, separate_stream
from tfswa_lab.models.separator import Separator


class SeparatedFile(NamedTuple):
    """What `separate_file` wrote: a file per stem, and the gain that was applied to all of them."""

    files: list[Path]
    gain: float


def separate_file(
    separator: Separator,
    song: str | Path,
    out: str | Path,
    segmentation: Segmentation = Segmentation(),
    progress: Progress = iter,
    as_float: bool = False,
) -> SeparatedFile:
    """Separate a file of any length and sample rate into `out/SONG_STEM.wav`, one for each stem.

    The song is read twice, first to see that all of it can be decoded. The stems are written as
    32-bit floats and then, unless these are wanted, as 16-bit integers: whether they would clip
    there is known at the end only. All files appear at the end, or none does.

    Args:
        separator: in evaluation mode; the song is resampled to its rate, and the stems back.
        song: a WAV, FLAC, Ogg or MP3 file.
        out: a folder, made if absent.
        segmentation: how the song is cut.
        progress: wraps the list of segment starts, e.g. `tqdm`.
        as_float: 32-bit stems; these cannot clip, so they are never scaled.

    Returns:
        The files, and the gain that keeps the loudest from clipping: 1 if none would.

    Raises:
        OSError: there is no such song, or the stems cannot be written.
        ValueError: the song is damaged or has more than two channels, or a number makes no sense.
        torch.OutOfMemoryError: there is no memory even for one segment.
    """
    song, out = Path(song), Path(out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; name a folder for the stems")
    rate, length = _check_song(song)
    channels, model_rate = separator.audio_channels, separator.sample_rate
    heard = (audio.to_channels(block, channels) for block in read_blocks(song))
    mixture = resample_blocks(heard, rate, model_rate)
    samples = -(-length * model_rate // rate)
    estimates = separate_stream(separator, mixture, samples, segmentation, progress)
    stems = resample_blocks(estimates, model_rate, rate)
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{song.stem}_{stem}.wav" for stem in separator.stems]
    with parts_of(files) as parts:
        peak = write_blocks(parts, stems, rate, (channels, length), "FLOAT")
        gain = 1.0 if as_float else 1 / max(1.0, peak)
        if not as_float:
            for part in parts:
                _to_16_bit(part, gain, rate, (channels, length))
    return SeparatedFile(files, gain)


def _check_song(song: Path) -> tuple[int, int]:
    """Rate and length, after decoding the whole song: damage is found before the work."""
    start, rate = audio.read(song, frames=1)
    audio.to_stereo(start)  # or an error: it has too many channels
    return rate, sum(block.shape[-1] for block in read_blocks(song))


def _to_16_bit(path: Path, gain: float, rate: int, shape: tuple[int, int]) -> None:
    """Replace a file of floats by one of 16-bit integers, under the same name."""
    scaled = (gain * block[None] for block in read_blocks(path))
    with parts_of([path]) as parts:
        write_blocks(parts, scaled, rate, shape, "PCM_16")
