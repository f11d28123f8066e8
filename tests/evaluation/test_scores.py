"""A song's scores as a file: what is read is what was written, and our part is strict JSON."""

import json
import math

import numpy as np
import pytest

from tfswa_lab.evaluation.scores import OURS, RATIOS, TrackScores, read_scores, write_scores
from tfswa_lab.evaluation.scoring import Evaluation, Scoring

NAN, INF = math.nan, math.inf


class Own:
    """Estimates with settings that are called as ours are."""

    stems = ("vocals", "other")

    def __init__(self, **settings):
        self.of = settings

    def settings(self):
        return self.of


def refuse(constant):
    raise AssertionError(f"{constant} is no strict JSON")


def test_numbers_that_json_lacks_are_written_and_read_back(tmp_path):
    frames = {"vocals": {ratio: [1.0, NAN] for ratio in RATIOS}}
    whole = {"vocals": {"uSDR": INF, "SI-SDR": -INF}, "other": {"uSDR": NAN, "SI-SDR": 2.5}}
    scores = TrackScores("A", frames, whole, 1.0, 1.0, {"version": "1"}, {}, ("!",), 2.5)
    path = tmp_path / "test" / "A.json"
    write_scores({path: scores})
    content = json.loads(path.read_text())
    json.loads(json.dumps(content[OURS]), parse_constant=refuse)
    assert content[OURS]["whole"]["vocals"] == {"uSDR": "inf", "SI-SDR": "-inf"}
    assert content[OURS]["whole"]["other"] == {"uSDR": None, "SI-SDR": 2.5}
    there = read_scores(path)
    assert there.whole["vocals"] == whole["vocals"]
    assert math.isnan(there.whole["other"]["uSDR"])
    assert there.whole["other"]["SI-SDR"] == 2.5
    assert there.notes == ("!",)
    frame = content["targets"][0]["frames"][1]  # museval's part is museval's: NaN for none
    assert math.isnan(frame["metrics"]["SDR"])
    assert frame["time"] == 1.0


def test_settings_of_an_estimator_never_replace_ours():
    scoring = Scoring(Own(window=9, stems="all", version="x"), Evaluation(window=2.0))
    settings = scoring.settings("estimates")
    assert settings["window"] == 2.0
    assert settings["stems"]["vocals"] == ["vocals"]
    assert settings["estimator"] == {"window": 9, "stems": "all", "version": "x"}
    assert "estimator" not in scoring.settings("irm")
    for value in (NAN, {1, 2}):
        with pytest.raises(ValueError, match="must be of JSON's types"):
            Scoring(Own(value=value)).settings("estimates")


@pytest.mark.parametrize("value", [INF, NAN, 0, -1, 1e-6, 1e300])
def test_durations_that_make_no_sense_are_refused(value):
    for name in ("window", "hop", "seconds"):
        with pytest.raises(ValueError, match=rf"^{name}=\S+ must be seconds, from 0"):
            Evaluation(**{name: value})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"jobs": 0}, "^jobs=0 must be 1 or more"),
        ({"jobs": 1.5}, r"^jobs=1\.5 must be"),
        ({"jobs": True}, "^jobs=True must be"),
        ({"jobs": "2"}, "^jobs='2' must be"),
        ({"bounds": "irm"}, r"write \('irm',\)"),
        ({"overwrite": "no"}, "^overwrite='no' must be True or False"),
        ({"bounds": ["imr"]}, "unknown bound 'imr'; did you mean 'irm'"),
        ({"split": "tset"}, "unknown split 'tset'; did you mean 'test'"),
        ({"device": "tpu"}, "device='tpu' is unknown"),
    ],
)
def test_other_options_that_make_no_sense_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(**option)


def test_numbers_of_numpy_and_iterators_are_kept_as_json_has_them():
    how = Evaluation(window=np.float32(2), hop=np.int64(1), bounds=iter(["mixture"]))
    assert how == Evaluation(window=2.0, hop=1.0, bounds=("mixture",))
    assert Scoring(Own(), how).settings("estimates")["window"] == 2.0
