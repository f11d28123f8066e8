"""Tables and the picture of a report, from scores that are written down here."""

import math
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
from matplotlib.collections import LineCollection, PathCollection

from tfswa_lab.evaluation.report import Report
from tfswa_lab.evaluation.scores import RATIOS, TrackScores
from tfswa_lab.teaching.score_plot import plot_scores, write_picture

NAN = math.nan
SETTINGS = {
    "version": "1.2",
    "seconds": 3.0,
    "estimator": {"model": "0123456789abcdef" * 4, "overlap": 0.25},
}


def scored(track, sdr, usdr, notes=()):
    frames = {stem: dict.fromkeys(RATIOS, values) for stem, values in sdr.items()}
    whole = {stem: {"uSDR": value, "SI-SDR": value + 1} for stem, value in usdr.items()}
    return TrackScores(track, frames, whole, 1.0, 1.0, SETTINGS, {}, notes, 3.0)


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


def test_what_was_not_scored_is_refused_by_name(report):
    for ask in (report.medians, report.means, lambda method: report.by_song("SDR", method)):
        with pytest.raises(ValueError, match="method='irm' was not scored; there is estimates"):
            ask("irm")
    with pytest.raises(ValueError, match="ratio='SDR': choose one of uSDR, SI-SDR"):
        report.means(ratio="SDR")  # which has no mean of whole songs


def test_the_two_never_share_a_table_and_bounds_are_beside(report):
    medians, means, songs, wholes = report.tables()
    assert ("vocals", "estimates", "2.50", "2.50", "2.50", "2.50") in medians.rows
    assert ("vocals", "mixture (floor)", *["-5.00"] * 4) in medians.rows
    assert means.columns == ("stem", "mixture (floor)", "estimates", "Wiener oracle")
    assert means.rows[-1] == ("mean of stems", "-5.00", "3.50", ">100")
    assert songs.title == "Median over frames of SDR, in dB (floor … higher ceiling)"
    assert songs.rows[2] == ("C", "– (-5.00 … >100)", "2.00 (-5.00 … >100)")
    assert wholes.rows[0] == ("A", "1.50 (-5.00 … >100)", "4.50 (-5.00 … >100)")
    text = report.to_markdown()
    assert "| song | vocals | other |\n| --- | --: | --: |\n| A |" in text
    assert text.endswith("\n\n- C: !\n")


def test_it_says_what_was_scored(report):
    assert report.facts() == {
        "songs": "3, the first 3 s of each: 9 s",
        "frames": "of 1 s, 1 s apart; scored: vocals 6, other 8 of 9",
        "estimates": "model: 01234567…, overlap: 0.25",
        "tfswa-lab": "1.2",
    }
    found = replace(report, origin={"model": "runs/tiny/best"}, gaps=("3 of 5 songs",))
    text = found.to_markdown()
    assert text.startswith("- model: runs/tiny/best\n- songs: 3, the first 3 s of each: 9 s\n")
    assert "- 3 of 5 songs\n- C: !" in text


def test_it_is_short_in_print(report):
    assert repr(report) == "<Report of 3 songs: mixture, estimates, mwf>"
    assert str(report) == report.tables()[0].to_markdown()


def test_notes_of_bounds_are_told_unless_the_estimates_have_the_same(report):
    floor = [replace(song, notes=("!", "mono")) for song in report.scores["mixture"]]
    noted = replace(report, scores=report.scores | {"mixture": floor})
    assert noted.notes()[-3:] == [
        "B, mixture (floor): mono",
        "C: !",
        "C, mixture (floor): mono",
    ]


def test_the_higher_ceiling_is_shown_whichever_it_is(report):
    values = ({"vocals": 200.0, "other": NAN}, {"vocals": 3.0, "other": 4.0})
    irm = [
        scored(x, {s: [v] for s, v in one.items()}, one)
        for x, one in zip("AB", values, strict=True)
    ]
    best = {"vocals": 9.0, "other": 5.0}
    mwf = [scored(x, {s: [v] for s, v in best.items()}, best) for x in "AB"]
    both = Report({"estimates": report.scores["estimates"][:2], "irm": irm, "mwf": mwf})
    assert both.tables()[3].rows == (
        ("A", "1.50 (>100)", "4.50 (5.00)"),
        ("B", "4.50 (9.00)", "6.50 (5.00)"),
    )


def test_without_bounds(report):
    alone = Report({"estimates": report.scores["estimates"]})
    assert alone.tables()[2].rows[0] == ("A", "2.00", "5.00")
    assert alone.tables()[2].title == "Median over frames of SDR, in dB"


def test_the_picture_has_a_point_for_every_score(report):
    fig, ax = plot_scores(report, "uSDR")
    dots = [x for x in ax.collections if isinstance(x, PathCollection)]
    heights = [y for songs in dots for _, y in songs.get_offsets().data.tolist()]
    drawn = [x for x in ax.collections if isinstance(x, LineCollection)]
    lines = [line.get_segments()[0][0, 1] for line in drawn]
    assert (
        sorted(y for y in heights if not math.isnan(y))
        == [-5.0] * 6 + [1.0, 1.5, 4.5, 4.5, 6.5] + [193.0] * 6
    )
    assert lines == [-5.0, 3.0, 193.0, -5.0, 4.0, 193.0]
    assert ax.get_ylabel() == "uSDR in dB\n(whole song)"
    assert plot_scores(report, ax=ax)[1] is ax
    with pytest.raises(ValueError, match="ratio='SNR': choose one of SDR, ISR, SIR, SAR, uSDR"):
        plot_scores(report, "SNR", ax)
    plt.close(fig)


@pytest.mark.parametrize("songs", [1, 3])
def test_the_file_of_the_picture_needs_no_screen_and_leaves_no_figure(report, songs, tmp_path):
    some = Report({method: scores[:songs] for method, scores in report.scores.items()})
    before = plt.get_fignums()
    write_picture(some, tmp_path / "test.png")
    assert plt.get_fignums() == before
    picture = plt.imread(tmp_path / "test.png")  # (height, width, 4)
    assert picture.shape[0] == 960
    assert picture.shape[1] > 900
    assert 0.01 < (picture[..., :3].min(-1) < 0.9).mean() < 0.2  # something, and mostly white
    assert [path.name for path in tmp_path.iterdir()] == ["test.png"]
