"""MUSDB18 and every tree of its shape as a torch data set: segments of songs, any stems.

Axis letters: `b` batch, `n` stems, `s` samples.

Notebook: 00_start_here
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from tfswa_lab.audio import STEMS
from tfswa_lab.data.tracks import Track, find_tracks

SPLITS = ("train", "valid", "test")


def stem_parts(target_stems: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The files that add up to each target: `other` is the sum of all stems not named.

    >>> stem_parts(["vocals", "other"])
    {'vocals': ('vocals',), 'other': ('drums', 'bass', 'other')}
    >>> stem_parts(["bass"])
    {'bass': ('bass',)}

    Raises:
        ValueError: no stem, an unknown one, or the same one twice.
    """
    if isinstance(target_stems, str):
        raise ValueError(f"target_stems={target_stems!r} is a string; write [{target_stems!r}]")
    if not target_stems or len(set(target_stems)) < len(target_stems):
        raise ValueError(f"target_stems={list(target_stems)}: name one or more stems, each once")
    for stem in target_stems:
        check_choice("stem", stem, STEMS)
    rest = tuple(stem for stem in STEMS if stem == "other" or stem not in target_stems)
    return {stem: rest if stem == "other" else (stem,) for stem in target_stems}


def check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is not among the choices, and suggest the nearest one.

    Raises:
        ValueError: names the value, the nearest choice and all choices.
    """
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown {what} {value!r}; {guess}choose among {', '.join(choices)}")


class MUSDB18Dataset(Dataset):
    """Segments of songs with their stems, from folders of WAV or FLAC, or `.stem.mp4` files.

    Random segments depend on `(seed, epoch, index)` alone: they are the same with any number of
    workers, and `set_epoch` draws new ones. Sequential segments cover every sample of every song.
    A segment that reaches beyond its song is filled with silence.

    Args:
        root: folder that holds `train` and `test`.
        split: `train`, `valid` (see `tfswa_lab.data.tracks.find_tracks`) or `test`.
        target_stems: stems to return, in this order; `other` is the sum of all not named.
        segment_seconds: length of a segment, None for whole songs.
        random_segments: draw the segments; by default for `train` unless songs are whole.
        overlap: fraction of a sequential segment that the next one repeats, in [0, 1).
        samples_per_track: random segments of each song in an epoch.
        sample_rate: resample to this rate in Hz; None keeps the files' own, which must be one.
        valid_fraction: share of the train folder for `valid` where musdb names none of its songs.
        seed: seed of the random segments and of that share.

    An item is a dict: `mixture` `(2, s)`, `stems` `(n, 2, s)`, `track` (name), `start_seconds`.
    Headers are checked at once, samples (for NaN) when they are read; errors name the file.

    Raises:
        FileNotFoundError: a folder or a stem is missing.
        ValueError: an argument makes no sense, or a file is broken.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        target_stems: Sequence[str] = STEMS,
        segment_seconds: float | None = 6.0,
        random_segments: bool | None = None,
        overlap: float = 0.0,
        samples_per_track: int = 1,
        sample_rate: int | None = None,
        valid_fraction: float = 0.2,
        seed: int = 0,
    ) -> None:
        check_choice("split", split, SPLITS)
        if random_segments is None:
            random_segments = split == "train" and segment_seconds is not None
        _check_segments(segment_seconds, random_segments, overlap, samples_per_track)
        _check_numbers(sample_rate, valid_fraction, seed)
        self.parts = stem_parts(target_stems)
        needed = dict.fromkeys(part for parts in self.parts.values() for part in parts)
        self.sources = ("mixture", *needed)
        self.tracks = find_tracks(root, split, self.sources, valid_fraction, seed)
        self.sample_rate = int(sample_rate or _common_rate(self.tracks))
        self.segment = segment_seconds and round(segment_seconds * self.sample_rate)
        self.random_segments = random_segments
        self.seed = seed
        # Shared memory, so that persistent workers see the next epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        if random_segments:
            self._length = len(self.tracks) * samples_per_track
        else:
            self._starts = [
                (track, start)
                for track in self.tracks
                for start in self._cover(track.length(self.sample_rate), overlap)
            ]
            self._length = len(self._starts)

    @property
    def track_names(self) -> list[str]:
        """Names of the songs of this split."""
        return [track.name for track in self.tracks]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's random segments; call it before each pass over the loader."""
        if epoch < 0:
            raise ValueError(f"epoch={epoch}: epochs count from 0")
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of a data set of {len(self)}")
        track, start = self._draw(index) if self.random_segments else self._starts[index]
        there = track.length(self.sample_rate)
        frames = self.segment or there
        waveforms = track.read(self.sources, start, min(frames, there - start), self.sample_rate)
        if start + frames > there:
            silence = (0, start + frames - there)
            waveforms = {source: F.pad(wave, silence) for source, wave in waveforms.items()}
        stems = [reduce(torch.add, map(waveforms.get, parts)) for parts in self.parts.values()]
        return {
            "mixture": waveforms["mixture"],
            "stems": torch.stack(stems),
            "track": track.name,
            "start_seconds": start / self.sample_rate,
        }

    def _draw(self, index: int) -> tuple[Track, int]:
        # Neighbouring indices are different songs, so even an unshuffled batch mixes songs.
        track = self.tracks[index % len(self.tracks)]
        generator = np.random.default_rng((self.seed, self._epoch.item(), index))
        last = max(0, track.length(self.sample_rate) - self.segment)
        return track, int(generator.integers(last, endpoint=True))

    def _cover(self, length: int, overlap: float) -> range:
        """First samples of the segments that cover a song; only the last may reach beyond it."""
        if self.segment is None:
            return range(1)
        hop = max(1, round(self.segment * (1 - overlap)))
        return range(0, max(1, length - self.segment + hop), hop)

    @staticmethod
    def collate_fn(items: list[dict]) -> dict:
        """Stack items into a batch: `(b, 2, s)`, `(b, n, 2, s)`, a list of names, `(b,)` seconds.

        Raises:
            ValueError: the items differ in length, as whole songs do.
        """
        lengths = {item["track"]: item["mixture"].shape[-1] for item in items}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"cannot stack whole songs of different lengths {lengths}; "
                "use batch_size=1 or set segment_seconds"
            )
        return {
            "mixture": torch.stack([item["mixture"] for item in items]),
            "stems": torch.stack([item["stems"] for item in items]),
            "track": [item["track"] for item in items],
            "start_seconds": torch.tensor(
                [item["start_seconds"] for item in items], dtype=torch.float64
            ),
        }


def _check_segments(
    seconds: float | None, random_segments: bool, overlap: float, samples_per_track: int
) -> None:
    if seconds is not None and not 1e-3 <= seconds < math.inf:
        raise ValueError(f"segment_seconds={seconds}: a number of seconds from 0.001 on, or None")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap={overlap}: a fraction of the segment, from 0 to below 1")
    if samples_per_track < 1:
        raise ValueError(f"samples_per_track={samples_per_track}: must be at least 1")
    if seconds is None and (random_segments or overlap):
        raise ValueError("segment_seconds=None reads whole songs: no overlap, nothing random")
    if random_segments and overlap:
        raise ValueError(f"overlap={overlap} needs random_segments=False")
    if not random_segments and samples_per_track > 1:
        raise ValueError(f"samples_per_track={samples_per_track} needs random_segments=True")


def _check_numbers(sample_rate: int | None, valid_fraction: float, seed: int) -> None:
    if sample_rate is not None and not 1000 <= sample_rate == int(sample_rate):
        raise ValueError(f"sample_rate={sample_rate}: a whole number of Hz from 1000 on, or None")
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"valid_fraction={valid_fraction}: must be from 0 to below 1")
    if seed < 0:
        raise ValueError(f"seed={seed}: must not be negative")


def _common_rate(tracks: list[Track]) -> int:
    (rate, _), *others = Counter(track.rate for track in tracks).most_common()
    if others:
        odd = next(track for track in tracks if track.rate != rate)
        raise ValueError(
            f"{odd.path} has {odd.rate} Hz but most tracks have {rate} Hz; "
            f"pass sample_rate={rate} to resample on the fly"
        )
    return rate
