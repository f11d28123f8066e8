"""The picture of a report: each song between the floor and the ceilings.

Notebook: 08_evaluation
"""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tfswa_lab.evaluation.store import RATIOS, TrackScores
from tfswa_lab.evaluation.summary import NAMES, Report
from tfswa_lab.teaching.plots import OTHER_COLOUR, STEM_COLOURS

MARKS = {"mixture": "_", "estimates": "o", "irm": "x", "mwf": "+"}


def plot_scores(report: Report, ratio: str = "SDR", ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Every song's score, floor and ceilings, stem by stem, in dB.

    Args:
        report: of `evaluate`.
        ratio: SDR, ISR, SIR or SAR, medians over frames; or uSDR or SI-SDR, of whole songs.
        ax: where to draw.

    Notebook: 08_evaluation
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(8, 3.6), layout="constrained", dpi=100)
    count = len(report.methods)
    for place, stem in enumerate(report.stems):
        colour = STEM_COLOURS.get(stem, OTHER_COLOUR)
        for number, method in enumerate(report.methods):
            songs = [of_song(song, stem, ratio) for song in report.scores[method]]
            x = place + 0.7 * ((number + 0.5) / count - 0.5)
            # Side by side, or songs of equal scores would hide one another.
            spread = [x + 0.1 * ((i + 0.5) / len(songs) - 0.5) for i in range(len(songs))]
            ax.scatter(spread, songs, 30, colour, marker=MARKS[method], linewidths=1.2)
    for method in report.methods:  # in grey: a stem's colour is no part of the legend
        ax.scatter([], [], 30, OTHER_COLOUR, marker=MARKS[method], label=NAMES[method])
    what = "median over frames" if ratio in RATIOS else "whole song"
    ax.set(ylabel=f"{ratio} in dB ({what})", xlim=(-0.5, len(report.stems) - 0.5))
    ax.set_xticks(range(len(report.stems)), report.stems)
    ax.grid(axis="y", alpha=0.3)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return ax.figure, ax


def of_song(song: TrackScores, stem: str, ratio: str) -> float:
    """One number of a song, NaN where it has none.

    Raises:
        ValueError: there is no such ratio.

    Notebook: 08_evaluation
    """
    known = song.medians[stem] | song.whole[stem]
    if ratio not in known:
        raise ValueError(f"ratio={ratio!r}: choose one of {', '.join(known)}")
    return known[ratio] if math.isfinite(known[ratio]) else math.nan
