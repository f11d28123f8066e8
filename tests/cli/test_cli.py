"""`tfswa-lab separate` as a user types it."""

import pytest
import soundfile
import torch
from typer.testing import CliRunner

from tfswa_lab import audio
from tfswa_lab.cli import app
from tfswa_lab.models import storage
from tfswa_lab.models.separator import build_separator
from tfswa_lab.models.storage import load_separator, save_separator

MINI = {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": 1, "window_size": 4}


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    separator = build_separator(
        ("vocals", "other"), n_fft=512, hop_length=128, mixture_consistency=True, **MINI
    )
    return save_separator(separator, tmp_path / "model")


def run(*arguments):
    return CliRunner().invoke(app, ["separate", *map(str, arguments)])


@pytest.mark.parametrize(
    ("rate", "samples", "channels"), [(44_100, 60_001, 2), (48_000, 30_000, 1), (16_000, 1, 2)]
)
def test_any_rate_and_length_gives_stems_of_that_rate_and_length(
    model, tmp_path, rate, samples, channels
):
    song = audio.write(tmp_path / "song.wav", 0.1 * torch.randn(channels, samples), rate)
    result = run(song, "--model", model, "--out", tmp_path / "out", "--segment-seconds", 0.5)
    assert result.exit_code == 0, result.output
    mixture, _ = audio.read(song)
    stems = [audio.read(tmp_path / "out" / f"song_{s}.wav") for s in ("vocals", "other")]
    assert [r for _, r in stems] == [rate, rate]
    assert all(stem.shape == (2, samples) for stem, _ in stems)
    if rate == 44_100:  # consistent, and not resampled: the stems sum to the song
        total = stems[0][0] + stems[1][0]
        torch.testing.assert_close(total, mixture, atol=3 / 32_768, rtol=0)


def test_a_model_of_mono_mixtures_gives_mono_stems(tmp_path):
    separator = build_separator(
        ("voice",), n_fft=512, hop_length=128, sample_rate=16_000, audio_channels=1, **MINI
    )
    mono = save_separator(separator, tmp_path / "mono")
    song = audio.write(tmp_path / "song.wav", 0.1 * torch.randn(2, 30_000))
    result = run(song, "--model", mono, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    voice, rate = audio.read(tmp_path / "out" / "song_voice.wav")
    assert (voice.shape, rate) == ((1, 30_000), 44_100)


def test_a_missing_song_and_a_missing_model_are_named(model, tmp_path):
    result = run(tmp_path / "no.wav", "--model", model, "--out", tmp_path)
    assert result.exit_code == 2
    assert "no.wav" in result.output
    song = audio.write(tmp_path / "song.wav", torch.zeros(2, 1000))
    result = run(song, "--model", tmp_path / "nowhere", "--out", tmp_path)
    assert result.exit_code == 2
    assert "separator.json" in result.output


def test_an_output_folder_that_is_a_file_is_refused_before_the_work(model, tmp_path):
    song = audio.write(tmp_path / "song.wav", torch.zeros(2, 1000))
    result = run(song, "--model", model, "--out", song)
    assert result.exit_code == 2
    assert "name a folder" in result.output


def test_nan_in_the_song_is_refused_before_any_stem_is_written(model, tmp_path):
    soundfile.write(tmp_path / "nan.wav", torch.full((99, 2), torch.nan).numpy(), 44_100, "FLOAT")
    result = run(tmp_path / "nan.wav", "--model", model, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_batches_and_shifts_change_little_and_float_keeps_all(model, tmp_path):
    song = audio.write(tmp_path / "song.wav", 0.1 * torch.randn(2, 33_000))
    stems = []
    for i, more in enumerate([(), ("--float",), ("--float", "--batch-size", 2), ("--shifts", 2)]):
        out = tmp_path / str(i)
        result = run(song, "--model", model, "--out", out, "--segment-seconds", 0.5, *more)
        assert result.exit_code == 0, result.output
        stems.append(audio.read(out / "song_vocals.wav")[0])
    plain, floats, batched, shifted = stems
    assert torch.equal(plain, (floats * 32_768).round() / 32_768)
    torch.testing.assert_close(batched, floats, atol=1e-6, rtol=0)
    assert 0 < (shifted - plain).abs().max() < 0.1


def answer(monkeypatch, forward):
    """Every model that is loaded from now on answers so."""

    def load(folder):
        separator = load_separator(folder)
        separator.forward = forward
        return separator

    monkeypatch.setattr(storage, "load_separator", load)


def test_the_gain_against_clipping_is_told(model, tmp_path, monkeypatch):
    answer(monkeypatch, lambda mixture: torch.stack([4 * mixture, mixture], 1))
    song = audio.write(tmp_path / "song.wav", torch.full((2, 1000), 0.5))
    result = run(song, "--model", model, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "all stems are scaled by 0.500" in result.output
    other, _ = audio.read(tmp_path / "out" / "song_other.wav")
    assert torch.equal(other, torch.full((2, 1000), 0.25))
    result = run(song, "--model", model, "--out", tmp_path / "out", "--float")
    assert "scaled" not in result.output


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nGPU 0 has …"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to …"),
        MemoryError(),
    ],
)
def test_no_memory_for_a_single_segment_is_told_in_one_line(model, tmp_path, monkeypatch, error):
    def fail(mixture):
        raise error

    answer(monkeypatch, fail)
    song = audio.write(tmp_path / "song.wav", torch.zeros(2, 1000))
    result = run(song, "--model", model, "--out", tmp_path / "out", "--batch-size", 4)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if "Error" in line]
    assert line.startswith("Error: out of memory")
    assert ("(tried to allocate 9.00 GiB)" in line) == ("9.00 GiB" in str(error))
    assert "--segment-seconds" in line
    assert "Traceback" not in result.output
    assert list((tmp_path / "out").iterdir()) == []
