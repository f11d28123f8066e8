"""The report of an evaluation: SiSEC's medians and the Music Demixing Challenge's means.

The two are different numbers of different definitions and never share a table.

Notebook: 08_evaluation
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tfswa_lab.evaluation.bsseval import ignoring_nan
from tfswa_lab.evaluation.oracles import BOUNDS
from tfswa_lab.evaluation.scores import (
    ESTIMATES,
    RATIOS,
    Folders,
    Ratios,
    TrackScores,
    difference,
    read_scores,
    shortened,
)

PERFECT = 100  # dB; there is no error but that of rounding
# What is scored: its name in tables.
NAMES = {
    "mixture": "mixture (floor)",
    "estimates": "estimates",
    "irm": "ideal ratio mask",
    "mwf": "Wiener oracle",
}
# What a song's score lies between, if it was scored.
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
        gaps: what is missing of it, for the reader.
        origin: where estimates and songs come from, for the reader.
    """

    scores: dict[str, list[TrackScores]]
    gaps: tuple[str, ...] = ()
    origin: dict[str, str] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """What was scored, from the floor to the ceiling."""
        return [method for method in NAMES if method in self.scores]

    @property
    def tracks(self) -> list[str]:
        """Names of the songs."""
        return [track.track for track in self.scores["estimates"]]

    @property
    def stems(self) -> tuple[str, ...]:
        """Names of the stems."""
        return tuple(self.scores["estimates"][0].frames)

    def medians(self, method: str = "estimates") -> Ratios:
        """SiSEC: stem → ratio → the median over songs of the median over frames, in dB."""
        songs = [track.medians for track in self.scores[method]]
        return {
            stem: {
                ratio: ignoring_nan(np.nanmedian, [song[stem][ratio] for song in songs])
                for ratio in RATIOS
            }
            for stem in self.stems
        }

    def means(self, method: str = "estimates", ratio: str = "uSDR") -> dict[str, float]:
        """Music Demixing Challenge: stem → the mean over songs of one ratio of the whole song.

        Args:
            method: what was scored.
            ratio: "uSDR" or "SI-SDR".
        """
        songs = [track.whole for track in self.scores[method]]
        return {
            stem: ignoring_nan(np.nanmean, [song[stem][ratio] for song in songs])
            for stem in self.stems
        }

    def facts(self) -> dict[str, str]:
        """What was scored, and how, in words."""
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
            self._songs_table("Median over frames of SDR, in dB", median_sdr),
            self._songs_table("uSDR, in dB", whole_sdr),
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

    def _songs_table(self, title: str, score: Callable[[TrackScores, str], float]) -> Table:
        """Each score with the floor and the higher ceiling, as far as they are there."""
        ends = {
            name: [self.scores[method] for method in methods if method in self.scores]
            for name, methods in ENDS.items()
        }
        ends = {name: bounds for name, bounds in ends.items() if bounds}
        rows = []
        for number, song in enumerate(self.scores["estimates"]):
            around = [[songs[number] for songs in bounds] for bounds in ends.values()]
            cells = [_between(song, around, stem, score) for stem in self.stems]
            rows.append((song.track, *cells))
        within = f" ({' … '.join(ends)})" if ends else ""
        return Table(title + within, ("song", *self.stems), tuple(rows))

    def notes(self) -> list[str]:
        """What a reader of the scores should know: what is missing, and by song what was done."""
        notes = list(self.gaps)
        for number, song in enumerate(self.scores["estimates"]):
            notes += [f"{song.track}: {note}" for note in song.notes]
            for method in self.methods:  # a bound's, if the estimates have no such note
                new = [x for x in self.scores[method][number].notes if x not in song.notes]
                notes += [f"{song.track}, {NAMES[method]}: {note}" for note in new]
        return notes

    def to_markdown(self) -> str:
        """What was scored, all tables, and notes."""
        texts = ["\n".join(f"- {name}: {value}" for name, value in self.facts().items())]
        texts += [table.to_markdown() for table in self.tables()]
        texts += ["\n".join(f"- {note}" for note in self.notes())] if self.notes() else []
        return "\n\n".join(texts) + "\n"


def _between(
    song: TrackScores,
    ends: Sequence[Sequence[TrackScores]],
    stem: str,
    score: Callable[[TrackScores, str], float],
) -> str:
    """A score and, in brackets, the highest of each of these bounds."""
    highest = [ignoring_nan(np.nanmax, [score(bound, stem) for bound in bounds]) for bounds in ends]
    return show(score(song, stem)) + (f" ({' … '.join(map(show, highest))})" if ends else "")


def median_sdr(song: TrackScores, stem: str) -> float:
    """SiSEC's score of a song."""
    return song.medians[stem]["SDR"]


def whole_sdr(song: TrackScores, stem: str) -> float:
    """The Music Demixing Challenge's."""
    return song.whole[stem]["uSDR"]


def show(value: float) -> str:
    """Two decimals, a dash for none, and what is but rounding as such.

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

    Of an evaluation that was killed it has the songs that are finished, and its notes say so.

    Raises:
        FileNotFoundError: there are no scores.
        ValueError: a file is not of ours, or broken, or of other settings than another.
    """
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
    return read_report(folders, names, there, gaps)


def read_report(
    folders: Folders, tracks: Iterable[str], bounds: Iterable[str], gaps: tuple[str, ...] = ()
) -> Report:
    """Read the scores of these songs.

    Raises:
        FileNotFoundError: they are not all there.
        ValueError: a file is broken, or of other settings, stems or files than another.
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
