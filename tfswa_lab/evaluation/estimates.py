"""Where the estimates of a song come from: a separator, or files that anybody wrote.

Axis letters: `n` stems, `c` channels, `s` samples.

Notebook: 08_evaluation
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tfswa_lab import audio
from tfswa_lab.audio import STEMS
from tfswa_lab.data.musdb import stem_parts
from tfswa_lab.data.tracks import Track, audio_file, audio_files
from tfswa_lab.decode import read_header
from tfswa_lab.inference.separate import Segmentation, refuse_training_mode, separate
from tfswa_lab.models.separator import Separator
from tfswa_lab.models.storage import describe, load_separator

Estimates = tuple[Tensor, tuple[str, ...]]  # (n, 2, s), and notes for the reader


class Estimator(Protocol):
    """Any object that makes or finds estimates: `evaluate` needs these four names."""

    stems: tuple[str, ...]

    def settings(self) -> dict:
        """Everything that the estimates depend on, except the files, in JSON's types."""

    def files(self, track: Track) -> Mapping[str, Path]:
        """The files of a song's estimates, checked, by the names that a reader sees."""

    def estimate(self, track: Track, mixture: Tensor) -> Estimates:
        """Estimates `(n, 2, s)` for the mixture `(2, s)`, and notes for the reader."""


class ModelEstimates:
    """Estimates that a separator makes, on the device that it is on.

    Songs of another sample rate are resampled for it, and its estimates back; a separator for mono
    hears the mean of both channels, and its estimates are doubled.

    Args:
        separator: in evaluation mode, or what `load_separator` takes.
        segmentation: how songs are cut for it.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: the model is broken, in training mode, or has a stem that no data set has; or
            an argument is something else.
    """

    def __init__(
        self,
        separator: Separator | str | Path,
        segmentation: Segmentation = Segmentation(),
    ):
        if isinstance(separator, str | Path):
            separator = load_separator(separator)
        if not isinstance(separator, Separator):
            raise ValueError(
                f"expected a Separator, its folder or a name such as 'band', got a "
                f"{type(separator).__name__}; wrap estimates of your own in an `Estimator`"
            )
        if not isinstance(segmentation, Segmentation):
            raise ValueError(
                f"segmentation={segmentation!r}: pass a Segmentation, such as Segmentation(6.0)"
            )
        refuse_training_mode(separator)
        stem_parts(separator.stems)
        self.separator, self.segmentation = separator, segmentation

    @property
    def stems(self) -> tuple[str, ...]:
        """Those of the separator."""
        return self.separator.stems

    def settings(self) -> dict:
        """The model's digest and how its segments overlap."""
        return {
            "model": model_digest(self.separator),
            "segment_seconds": self.segmentation.segment_seconds,
            "overlap": self.segmentation.overlap,
            "shifts": self.segmentation.shifts,
        }

    def files(self, track: Track) -> dict[str, Path]:
        """None: the estimates depend on the mixture alone."""
        return {}

    def estimate(self, track: Track, mixture: Tensor) -> Estimates:
        """Estimates of a mixture `(2, s)` on its device."""
        stems = separate(mixture, track.rate, self.separator, self.segmentation)
        return audio.to_stereo(torch.stack(list(stems.values()))), ()


def model_digest(separator: Separator) -> str:
    """SHA-256 of its weights and sizes, whatever its folder and device."""
    digest = sha256(json.dumps(describe(separator), sort_keys=True).encode())
    for name, tensor in sorted(separator.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class FolderEstimates:
    """Estimates that lie in files, as museval expects them: `folder/SPLIT/TRACK/STEM.wav`.

    The level of the split may be missing, as it is in what `tfswa-lab separate` writes, and files
    may be FLAC or any other kind of sound file. Files that are a second or less shorter or
    longer than their song are padded with silence or cut, and a note says so; mono files are
    doubled.

    Args:
        folder: of all songs.
        stems: which to score; `other` is the sum of all that are not named.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no such stem.
    """

    def __init__(self, folder: str | Path, stems: Sequence[str] = STEMS):
        self.folder, self.stems = Path(folder).expanduser(), tuple(stems)
        stem_parts(stems)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such folder of estimates; check the path")

    def settings(self) -> dict:
        """Only that they are files: `Scoring.digests` adds their digests, song by song."""
        return {"estimates": "files"}

    def files(self, track: Track) -> dict[str, Path]:
        """The files of a song as `estimates/STEM.wav` → path, after a check of their headers.

        Raises:
            FileNotFoundError: one is missing.
            ValueError: one is broken, or of another sample rate or length than the song, or there
                are two of one stem.
        """
        return {f"estimates/{path.name}": path for path in self._lengths(track)}

    def _lengths(self, track: Track) -> dict[Path, int]:
        """The files of a song, and how many samples each has."""
        folder = self._folder_of(track)
        names = [path.name for path in audio_files(folder)]
        there = [stem for stem in STEMS if stem in {Path(name).stem for name in names}]
        if missing := [stem for stem in self.stems if stem not in there]:
            suffix = Path(names[0]).suffix if names else ".wav"
            raise FileNotFoundError(
                f"{folder / missing[0]}{suffix} is missing (the folder lacks {', '.join(missing)} "
                f"and holds {', '.join(names) or 'no sound file'}); add the estimates"
                f"{_or_fewer(there)}"
            )
        paths = [audio_file(folder, stem) for stem in self.stems]
        return {path: _checked_length(path, track) for path in paths}

    def _folder_of(self, track: Track) -> Path:
        places = [self.folder / track.path.parent.name / track.name, self.folder / track.name]
        for place in places:
            if place.is_dir():
                return place
        there = sorted(path.name for path in self.folder.iterdir())[:8]
        raise FileNotFoundError(
            f"{places[0]} is missing, and {places[1]} too: there are no estimates of this song "
            f"({self.folder} holds {', '.join(there) or 'nothing'}); add them, or check the folder "
            "and the split"
        )

    def estimate(self, track: Track, mixture: Tensor) -> Estimates:
        """The first samples of the files, as many as the mixture `(2, s)` has, on its device."""
        length, estimates, notes = mixture.shape[-1], [], ()
        for path, samples in self._lengths(track).items():
            estimate, _ = audio.read(path, frames=length)
            if estimate.shape[0] == 1:
                notes += (f"the estimate {path.name} is mono and was doubled",)
            if missing := length - estimate.shape[-1]:
                notes += (f"the estimate {path.name} ends {missing} samples early: padded",)
            elif (surplus := samples - track.samples) > 0:
                notes += (f"the estimate {path.name} is {surplus} samples too long: cut",)
            estimates.append(F.pad(audio.to_stereo(estimate), (0, missing)))
        return torch.stack(estimates).to(mixture.device), notes


def _or_fewer(there: list[str]) -> str:
    """How to score only the stems that are there, if any is."""
    if not there:
        return ""
    names = ",".join(there)
    rest = ", where other is the sum of all that are not named" if "other" in there else ""
    return f", or score only those that are there: --stems {names}{rest}"


def _checked_length(path: Path, track: Track) -> int:
    rate, channels, samples = read_header(path)
    if rate != track.rate:
        raise ValueError(
            f"{path} has {rate} Hz, but {track.path} has {track.rate} Hz; resample the estimates"
        )
    if channels > 2:
        raise ValueError(f"{path} has {channels} channels; the references have 2")
    if abs(samples - track.samples) > rate:
        raise ValueError(
            f"{path} has {samples} samples, but {track.path} has {track.samples}: more than a "
            "second is missing or too much; is it the estimate of another song?"
        )
    return samples
