"""`tfswa-lab evaluate` as a user types it."""

import json
import shutil

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from tfswa_lab.cli import app


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


@pytest.fixture
def data(band_root, tmp_path):
    """The beginning of one song of the band."""
    song = min((band_root / "test").iterdir())
    for path in song.glob("*.wav"):
        copy = tmp_path / "data" / "test" / song.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(copy, *soundfile.read(path, 80_000))
    return tmp_path / "data"


def test_without_model_the_shipped_one_is_scored_and_a_second_time_nothing(
    data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    result = run("--data-root", data, "--jobs", 1, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "(SiSEC)" in result.output
    assert "(Music Demixing)" in result.output
    (scores,) = (tmp_path / "evaluations" / "band" / "test").glob("*.json")
    stems = [target["name"] for target in json.loads(scores.read_text())["targets"]]
    assert stems == ["vocals", "drums", "bass", "other"]
    text = (tmp_path / "evaluations" / "band" / "test.md").read_text()
    assert "| vocals | mixture (floor) |" in text
    before = scores.stat().st_mtime_ns
    assert run("--data-root", data, "--device", "cpu").exit_code == 0
    assert scores.stat().st_mtime_ns == before


def test_without_data_the_band_is_scored(band_root, tmp_path):
    estimates = shutil.copytree(band_root / "test", tmp_path / "estimates")
    options = ["--seconds", 0.3, "--window", 0.1, "--hop", 0.1, "--no-bounds", "--jobs", 1]
    result = run(
        "--estimates",
        estimates,
        "--stems",
        "vocals,other",
        "--output-dir",
        tmp_path / "o",
        *options,
    )
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "o" / "test").glob("*.json"))) == 6
    assert not (tmp_path / "o" / "bounds").exists()


def test_errors_are_short_and_say_what_to_do(data, tmp_path):
    (song,) = (data / "test").iterdir()
    for options, words in (
        (["--estimates", tmp_path / "no"], "no such folder of estimates"),
        (["--estimates", data, "--model", tmp_path], "leave one out"),
        (["--stems", "vocals"], "a model has its own"),
        (["--model", tmp_path], "separator.json is missing"),
        (["--estimates", data, "--split", "tests"], "did you mean 'test'"),
        (["--estimates", data, "--window", 0], "window=0.0 must be"),
    ):
        result = run("--data-root", data, "--output-dir", tmp_path / "o", "--jobs", 1, *options)
        assert result.exit_code == 1, (options, result.output)
        assert words in result.output
        assert "Traceback" not in result.output
    soundfile.write(song / "bass.wav", np.zeros((80_000, 2)), 48_000)
    result = run("--data-root", data, "--output-dir", tmp_path / "o")
    assert result.exit_code == 1
    assert "48000 Hz" in result.output
