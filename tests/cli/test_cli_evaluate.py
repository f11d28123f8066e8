"""`tfswa-lab evaluate` as a user types it."""

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

from tfswa_lab.cli import app
from tfswa_lab.evaluation.estimates import ModelEstimates
from tfswa_lab.weights import BAND


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
    assert "tfswa-lab: 0.1.0" in result.output
    folder = tmp_path / "evaluations" / "weights" / "band"
    assert "evaluations/weights/band/test.md" in result.output
    assert "evaluations/weights/band/test.png" in result.output
    assert (folder / "test.png").read_bytes().startswith(b"\x89PNG")
    (scores,) = (folder / "test").glob("*.json")
    stems = [target["name"] for target in json.loads(scores.read_text())["targets"]]
    assert stems == ["vocals", "drums", "bass", "other"]
    text = (folder / "test.md").read_text()
    assert text.startswith(
        f"- model: {BAND.resolve()}\n- songs of: {data}, test\n- songs: 1, whole"
    )
    assert "segment_seconds: 6.0, overlap: 0.25, shifts: 1" in text
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
    common = ["--data-root", data, "--output-dir", tmp_path / "o", "--jobs", 1]
    for options, words in (
        (["--estimates", tmp_path / "no"], "no such folder of estimates"),
        (["--estimates", data, "--model", tmp_path], "not both"),
        (["--stems", "vocals"], "a model has its own"),
        (["--model", tmp_path], "separator.json is missing"),
        (["--estimates", data, "--split", "tests"], "did you mean 'test'"),
        (["--estimates", data, "--window", 0], "window=0.0 must be seconds"),
        (["--estimates", data, "--hop", "inf"], "hop=inf must be seconds"),
        (["--estimates", data, "--seconds", 1e-6], "seconds=1e-06 must be seconds"),
        (["--seconds", "nan"], "seconds=nan must be seconds"),
        (["--segment-seconds", "inf"], "segment_seconds=inf must be seconds"),
        (["--overlap", 1], "overlap=1.0 must be"),
        (["--batch-size", 0], "batch_size=0 must be"),
        (["--shifts", -1], "shifts=-1 must be"),
        (["--estimates", data, "--jobs", 0], "jobs=0 must be"),
        (["--estimates", data, "--overlap", 0.5, "--shifts", 2], "--overlap, --shifts: "),
        (["--estimates", data, "--output-dir", song / "bass.wav"], "bass.wav is a file; choose"),
        (["--estimates", data, "--bounds-dir", tmp_path / "o"], "is the output folder itself"),
    ):
        result = run(*common, *options)
        assert result.exit_code == 1, (options, result.output)
        assert words in result.output
        assert "Traceback" not in result.output
    soundfile.write(song / "bass.wav", np.zeros((80_000, 2)), 48_000)
    result = run("--data-root", data, "--output-dir", tmp_path / "o")
    assert result.exit_code == 1
    assert "48000 Hz" in result.output


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nGPU 0 has …"),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
        MemoryError(),
    ],
)
def test_no_memory_is_told_in_one_line(data, tmp_path, monkeypatch, error):
    def fail(estimates, track, mixture):
        raise error

    monkeypatch.setattr(ModelEstimates, "estimate", fail)
    result = run("--data-root", data, "--output-dir", tmp_path / "o", "--jobs", 1)
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]  # after the progress bar
    assert line.startswith("Error: out of memory")
    assert "--segment-seconds" in line
    assert "--jobs" in line
    assert "Traceback" not in result.output
