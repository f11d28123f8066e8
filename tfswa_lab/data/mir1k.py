"""MIR-1K: a thousand clips of karaoke singing, with the voice on its own, and its pitch labels.

Each clip has the accompaniment on the left channel and the voice on the right, 16 kHz. Labels lie
on a 20 ms grid: label `i` describes the 40 ms around `(i + 1) * 0.02` s, so a clip of `s` samples
has `s // 320 - 1` of them.

Axis letters: `s` samples.

Source: Hsu and Jang, IEEE TASLP 18(2), 2010.

Notebook: 00_start_here
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from tfswa_lab import audio
from tfswa_lab.decode import read_header

RATE = 16_000
HOP = 320  # samples from one label to the next
TRAIN_SINGERS = ("abjones", "amy")  # the split of the papers; the other 17 singers are the test set


@dataclass(frozen=True)
class Clip:
    """One clip: its name, its audio file, its two label files and its length in samples."""

    name: str
    path: Path
    pitch_path: Path
    vocal_path: Path
    samples: int


class MIR1K(Dataset):
    """Clips of singing over accompaniment, whole or cut into segments.

    Two layouts are recognised: the original (`Wavfile/*.wav`, `PitchLabel/*.pv`,
    `vocal-nonvocalLabel/*.vocal`) and FLAC clips with `*.f0.txt` and `*.vocal.txt` beside them in
    `train/` and `test/`. In both, the split follows from the singer.

    Args:
        root: the folder of either layout.
        split: `train` (singers abjones and amy), `test` (all others), None for both.
        segment_seconds: cut clips into segments of this length, at least 0.04; None for whole
            clips. Segments start on the label grid. The last one is filled with silence.

    An item is a dict: `mixture`, `accompaniment`, `voice`, each `(1, s)` float32 with mixture =
    accompaniment + voice (0 dB); `f0_midi` `(frames,)` in MIDI semitones, 0 where unvoiced;
    `vocal` `(frames,)` bool; `clip` (name); `start_seconds`. A segment carries the labels whose
    40 ms lie inside it.

    Raises:
        FileNotFoundError: no such folder, neither layout, or a label file is missing.
        ValueError: an argument makes no sense, or a file is broken.
    """

    def __init__(
        self, root: str | Path, split: str | None = None, segment_seconds: float | None = None
    ) -> None:
        if split not in (None, "train", "test"):
            raise ValueError(f"unknown split {split!r}; choose 'train', 'test' or None for both")
        if segment_seconds is not None and not 0.04 <= segment_seconds < math.inf:
            raise ValueError(f"segment_seconds={segment_seconds}: at least 0.04 s, or None")
        self.clips = [
            clip
            for clip in find_clips(Path(root).expanduser())
            if split is None or (clip.name.split("_")[0] in TRAIN_SINGERS) == (split == "train")
        ]
        if not self.clips:
            raise ValueError(f"{root} holds no clip of split={split!r}; pass split=None or add it")
        self.segment = segment_seconds and round(segment_seconds * RATE)
        self._starts = [(clip, start) for clip in self.clips for start in self._cover(clip)]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of a data set of {len(self)}")
        clip, start = self._starts[index]
        frames = self.segment or clip.samples
        there = min(frames, clip.samples - start)
        waveform, _ = audio.read(clip.path, start, there)
        if waveform.shape[-1] < there:
            raise ValueError(f"{clip.path} is truncated; copy or download it again")
        accompaniment, voice = F.pad(waveform, (0, frames - there)).split(1)
        f0_midi, vocal = read_labels(clip)
        labels = slice(start // HOP, start // HOP + frames // HOP - 1)
        missing = (0, labels.stop - labels.start - len(f0_midi[labels]))
        return {
            "mixture": accompaniment + voice,
            "accompaniment": accompaniment,
            "voice": voice,
            "f0_midi": F.pad(f0_midi[labels], missing),
            "vocal": F.pad(vocal[labels], missing),
            "clip": clip.name,
            "start_seconds": start / RATE,
        }

    def _cover(self, clip: Clip) -> range:
        if self.segment is None:
            return range(1)
        hop = self.segment // HOP * HOP
        return range(0, max(1, clip.samples - self.segment + hop), hop)


def find_clips(root: Path) -> list[Clip]:
    """List the clips of either layout, sorted by name, and check headers and label files.

    Raises:
        FileNotFoundError: no such folder, neither layout, or a label file is missing.
        ValueError: a clip is broken, not stereo, or not 16 kHz.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; pass the folder of MIR-1K")
    if (root / "Wavfile").is_dir():
        # The name of the folder of voice labels is spelt with and without a blank.
        vocal_folder = next(root.glob("vocal-nonvocal*abel"), root / "vocal-nonvocalLabel")
        files = [
            (path, root / "PitchLabel" / f"{path.stem}.pv", vocal_folder / f"{path.stem}.vocal")
            for path in root.glob("Wavfile/[!.]*.wav")
        ]
    else:
        files = [
            (path, path.with_suffix(".f0.txt"), path.with_suffix(".vocal.txt"))
            for path in root.glob("*/[!.]*.flac")
        ]
    if not files:
        raise FileNotFoundError(f"{root} holds neither Wavfile/*.wav nor train/*.flac, test/*.flac")
    return sorted((_open_clip(*paths) for paths in files), key=lambda clip: clip.name)


def _open_clip(path: Path, pitch_path: Path, vocal_path: Path) -> Clip:
    rate, channels, samples = read_header(path)
    if (rate, channels) != (RATE, 2):
        raise ValueError(
            f"{path} has {channels} channel(s) at {rate} Hz, expected accompaniment and voice "
            f"as 2 channels at {RATE} Hz; download it again"
        )
    for label_path in (pitch_path, vocal_path):
        if not label_path.is_file():
            raise FileNotFoundError(f"{label_path} is missing; {path} needs its labels")
    return Clip(path.stem, path, pitch_path, vocal_path, samples)


def read_labels(clip: Clip) -> tuple[Tensor, Tensor]:
    """Pitch in MIDI semitones (0 = unvoiced) and voice activity of a whole clip.

    Raises:
        ValueError: a label is not a number, or the count of labels does not fit the audio.
    """
    expected = clip.samples // HOP - 1
    labels = []
    for path in (clip.pitch_path, clip.vocal_path):
        try:
            values = [float(value) for value in path.read_text().split()]
        except ValueError as error:
            raise ValueError(f"{path} is no list of numbers ({error}); copy it again") from error
        if len(values) != expected:
            raise ValueError(
                f"{path} holds {len(values)} labels, its clip of {clip.samples} samples needs "
                f"{expected} (one in 20 ms); the audio and the labels do not match"
            )
        labels.append(torch.tensor(values))
    return labels[0], labels[1] > 0
