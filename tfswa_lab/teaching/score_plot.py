"""The picture of a report: each song between the floor and the ceilings.

Notebook: 08_evaluation
"""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tfswa_lab.durable import write_whole
from tfswa_lab.evaluation.bsseval import ignoring_nan
from tfswa_lab.evaluation.report import NAMES, Report
from tfswa_lab.evaluation.scores import RATIOS
from tfswa_lab.teaching.plots import OTHER_COLOUR, STEM_COLOURS

MARKS = {"mixture": "v", "estimates": "o", "irm": "^", "mwf": "D"}


def plot_scores(report: Report, ratio: str = "SDR", ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Every song's score, floor and ceilings, stem by stem, in dB.

    A dot is a song, in the order of the report. A line is the number in the report's tables: the
    median over songs of SDR, ISR, SIR or SAR, or the mean of uSDR or SI-SDR.

    Args:
        report: of `evaluate`.
        ratio: SDR, ISR, SIR or SAR, medians over frames; or uSDR or SI-SDR, of whole songs.
        ax: where to draw.

    Raises:
        ValueError: there is no such ratio.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(8, 3.6), layout="constrained", dpi=100)
    width = 0.84 / len(report.methods)  # of a column; stems are 1 apart
    for place, stem in enumerate(report.stems):
        for number, method in enumerate(report.methods):
            left = place - 0.42 + number * width
            songs = report.by_song(ratio, method)[:, place]
            songs = np.where(np.isfinite(songs), songs, np.nan)
            look = _look(method, STEM_COLOURS.get(stem, OTHER_COLOUR))
            ax.scatter(_spread(len(songs), left, width), songs, max(8, 30 - len(songs)), **look)
            of_all = ignoring_nan(np.nanmedian if ratio in RATIOS else np.nanmean, songs)
            ax.hlines(of_all, left + 0.1 * width, left + 0.9 * width, "black", linewidth=1.5)
    for method in report.methods:  # in grey: a stem's colour is no part of the legend
        ax.scatter([], [], 24, **_look(method, OTHER_COLOUR), label=NAMES[method])
    across = "median" if ratio in RATIOS else "mean"
    ax.plot([], [], color="black", label=f"{across} over songs")
    what = "median over frames" if ratio in RATIOS else "whole song"
    ax.set(ylabel=f"{ratio} in dB\n({what})", xlim=(-0.5, len(report.stems) - 0.5))
    ax.set_xticks(range(len(report.stems)), report.stems)
    ax.grid(axis="y", alpha=0.3)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return ax.figure, ax


def _spread(count: int, left: float, width: float) -> list[float]:
    """Places side by side: at one place, songs of equal scores would hide one another."""
    return [left + width * (0.15 + 0.7 * (number + 0.5) / count) for number in range(count)]


def _look(method: str, colour: str) -> dict:
    """Estimates are filled, their bounds are outlines."""
    filled = method == "estimates"
    return {
        "marker": MARKS[method],
        "facecolors": colour if filled else "none",
        "edgecolors": colour,
        "linewidths": 0.8,
    }


def write_picture(report: Report, path: Path) -> None:
    """Draw SDR above uSDR into a PNG file, which appears whole or not at all.

    No screen is needed, and no figure stays open.

    Raises:
        OSError: the file cannot be written.
    """
    wide = 3.5 + 1.6 * len(report.stems)
    figure = Figure(figsize=(wide, 6.4), layout="constrained", dpi=150)
    for ax, ratio in zip(figure.subplots(2), ("SDR", "uSDR"), strict=True):
        plot_scores(report, ratio, ax)
    facts = [f"{name}: {report.facts()[name]}" for name in (*report.origin, "songs")]
    figure.suptitle("\n".join(facts), x=0.01, ha="left", fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_whole({path: [content.getvalue()]})
