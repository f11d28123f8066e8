"""Score one song: the work of one process of an evaluation.

Axis letters: `n` stems, `c` channels, `s` samples.

Notebook: 08_evaluation
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor

from tfswa_lab import __version__
from tfswa_lab.audio import STEMS, check_seconds, is_number, plain_number
from tfswa_lab.data.musdb import SPLITS, check_choice, stem_parts
from tfswa_lab.data.tracks import Track
from tfswa_lab.device import compute_threads, pick_device
from tfswa_lab.evaluation.alignment import alignment_note
from tfswa_lab.evaluation.bsseval import bss_eval
from tfswa_lab.evaluation.estimates import Estimator
from tfswa_lab.evaluation.oracles import BOUNDS
from tfswa_lab.evaluation.ratios import whole_ratios
from tfswa_lab.evaluation.residual import residual_notes
from tfswa_lab.evaluation.scores import ESTIMATES, TrackScores, frames_by_stem, whole_by_stem

ACCOMPANIMENT = "accompaniment"  # museval's name for all but the voice


@dataclass(frozen=True)
class Evaluation:
    """How estimates are evaluated.

    Args:
        split: `train`, `valid` or `test`.
        window: length of a frame in seconds; longer than a song, it is one frame.
        hop: from one frame to the next, in seconds.
        seconds: how much of each song, from its beginning; None for all.
        bounds: of "mixture", "irm" and "mwf"; these take most of the time.
        bounds_dir: of their scores, `bounds` in the output folder if None; several models can
            share one.
        jobs: processes, with a thread each; None for one with as many threads as torch uses now.
        device: where ratios and bounds are computed; as `pick_device` takes it.
        overwrite: score all songs again, and bounds that are broken or differ.
        allow_mismatch: also score songs whose mixture is far from the sum of its stems.

    Raises:
        ValueError: an argument is out of range.
    """

    split: str = "test"
    window: float = 1.0
    hop: float = 1.0
    seconds: float | None = None
    bounds: Sequence[str] = tuple(BOUNDS)
    bounds_dir: str | Path | None = None
    jobs: int | None = None
    device: torch.device | str = "cpu"
    overwrite: bool = False
    allow_mismatch: bool = False

    def __post_init__(self):
        check_choice("split", self.split, SPLITS)
        if isinstance(self.bounds, str):
            raise ValueError(f"bounds={self.bounds!r} is a string; write ({self.bounds!r},)")
        self._set("bounds", tuple(self.bounds))  # an iterator would be used up
        for name in self.bounds:
            check_choice("bound", name, tuple(BOUNDS))
        if not (self.jobs is None or (is_number(self.jobs, Integral) and self.jobs >= 1)):
            raise ValueError(f"jobs={self.jobs!r} must be 1 or more processes, or None")
        if pick_device(self.device).type == "mps":  # or an error: unknown, or not here
            raise ValueError("device='mps' has no float64, which scores need: use cpu for them")
        for name in ("overwrite", "allow_mismatch"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        for name in ("window", "hop") if self.seconds is None else ("window", "hop", "seconds"):
            check_seconds(name, getattr(self, name))
            self._set(name, plain_number(getattr(self, name)))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Scoring:
    """Scores songs: the estimator, and how its estimates are evaluated.

    Raises:
        ValueError: one of them is something else.
    """

    estimator: Estimator
    how: Evaluation = Evaluation()

    def __post_init__(self):
        needed = hasattr(self.estimator, "stems") and hasattr(self.estimator, "settings")
        if isinstance(self.estimator, type) or not needed:
            raise ValueError(
                f"{self.estimator!r} makes no estimates; pass ModelEstimates(model), or "
                "FolderEstimates(folder) for files"
            )
        if not isinstance(self.how, Evaluation):
            raise ValueError(f"how={self.how!r}: pass an Evaluation, such as Evaluation(jobs=2)")

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """The files that add up to each stem."""
        return stem_parts(self.estimator.stems)

    @property
    def sources(self) -> tuple[str, ...]:
        """The files of a song that scores need."""
        return ("mixture", *(part for parts in self.parts.values() for part in parts))

    def settings(self, method: str) -> dict:
        """Everything that scores depend on, except the files, as JSON gives it back.

        Args:
            method: `estimates` or the name of a bound.

        Raises:
            ValueError: the estimator's settings are not of JSON's types.
        """
        own = {"bound": method}
        if method == ESTIMATES:
            own = {"estimator": self.estimator.settings()}
        settings = {
            "version": __version__,
            "stems": self.parts,
            "window": self.how.window,
            "hop": self.how.hop,
            "seconds": self.how.seconds,
        }
        try:
            return json.loads(json.dumps(settings | own, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{own} must be of JSON's types, with finite numbers") from error

    def digests(self, track: Track, methods: Sequence[str]) -> dict[str, dict[str, str]]:
        """SHA-256 of the files of a song that each method's scores depend on; each is read once."""
        song = _digests({path.name: path for path in self.song(track).track.files()})
        own = _digests(self.estimator.files(track)) if ESTIMATES in methods else {}
        return {method: song | own if method == ESTIMATES else song for method in methods}

    def song(self, track: Track) -> TrackSources:
        """The track with all stems that are there: its mixture is compared with their sum."""
        try:
            return TrackSources(track.adding(STEMS), tuple(dict.fromkeys((*self.sources, *STEMS))))
        except FileNotFoundError:  # a tree of other stems
            return TrackSources(track, self.sources)
        except ValueError as error:
            note = f"the mixture was not compared with the sum of its stems: {error}"
            return TrackSources(track, self.sources, (note,))

    def read(self, track: Track) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Mixture `(2, s)`, stems `(n, 2, s)`, and notes on whether they fit each other.

        Raises:
            ValueError: the mixture is that of another song.
        """
        song = self.song(track)
        frames = track.samples
        if self.how.seconds is not None:
            frames = min(frames, round(self.how.seconds * track.rate))
        waveforms = song.track.read(song.sources, 0, frames, track.rate)
        mixture, notes = waveforms["mixture"], song.notes
        if waveforms.keys() > set(STEMS):
            total = sum(waveforms[stem] for stem in STEMS)
            files, allow = song.track.files(), self.how.allow_mismatch
            notes += residual_notes(mixture, total, files, track.rate, allow)
        stems = [sum(waveforms[part] for part in parts) for parts in self.parts.values()]
        device = pick_device(self.how.device)
        return mixture.to(device), torch.stack(stems).to(device), notes


@dataclass(frozen=True)
class TrackSources:
    """A track, what is read of it, and notes for the reader."""

    track: Track
    sources: tuple[str, ...]
    notes: tuple[str, ...] = ()


def _digests(files: Mapping[str, Path]) -> dict[str, str]:
    found = {}
    for name, path in files.items():
        with path.open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def score_track(
    scoring: Scoring, track: Track, methods: Sequence[str], threads: int | None = None
) -> dict[str, TrackScores]:
    """Score estimates and bounds of one song.

    A single stem is scored together with its accompaniment, the rest of the mixture, as museval
    does with the voice: without another source, all interference would count as artifacts.

    Args:
        scoring: the estimator, and how to evaluate.
        track: the song.
        methods: `estimates` and names of bounds.
        threads: that torch may use; None for as many as it uses now.

    Raises:
        FileNotFoundError: an estimate is missing.
        ValueError: a file is broken, or an estimate does not fit its song.
    """
    how, scores = scoring.how, {}
    with compute_threads(threads or torch.get_num_threads()):
        digests = scoring.digests(track, methods)
        mixture, stems, mixture_notes = scoring.read(track)
        stems = _accompanied(mixture, stems)
        for method in methods:
            estimates, notes = _estimates(scoring, track, method, mixture, stems)
            names = (*scoring.parts, ACCOMPANIMENT)[: len(stems)]
            whole = whole_ratios(stems, estimates)
            result = bss_eval(stems, estimates, how.window, how.hop, rate=track.rate)
            if method == ESTIMATES:
                notes += _alignment_notes(scoring.parts, stems, estimates, track.rate)
            scores[method] = TrackScores(
                track.name,
                frames_by_stem(result.ratios(), names),
                whole_by_stem(whole, names),
                how.window,
                how.hop,
                scoring.settings(method),
                digests[method],
                (*mixture_notes, *notes, *(_named(note, names) for note in result.notes)),
                stems.shape[-1] / track.rate,
            )
    return scores


def _estimates(
    scoring: Scoring, track: Track, method: str, mixture: Tensor, stems: Tensor
) -> tuple[Tensor, tuple[str, ...]]:
    """Estimates `(n, 2, s)` by this method, and notes on them."""
    if method != ESTIMATES:
        complete = len(scoring.parts) == 1 or "other" in scoring.parts
        return bound(method, mixture, stems, complete), ()
    estimates, notes = scoring.estimator.estimate(track, mixture)
    return _accompanied(mixture, estimates), notes


def _alignment_notes(
    names: Iterable[str], stems: Tensor, estimates: Tensor, rate: int
) -> tuple[str, ...]:
    """Of the stems that were estimated; an accompaniment only follows from them."""
    found = {
        name: alignment_note(stem, estimate.to(stem.device), rate)
        for name, stem, estimate in zip(names, stems, estimates, strict=False)
    }
    return tuple(f"the estimate of {name} {note}" for name, note in found.items() if note)


def _accompanied(mixture: Tensor, stems: Tensor) -> Tensor:
    """A single stem and the rest of the mixture; several stems as they are."""
    return stems if len(stems) > 1 else torch.cat([stems, mixture - stems])


def bound(method: str, mixture: Tensor, stems: Tensor, complete: bool) -> Tensor:
    """Estimates `(n, c, s)` of a floor or ceiling.

    Args:
        method: a key of `BOUNDS`.
        mixture: `(c, s)`.
        stems: `(n, c, s)`.
        complete: whether the stems are all of the mixture; if not, the rest is one more source.
    """
    sources = stems if complete else torch.cat([stems, mixture[None] - stems.sum(0)])
    return BOUNDS[method](mixture, sources)[: len(stems)]


def _named(note: str, names: Sequence[str]) -> str:
    """A note with the names of stems instead of their numbers."""
    for number, name in enumerate(names):
        note = note.replace(f"stem {number} ", f"{name} ")
    return note
