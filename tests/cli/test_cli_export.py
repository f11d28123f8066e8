"""`tfswa-lab export` as a user types it, and `tfswa-lab separate` with what it wrote."""

import pytest
import torch
from typer.testing import CliRunner

from tfswa_lab import audio
from tfswa_lab.cli import app
from tfswa_lab.models.mask_resunet import MaskResUNet
from tfswa_lab.models.separator import build_separator
from tfswa_lab.models.storage import save_separator
from tfswa_lab.performance import export_check

MASK = {"channels": (8, 8), "bottleneck": 8, "num_heads": 2, "sub_bands": 2}


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    separator = build_separator(
        ("vocals", "other"), "complex", 4, 128, 32, architecture=MaskResUNet, **MASK
    )
    return save_separator(separator, tmp_path / "model")


@pytest.fixture(autouse=True)
def few_sizes(monkeypatch):
    """Those of `tests/performance/test_export.py` are all."""
    few = [(1, 1), (1, 100), (2, 1000), (3, 33)]
    monkeypatch.setattr(export_check, "sizes", lambda *_: few)


def run(command, *arguments):
    return CliRunner().invoke(app, [command, *map(str, arguments)])


@pytest.mark.parametrize("options", [(), ("--with-stft",)])
def test_an_export_separates_as_its_model_does(model, tmp_path, options):
    done = run("export", model, "--out", tmp_path / "small.onnx", *options)
    assert done.exit_code == 0, done.output
    assert "4 of 4 sizes agree" in done.output
    song = audio.write(tmp_path / "song.wav", 0.1 * torch.randn(2, 20_000))
    for name, source in (("a", model), ("b", tmp_path / "small.onnx")):
        out = tmp_path / name
        result = run("separate", song, "--model", source, "--out", out, "--bits", "32f")
        assert result.exit_code == 0, result.output
    for stem in ("vocals", "other"):
        right, found = (audio.read(tmp_path / name / f"{stem}.wav")[0] for name in ("a", "b"))
        torch.testing.assert_close(found, right, atol=1e-5, rtol=0)


def test_the_file_is_named_after_the_model_and_stays(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("export", model, "--format", "torchscript").exit_code == 0
    assert (tmp_path / "model.ts").is_file()
    again = run("export", model, "--format", "torchscript")
    assert again.exit_code == 1
    assert "model.ts exists; use --overwrite" in again.output
    assert run("export", model, "--format", "torchscript", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "tflite"), "Error: format='tflite' is unknown; choose onnx, pt2"),
        (("--precision", "int4"), "Error: precision='int4' is unknown; choose fp32, fp16, int8"),
        (("--out", "a.onnx", "--format", "pt2"), "Error: a.onnx ends in .onnx, but format='pt2'"),
        (("--out", "a.zip"), "Error: a.zip ends in .zip, but format='onnx' needs .onnx"),
    ],
)
def test_wrong_choices_are_one_line(model, options, message):
    result = run("export", model, *options)
    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.splitlines()) == 1


def test_a_program_that_is_not_the_model_ends_with_its_sizes(model, tmp_path, monkeypatch):
    monkeypatch.setattr(export_check, "largest_error", lambda *_: 0.5)
    result = run("export", model, "--out", tmp_path / "a.ts")
    assert result.exit_code == 1
    assert "Error: a.ts is not the network: 0 of 4 sizes agree" in result.output
    assert not (tmp_path / "a.ts").exists()


def test_a_model_that_is_not_there_is_named(tmp_path):
    result = run("export", tmp_path / "nothing")
    assert result.exit_code == 1
    assert "nothing/separator.json is missing" in result.output
    result = run("separate", "song.wav", "--model", tmp_path / "no.onnx")
    assert "no such file; write one with tfswa-lab export" in result.output
