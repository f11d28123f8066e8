"""What the browser gets is decoded again and measured: levels, durations, size."""

import base64
import io
import re

import pytest
import soundfile
import torch

from tfswa_lab.audio import rms_db
from tfswa_lab.teaching.player import common_gain, encode_vorbis, play

RATE = 44_100


def music(seconds: float, level_db: float, seed: int = 0) -> torch.Tensor:
    """A stereo chord with noise at an RMS level in dB."""
    time = torch.arange(round(seconds * RATE)) / RATE
    chord = sum(torch.sin(2 * torch.pi * hz * time) for hz in (110.0, 440.0, 554.4, 659.3))
    noise = torch.randn(2, len(time), generator=torch.Generator().manual_seed(seed))
    wave = torch.stack([chord, 0.5 * chord]) + 0.1 * noise
    return wave * 10 ** (level_db / 20) / wave.square().mean().sqrt()


def embedded(html: str) -> list[torch.Tensor]:
    """The clips in the page, decoded, `(2, s)` each."""
    files = [base64.b64decode(data) for data in re.findall(r"data:audio/ogg;base64,([^\"]+)", html)]
    clips = [soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True) for data in files]
    assert all(rate == RATE for _, rate in clips)
    return [torch.from_numpy(samples.T) for samples, _ in clips]


@pytest.mark.parametrize("quiet_db", [-30.0, -50.0, -60.0])
def test_level_ratios_survive(quiet_db):
    loud, quiet = music(2, -20.0), music(2, quiet_db, seed=1)
    heard_loud, heard_quiet = embedded(play({"loud": loud, "quiet": quiet}).data)
    assert rms_db(heard_loud) == pytest.approx(-20.0, abs=0.2)
    assert rms_db(heard_quiet) == pytest.approx(quiet_db, abs=0.2)


def test_full_scale_is_never_exceeded_and_the_set_shares_one_gain():
    hot, soft = music(2, 0.0), music(2, -20.0, seed=1)
    assert hot.abs().max() > 1.5
    page = play({"hot": hot, "soft": soft}).data
    heard_hot, heard_soft = embedded(page)
    assert heard_hot.abs().max() < 1.05  # Vorbis may overshoot a little
    assert rms_db(heard_hot) - rms_db(heard_soft) == pytest.approx(20.0, abs=0.2)
    turned_down = 20 * hot.abs().max().log10().item()
    assert f"turned down by {turned_down:.1f} dB" in page
    assert "turned down" not in play({"soft": soft}).data


def test_a_quiet_set_is_not_made_louder():
    assert common_gain({"a": torch.tensor([0.001]), "b": torch.zeros(3)}) == 1.0
    assert common_gain({"silence": torch.zeros(3)}) == 1.0


def test_captions_say_the_level_of_the_data():
    page = play({"hot <b>": music(1, 0.0), "nothing": torch.zeros(RATE)}).data
    assert "hot &lt;b&gt; · 0.0 dB" in page
    assert "nothing · silent" in page


@pytest.mark.parametrize("channels", [1, 2])
def test_eight_seconds_keep_their_length_and_stay_small(channels):
    clip = music(9, -18.0)[:channels]
    page = play({"clip": clip}).data
    (heard,) = embedded(page)
    assert heard.shape == (2, 8 * RATE)
    wav_bytes = 4 * 8 * RATE * 4 / 3  # 16-bit stereo, in base64
    assert len(page) < wav_bytes / 6


def test_the_sound_itself_arrives():
    clip = music(1, -20.0)
    (heard,) = embedded(play({"clip": clip}).data)
    error = (heard - clip).square().sum() / clip.square().sum()
    assert 10 * error.log10() < -12


def test_mono_vectors_are_played_on_both_sides():
    (heard,) = embedded(play({"tone": music(1, -20.0)[0]}).data)
    torch.testing.assert_close(heard[0], heard[1], atol=0.01, rtol=0)


def test_encoding_keeps_mono_mono():
    samples, _ = soundfile.read(io.BytesIO(encode_vorbis(music(1, -20.0)[:1])), always_2d=True)
    assert samples.shape == (RATE, 1)


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ({}, "at least one"),
        ({"bad": torch.tensor([0.0, float("nan")])}, "'bad' contains NaN"),
        ({"batch": torch.zeros(1, 2, 10)}, "'batch'.*channels, samples"),
        ({"nothing": torch.zeros(2, 0)}, "'nothing'"),
        ({"surround": torch.zeros(6, 10)}, "6"),
    ],
)
def test_what_cannot_be_played_is_an_error(clips, message):
    with pytest.raises(ValueError, match=message):
        play(clips)


@pytest.mark.parametrize("seconds", [0, -1, 8.5])
def test_long_excerpts_are_refused(seconds):
    with pytest.raises(ValueError, match="seconds="):
        play({"clip": torch.zeros(2, 100)}, seconds=seconds)
