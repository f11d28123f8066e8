"""One song in, its scores out: what a worker does.

Axis letters: `n` stems, `c` channels, `s` samples.

Notebook: 08_evaluation
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tfswa_lab import __version__
from tfswa_lab.audio import check_seconds
from tfswa_lab.data.musdb import stem_parts
from tfswa_lab.data.tracks import Track
from tfswa_lab.evaluation.bsseval import bss_eval
from tfswa_lab.evaluation.estimates import Estimates
from tfswa_lab.evaluation.oracles import BOUNDS
from tfswa_lab.evaluation.ratios import si_sdr, usdr
from tfswa_lab.evaluation.scores import DECIMALS, TrackScores, frames_by_stem
from tfswa_lab.evaluation.threads import compute_threads

ESTIMATES = "estimates"  # beside "mixture", "irm" and "mwf", what can be scored
ACCOMPANIMENT = "accompaniment"  # museval's name for all but the voice


class Estimator(Protocol):
    """What `evaluate` asks of those that make or find estimates."""

    stems: tuple[str, ...]

    def settings(self) -> dict:
        """All that the estimates depend on but the files, in JSON's types."""

    def files(self, track: Track) -> Mapping[str, Path]:
        """The files that the estimates of a song lie in, under names for people."""

    def estimate(self, track: Track, mixture: Tensor) -> Estimates:
        """Estimates `(n, 2, s)` for the mixture `(2, s)`, and notes for the reader."""


@dataclass(frozen=True)
class Scoring:
    """How songs are scored.

    Args:
        estimator: who makes or finds the estimates.
        window: length of a frame in seconds; longer than a song, it is one frame.
        hop: from one frame to the next, in seconds.
        seconds: how much of each song, from its beginning; None for all.
        device: where ratios and oracles are computed.

    Raises:
        ValueError: a number of seconds makes no sense.
    """

    estimator: Estimator
    window: float = 1.0
    hop: float = 1.0
    seconds: float | None = None
    device: torch.device | str = "cpu"

    def __post_init__(self):
        for name in ("window", "hop", "seconds"):
            if getattr(self, name) is not None:
                check_seconds(name, getattr(self, name))

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """The files that add up to each stem."""
        return stem_parts(self.estimator.stems)

    @property
    def sources(self) -> tuple[str, ...]:
        """What is read of a song."""
        return ("mixture", *(part for parts in self.parts.values() for part in parts))

    def settings(self, method: str) -> dict:
        """All that scores depend on but the files, as JSON gives it back.

        Args:
            method: `estimates` or the name of a bound.

        Raises:
            ValueError: those of the estimator hold what JSON cannot.
        """
        own = {"bound": method}
        if method == ESTIMATES:
            own = {"estimator": self.estimator.settings()}
        settings = {
            "version": __version__,
            "stems": self.parts,
            "window": self.window,
            "hop": self.hop,
            "seconds": self.seconds,
        }
        try:
            return json.loads(json.dumps(settings | own, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{own} must be of JSON's types, with finite numbers") from error

    def digests(self, track: Track, methods: Sequence[str]) -> dict[str, dict[str, str]]:
        """SHA-256 of the files of a song that each method's scores depend on; each is read once."""
        files = {name: track.path / name for name in (f"{x}.wav" for x in self.sources)}
        if not track.path.is_dir():
            files = {track.path.name: track.path}
        song = _digests(files)
        own = _digests(self.estimator.files(track)) if ESTIMATES in methods else {}
        return {method: song | own if method == ESTIMATES else song for method in methods}

    def read(self, track: Track) -> tuple[Tensor, Tensor]:
        """Mixture `(2, s)` and stems `(n, 2, s)`."""
        frames = track.samples
        if self.seconds is not None:
            frames = min(frames, round(self.seconds * track.rate))
        waveforms = track.read(self.sources, 0, frames, track.rate)
        stems = [sum(waveforms[part] for part in parts) for parts in self.parts.values()]
        return waveforms["mixture"].to(self.device), torch.stack(stems).to(self.device)


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
    does with the voice: interference can only be told from artifacts if there is something else.

    Args:
        scoring: how.
        track: the song.
        methods: `estimates` and names of bounds.
        threads: that torch may use, None for as many as it does.

    Raises:
        FileNotFoundError: an estimate is missing.
        ValueError: a file is broken, or an estimate does not fit its song.
    """
    with compute_threads(threads or torch.get_num_threads()):
        mixture, stems = scoring.read(track)
        stems = _accompanied(mixture, stems)
        digests = scoring.digests(track, methods)
        return {
            method: _score(
                scoring,
                track,
                method,
                digests[method],
                stems,
                *_estimates(scoring, track, method, mixture, stems),
            )
            for method in methods
        }


def _estimates(
    scoring: Scoring, track: Track, method: str, mixture: Tensor, stems: Tensor
) -> tuple[Tensor, tuple[str, ...]]:
    """What is scored, and notes on it."""
    if method != ESTIMATES:
        complete = len(scoring.parts) == 1 or "other" in scoring.parts
        return bound(method, mixture, stems, complete), ()
    estimates, notes = scoring.estimator.estimate(track, mixture)
    return _accompanied(mixture, estimates), notes


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


def _score(
    scoring: Scoring,
    track: Track,
    method: str,
    digests: dict[str, str],
    stems: Tensor,
    estimates: Tensor,
    notes: tuple[str, ...],
) -> TrackScores:
    names = (*scoring.parts, ACCOMPANIMENT)[: len(stems)]
    result = bss_eval(stems, estimates, scoring.window, scoring.hop, rate=track.rate)
    ratios = usdr(stems, estimates).tolist(), si_sdr(stems, estimates).tolist()
    whole = {
        # Rounded as museval rounds: the last bits depend on the number of threads.
        name: {"uSDR": round(plain, DECIMALS), "SI-SDR": round(invariant, DECIMALS)}
        for name, plain, invariant in zip(names, *ratios, strict=True)
    }
    return TrackScores(
        track.name,
        frames_by_stem(result, names),
        whole,
        scoring.window,
        scoring.hop,
        scoring.settings(method),
        digests,
        (*notes, *(_named(note, names) for note in result.notes)),
        stems.shape[-1] / track.rate,
    )


def _named(note: str, names: tuple[str, ...]) -> str:
    """The same note with names instead of numbers of stems."""
    for number, name in enumerate(names):
        note = note.replace(f"stem {number} ", f"{name} ")
    return note
