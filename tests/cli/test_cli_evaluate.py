"""`tfswa-lab evaluate` as a user types it."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

from tfswa_lab.cli import app
from tfswa_lab.cli.evaluate import EvaluateOptions
from tfswa_lab.evaluation.estimates import ModelEstimates
from tfswa_lab.evaluation.scoring import Evaluation
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


def test_stems_that_separate_wrote_as_flac_are_scored(data, tmp_path):
    (song,) = (data / "test").iterdir()
    folder = tmp_path / "E" / song.name
    folder.mkdir(parents=True)
    for name in ("vocals", "other"):
        soundfile.write(folder / f"{name}.flac", *soundfile.read(song / f"{name}.wav"))
    common = ["--estimates", tmp_path / "E", "--data-root", data, "--no-bounds", "--jobs", 1]
    result = run(*common, "--output-dir", tmp_path / "o")
    assert result.exit_code == 1
    assert "--stems vocals,other" in result.output
    result = run(*common, "--output-dir", tmp_path / "o", "--stems", "vocals")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "o" / "test.md").is_file()


def test_the_mixture_of_another_song_is_refused_unless_allowed(data, tmp_path):
    (song,) = (data / "test").iterdir()
    bass, rate = soundfile.read(song / "bass.wav")
    soundfile.write(song / "mixture.wav", bass[::-1], rate)
    common = ["--estimates", data / "test", "--data-root", data, "--no-bounds", "--jobs", 1]
    common += ["--output-dir", tmp_path / "o", "--stems", "vocals"]
    result = run(*common)
    assert result.exit_code == 1
    assert "mixture.wav is not the sum of its stems" in result.output
    assert "--allow-mismatch" in result.output
    result = run(*common, "--allow-mismatch")
    assert result.exit_code == 0, result.output
    assert "the mixture is not the sum of its stems: without them, +" in result.output


def test_a_model_can_be_a_name_or_a_run(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BAND, tmp_path / "runs" / "tiny" / "best")
    assert EvaluateOptions(model="band").source == EvaluateOptions().source == BAND
    options = ["--data-root", data, "--seconds", 0.5, "--no-bounds", "--jobs", 1]
    result = run("--model", "runs/tiny", *options)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "evaluations" / "tiny" / "best" / "test.md").is_file()
    result = run("--model", "bond", *options)
    assert result.exit_code == 1
    assert "one of: band" in result.output


def test_scores_of_a_model_on_an_apple_gpu_are_computed_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match="device='mps' has no float64"):
        Evaluation(device="mps")
    how = EvaluateOptions(device="mps").evaluation(torch.device("mps"))
    assert how.device == "cpu"
    assert how.jobs == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such names")
def test_a_song_whose_name_is_no_utf8_is_scored(data, tmp_path):
    (song,) = (data / "test").iterdir()
    song.rename(song.with_name(os.fsdecode(b"caf\xe9 - [b]x")))
    options = ["--estimates", data, "--stems", "vocals,other", "--no-bounds", "--jobs", 1]
    for _ in range(2):  # and again, when nothing is left to score
        result = run(*options, "--data-root", data, "--output-dir", tmp_path / "o")
        assert result.exit_code == 0, result.output
        assert "caf? - [b]x" in result.output
    assert "| caf? - [b]x |" in (tmp_path / "o" / "test.md").read_text("utf-8")


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
