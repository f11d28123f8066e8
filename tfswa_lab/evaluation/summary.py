"""What a set of scores comes to: SiSEC's medians and the Music Demixing Challenge's means.

The two are different numbers of different definitions and never share a table.

Notebook: 08_evaluation
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tfswa_lab.evaluation.bsseval import median_of
from tfswa_lab.evaluation.store import RATIOS, Ratios, TrackScores

PERFECT = 100  # dB; there is no error but that of rounding
# What is scored: its name in tables.
NAMES = {
    "mixture": "mixture (floor)",
    "estimates": "estimates",
    "irm": "ideal ratio mask",
    "mwf": "Wiener oracle",
}


@dataclass(frozen=True)
class Table:
    """Rows of texts under a title.

    Notebook: 08_evaluation
    """

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

    Notebook: 08_evaluation
    """

    scores: dict[str, list[TrackScores]]

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
            stem: {ratio: median_of([song[stem][ratio] for song in songs]) for ratio in RATIOS}
            for stem in self.stems
        }

    def means(self, method: str = "estimates", ratio: str = "uSDR") -> dict[str, float]:
        """Music Demixing Challenge: stem → the mean over songs of one ratio of the whole song.

        Args:
            method: what was scored.
            ratio: "uSDR" or "SI-SDR".
        """
        songs = [track.whole for track in self.scores[method]]
        return {stem: mean_of([song[stem][ratio] for song in songs]) for stem in self.stems}

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
            total = (mean_of(list(means[method].values())) for method in means)
            rows.append(("mean of stems", *map(show, total)))
        columns = ("stem", *(NAMES[method] for method in means))
        return Table("Mean over songs of uSDR (Music Demixing), in dB", columns, tuple(rows))

    def _songs_table(self, title: str, score: Callable[[TrackScores, str], float]) -> Table:
        """Each score with the floor and the highest ceiling that there are."""
        bounds = [method for method in self.methods if method != "estimates"]
        bounds = [bounds[0], bounds[-1]] if len(bounds) > 1 else bounds
        rows = []
        for number, song in enumerate(self.scores["estimates"]):
            around = [self.scores[method][number] for method in bounds]
            cells = [_between(song, around, stem, score) for stem in self.stems]
            rows.append((song.track, *cells))
        within = f" ({' … '.join(NAMES[method] for method in bounds)})" if bounds else ""
        return Table(title + within, ("song", *self.stems), tuple(rows))

    def notes(self) -> list[str]:
        """What a reader of the estimates' scores should know, by song."""
        return [f"{song.track}: {note}" for song in self.scores["estimates"] for note in song.notes]

    def to_markdown(self) -> str:
        """All tables and notes."""
        texts = [table.to_markdown() for table in self.tables()]
        texts += ["\n".join(f"- {note}" for note in self.notes())] if self.notes() else []
        return "\n\n".join(texts) + "\n"


def _between(
    song: TrackScores,
    bounds: Sequence[TrackScores],
    stem: str,
    score: Callable[[TrackScores, str], float],
) -> str:
    around = f" ({' … '.join(show(score(bound, stem)) for bound in bounds)})" if bounds else ""
    return show(score(song, stem)) + around


def median_sdr(song: TrackScores, stem: str) -> float:
    """SiSEC's score of a song.

    Notebook: 08_evaluation
    """
    return song.medians[stem]["SDR"]


def whole_sdr(song: TrackScores, stem: str) -> float:
    """The Music Demixing Challenge's.

    Notebook: 08_evaluation
    """
    return song.whole[stem]["uSDR"]


def mean_of(values: Sequence[float]) -> float:
    """The mean of those that are numbers.

    >>> mean_of([1.0, math.nan, 4.0])
    2.5

    Notebook: 08_evaluation
    """
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def show(value: float) -> str:
    """Two decimals, a dash for none, and what is but rounding as such.

    >>> show(3.14159), show(math.nan), show(193.4)
    ('3.14', '–', '>100')

    Notebook: 08_evaluation
    """
    if value > PERFECT:
        return f">{PERFECT}"
    return "–" if math.isnan(value) else f"{value:.2f}"
