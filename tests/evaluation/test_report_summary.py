"""Tables and the picture of a report, from scores that are written down here."""

import math

import matplotlib.pyplot as plt
import pytest

from tfswa_lab.evaluation.store import RATIOS, TrackScores
from tfswa_lab.evaluation.summary import Report
from tfswa_lab.teaching.score_plot import plot_scores

NAN = math.nan


def scored(track, sdr, usdr, notes=()):
    frames = {stem: dict.fromkeys(RATIOS, values) for stem, values in sdr.items()}
    whole = {stem: {"uSDR": value, "SI-SDR": value + 1} for stem, value in usdr.items()}
    return TrackScores(track, frames, whole, 1.0, 1.0, {}, {}, notes, 3.0)


@pytest.fixture
def report():
    silent = {"vocals": [NAN] * 3, "other": [2, 2, 2]}
    estimates = [
        scored("A", {"vocals": [1, 2, 9], "other": [NAN, 4, 6]}, {"vocals": 1.5, "other": 4.5}),
        scored("B", {"vocals": [3, 3, 3], "other": [1, 1, 8]}, {"vocals": 4.5, "other": 6.5}),
        scored("C", silent, {"vocals": NAN, "other": 1.0}, notes=("!",)),
    ]
    floor, best = (
        [scored(x, {s: [v] for s in ("vocals", "other")}, {"vocals": v, "other": v}) for x in "ABC"]
        for v in (-5.0, 193.0)
    )
    return Report({"estimates": estimates, "mixture": floor, "mwf": best})


def test_medians_of_medians_and_means_of_wholes(report):
    assert {stem: ratios["SDR"] for stem, ratios in report.medians().items()} == {
        "vocals": 2.5,  # of 2 and 3
        "other": 2.0,  # of 5, 1 and 2
    }
    assert report.means() == {"vocals": 3.0, "other": 4.0}
    assert report.means(ratio="SI-SDR") == {"vocals": 4.0, "other": 5.0}


def test_the_two_never_share_a_table_and_bounds_are_beside(report):
    medians, means, songs, wholes = report.tables()
    assert ("vocals", "estimates", "2.50", "2.50", "2.50", "2.50") in medians.rows
    assert ("vocals", "mixture (floor)", *["-5.00"] * 4) in medians.rows
    assert means.columns == ("stem", "mixture (floor)", "estimates", "Wiener oracle")
    assert means.rows[-1] == ("mean of stems", "-5.00", "3.50", ">100")
    assert songs.rows[2] == ("C", "– (-5.00 … >100)", "2.00 (-5.00 … >100)")
    assert wholes.rows[0] == ("A", "1.50 (-5.00 … >100)", "4.50 (-5.00 … >100)")
    text = report.to_markdown()
    assert "| song | vocals | other |\n| --- | --: | --: |\n| A |" in text
    assert text.endswith("\n\n- C: !\n")


def test_without_bounds(report):
    alone = Report({"estimates": report.scores["estimates"]})
    assert alone.tables()[2].rows[0] == ("A", "2.00", "5.00")
    assert alone.tables()[2].title == "Median over frames of SDR, in dB"


def test_the_picture_has_a_point_for_every_score(report):
    fig, ax = plot_scores(report, "uSDR")
    points = [tuple(y) for marks in ax.collections for y in marks.get_offsets().data.tolist()]
    heights = sorted(y for _, y in points if not math.isnan(y))
    assert heights == [-5.0] * 6 + [1.0, 1.5, 4.5, 4.5, 6.5] + [193.0] * 6
    assert ax.get_ylabel() == "uSDR in dB (whole song)"
    assert plot_scores(report, ax=ax)[1] is ax
    with pytest.raises(ValueError, match="ratio='SNR': choose one of SDR, ISR, SIR, SAR, uSDR"):
        plot_scores(report, "SNR", ax)
    plt.close(fig)
