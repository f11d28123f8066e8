"""The report of an evaluation: SiSEC's medians and the Music Demixing Challenge's means.

The two are different numbers of different definitions and never share a table.

Notebook: 08_evaluation
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tfswa_lab.data.musdb import SPLITS, check_choice
from tfswa_lab.evaluation.bsseval import ignoring_nan
from tfswa_lab.evaluation.oracles import BOUNDS
from tfswa_lab.evaluation.scores import (
    ESTIMATES,
    RATIOS,
    WHOLE_RATIOS,
    Folders,
    Ratios,
    TrackScores,
    difference,
    read_scores,
    shortened,
)

PERFECT = 100  # dB; above it, the only error is that of rounding
# Names of the estimates and the bounds in tables.
NAMES = {
    "mixture": "mixture (floor)",
    "estimates": "estimates",
    "irm": "ideal ratio mask",
    "mwf": "Wiener oracle",
}
# Around a song's score, if they were scored too.
ENDS = {"floor": ("mixture",), "higher ceiling": ("irm", "mwf")}


@dataclass(frozen=True)
class Table:
    """Rows of texts under a title."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_markdown(self) -> str:
        """A table of GitHub's Markdown, with its title above."""
        lines = [self.columns, ["---", *["--:"] * (len(self.columns) - 1)], *self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(row)} |" for row in lines)])


@dataclass(frozen=True)
class Report:
    """Scores of estimates and of their bounds, song by song.

    Args:
        scores: `estimates`, `mixture`, `irm`, `mwf` → the scores of all songs in the same order.
        gaps: remarks on what is missing.
        origin: where estimates and songs come from, in words.
    """

    scores: dict[str, list[TrackScores]]
    gaps: tuple[str, ...] = ()
    origin: dict[str, str] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """Keys of `scores`, from the floor to the ceiling."""
        return [method for method in NAMES if method in self.scores]

    @property
    def tracks(self) -> list[str]:
        """Names of the songs."""
        return [track.track for track in self.scores["estimates"]]

    @property
    def stems(self) -> tuple[str, ...]:
        """Names of the stems."""
        return tuple(self.scores["estimates"][0].frames)

    def by_song(self, ratio: str, method: str = "estimates") -> np.ndarray:
        """One number of each song and stem, `(songs, stems)` in dB, NaN where it has none.

        Args:
            ratio: SDR, ISR, SIR or SAR, medians over frames; or uSDR or SI-SDR, of whole songs.
            method: a key of `scores`.

        Raises:
            ValueError: there is no such ratio, or the method was not scored.
        """
        _check_ratio(ratio, (*RATIOS, *WHOLE_RATIOS))
        if method not in self.scores:
            raise ValueError(f"method={method!r} was not scored; there is {', '.join(self.scores)}")
        songs = self.scores[method]
        named = [song.medians if ratio in RATIOS else song.whole for song in songs]
        return np.array([[song[stem][ratio] for stem in self.stems] for song in named])

    def medians(self, method: str = "estimates") -> Ratios:
        """SiSEC: stem → ratio → the median over songs of the median over frames, in dB."""
        medians = {x: ignoring_nan(np.nanmedian, self.by_song(x, method), axis=0) for x in RATIOS}
        return {
            stem: {ratio: medians[ratio][number].item() for ratio in RATIOS}
            for number, stem in enumerate(self.stems)
        }

    def means(self, method: str = "estimates", ratio: str = "uSDR") -> dict[str, float]:
        """Music Demixing Challenge: stem → the mean over songs of one ratio of the whole song.

        Args:
            method: a key of `scores`.
            ratio: "uSDR" or "SI-SDR".

        Raises:
            ValueError: it is a ratio of frames, or the method was not scored.
        """
        _check_ratio(ratio, WHOLE_RATIOS)
        means = ignoring_nan(np.nanmean, self.by_song(ratio, method), axis=0)
        return dict(zip(self.stems, means.tolist(), strict=True))

    def facts(self) -> dict[str, str]:
        """Songs, frames, estimates and version, in words."""
        songs = self.scores["estimates"]
        of = songs[0].settings
        part = "whole" if of["seconds"] is None else f"the first {of['seconds']:g} s of each"
        lasting = sum(song.seconds for song in songs)
        own = (f"{name}: {shortened(value)}" for name, value in of["estimator"].items())
        return self.origin | {
            "songs": f"{len(songs)}, {part}: {lasting:.0f} s",
            "frames": f"of {songs[0].window:g} s, {songs[0].hop:g} s apart; {self._frames()}",
            "estimates": ", ".join(own),
            "tfswa-lab": of["version"],
        }

    def _frames(self) -> str:
        """How many frames have a value, stem by stem if they differ."""
        songs = [song.frames for song in self.scores["estimates"]]
        values = {stem: [x for song in songs for x in song[stem]["SDR"]] for stem in self.stems}
        counts = {stem: sum(not math.isnan(x) for x in values[stem]) for stem in self.stems}
        if len(set(counts.values())) == 1:
            scored = str(counts[self.stems[0]])
        else:
            scored = ", ".join(f"{stem} {count}" for stem, count in counts.items())
        return f"scored: {scored} of {len(values[self.stems[0]])}"

    def tables(self) -> list[Table]:
        """Medians, means, and both song by song."""
        return [
            self._medians_table(),
            self._means_table(),
            self._songs_table("Median over frames of SDR, in dB", "SDR"),
            self._songs_table("uSDR, in dB", "uSDR"),
        ]

    def _medians_table(self) -> Table:
        medians = {method: self.medians(method) for method in self.methods}
        rows = [
            (stem, NAMES[method], *map(show, medians[method][stem].values()))
            for stem in self.stems
            for method in self.methods
        ]
        title = "Median over songs of the median over frames (SiSEC), in dB"
        return Table(title, ("stem", "of", *RATIOS), tuple(rows))

    def _means_table(self) -> Table:
        means = {method: self.means(method) for method in self.methods}
        rows = [(stem, *(show(means[method][stem]) for method in means)) for stem in self.stems]
        if len(self.stems) > 1:
            total = (ignoring_nan(np.nanmean, list(means[method].values())) for method in means)
            rows.append(("mean of stems", *map(show, total)))
        columns = ("stem", *(NAMES[method] for method in means))
        return Table("Mean over songs of uSDR (Music Demixing), in dB", columns, tuple(rows))

    def _songs_table(self, title: str, ratio: str) -> Table:
        """Each score with the floor and the higher ceiling, as far as they are there."""
        columns, ends = [self.by_song(ratio)], []
        for name, methods in ENDS.items():
            if bounds := [self.by_song(ratio, x) for x in methods if x in self.scores]:
                columns.append(ignoring_nan(np.nanmax, np.stack(bounds), axis=0))
                ends.append(name)
        songs = zip(self.tracks, np.stack(columns, -1), strict=True)
        rows = tuple((track, *map(_between, stems)) for track, stems in songs)
        within = f" ({' … '.join(ends)})" if ends else ""
        return Table(title + within, ("song", *self.stems), rows)

    def notes(self) -> list[str]:
        """Remarks on missing scores, and on single songs."""
        notes = list(self.gaps)
        for number, song in enumerate(self.scores["estimates"]):
            notes += [f"{song.track}: {note}" for note in song.notes]
            for method in self.methods:  # a bound's, if the estimates have no such note
                new = [x for x in self.scores[method][number].notes if x not in song.notes]
                notes += [f"{song.track}, {NAMES[method]}: {note}" for note in new]
        return notes

    def __repr__(self) -> str:
        return f"<Report of {len(self.tracks)} songs: {', '.join(self.methods)}>"

    def __str__(self) -> str:
        return self._medians_table().to_markdown()

    def to_markdown(self) -> str:
        """Facts, all tables, and notes."""
        texts = ["\n".join(f"- {name}: {value}" for name, value in self.facts().items())]
        texts += [table.to_markdown() for table in self.tables()]
        texts += ["\n".join(f"- {note}" for note in self.notes())] if self.notes() else []
        return "\n\n".join(texts) + "\n"


def _check_ratio(ratio: str, known: Sequence[str]) -> None:
    if ratio not in known:
        raise ValueError(f"ratio={ratio!r}: choose one of {', '.join(known)}")


def _between(values: Sequence[float]) -> str:
    """A score and, in brackets, its floor and ceiling."""
    score, *ends = map(show, values)
    return score + (f" ({' … '.join(ends)})" if ends else "")


def show(value: float) -> str:
    """Two decimals; a dash for NaN, and ">100" where the only error is that of rounding.

    >>> show(3.14159), show(math.nan), show(193.4)
    ('3.14', '–', '>100')
    """
    if value > PERFECT:
        return f">{PERFECT}"
    return "–" if math.isnan(value) else f"{value:.2f}"


def load_report(
    output_dir: str | Path, split: str = "test", bounds_dir: str | Path | None = None
) -> Report:
    """Read what `evaluate` wrote, with the bounds that are there for all songs.

    The report of an evaluation that was killed has the finished songs, and its notes say so.

    Raises:
        FileNotFoundError: there are no scores, or none of bounds in a `bounds_dir` that is given.
        ValueError: there is no such split; or a file was written by another program, is broken, or
            has other settings.
    """
    check_choice("split", split, SPLITS)
    folders = Folders.of(output_dir, bounds_dir, split)
    names = [path.stem for path in folders.scored()]
    if not names:
        raise FileNotFoundError(
            f"{folders.output / split} holds no scores; evaluate something first"
        )
    gaps = ()
    if set(wanted := folders.read_songs()) - set(names):
        gaps = (f"{len(names)} of {len(wanted)} songs are scored: evaluate again for the rest",)
    there = []
    for bound in BOUNDS:
        count = sum(folders.path(bound, name).is_file() for name in names)
        if count == len(names):
            there.append(bound)
        elif count:
            gaps += (f"{NAMES[bound]}: left out, scored for {count} of {len(names)} songs",)
    if bounds_dir is not None and not any(map(folders.holds, BOUNDS)):
        raise FileNotFoundError(
            f"bounds_dir={bounds_dir} holds no {split}/ of {', '.join(BOUNDS)}; check the path, or "
            "leave it out"
        )
    return read_report(folders, names, there, gaps)


def read_report(
    folders: Folders, tracks: Iterable[str], bounds: Iterable[str], gaps: tuple[str, ...] = ()
) -> Report:
    """Read the scores of these songs.

    Raises:
        FileNotFoundError: they are not all there.
        ValueError: a file is broken, or its settings, stems or audio differ from the others.
    """
    scores = {
        method: [read_scores(folders.path(method, name)) for name in sorted(tracks)]
        for method in (ESTIMATES, *bounds)
    }
    _check_alike(folders, scores)
    return Report(scores, gaps)


def _check_alike(folders: Folders, scores: dict[str, list[TrackScores]]) -> None:
    first, *others = scores[ESTIMATES]
    for song in others:
        if differs := difference(first.settings, song.settings):
            raise ValueError(
                f"{folders.path(ESTIMATES, song.track)} was scored otherwise than "
                f"{first.track}: {differs}; evaluate again, and overwrite"
            )
    for method in scores.keys() - {ESTIMATES}:
        for own, other in zip(scores[ESTIMATES], scores[method], strict=True):
            if not own.comparable(other):
                raise ValueError(
                    f"{folders.path(method, own.track)} is of other frames, stems or audio than "
                    "the estimates; evaluate them again, with another bounds_dir"
                )
