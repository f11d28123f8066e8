"""Files in and out, levels, and bad input by name."""

import os
import shutil

import numpy as np
import pytest
import soundfile
import torch

from tfswa_lab import audio


def tone(seconds=0.5, rate=44_100, frequency=1000.0):
    s = torch.arange(int(seconds * rate))
    return 0.5 * torch.sin(2 * torch.pi * frequency * s / rate).expand(2, -1)


def test_what_is_written_is_read_back_to_half_a_16_bit_step(tmp_path):
    path = audio.write(tmp_path / "new" / "tone.wav", tone())
    waveform, rate = audio.read(path)
    assert rate == 44_100
    assert (waveform - tone()).abs().max() <= 1 / 32_768
    assert [p.name for p in path.parent.iterdir()] == ["tone.wav"]


def test_seeking_reads_the_same_samples_as_slicing(tmp_path):
    path = audio.write(tmp_path / "tone.wav", tone())
    whole, _ = audio.read(path)
    part, _ = audio.read(path, start=1234, frames=500)
    assert torch.equal(part, whole[:, 1234:1734])


def test_sixteen_bits_return_as_the_same_sixteen_bits(tmp_path):
    every = torch.arange(-32_768, 32_768).view(2, -1) / 32_768
    returned, _ = audio.read(audio.write(tmp_path / "every.wav", every))
    assert torch.equal(returned, every)


def test_a_tone_survives_resampling_at_its_level_and_frequency():
    resampled = audio.resample(tone(1.0), 44_100, 16_000)
    assert resampled.shape == (2, 16_000)
    spectrum = torch.fft.rfft(resampled[0]).abs()
    assert spectrum.argmax() == 1000
    assert abs(audio.rms_db(resampled) - audio.rms_db(tone(1.0))) < 0.05


RATES = [
    (48_000, 44_100),
    (96_000, 44_100),
    (22_050, 44_100),
    (16_000, 44_100),
    (44_100, 16_000),
    (44_100, 11_025),
    (44_100, 44_099),
    (44_100, 43_210),
]


def there_and_back(rate_in, rate_out, share, dtype=torch.float64):
    """SNR in dB of a tone at a share of the lower rate's limit, without the ends."""
    samples = torch.arange(rate_in, dtype=torch.float64)
    sound = torch.sin(torch.pi * share * min(rate_in, rate_out) / rate_in * samples).to(dtype)
    other = audio.resample(sound, rate_in, rate_out)
    error = (audio.resample(other, rate_out, rate_in)[:rate_in] - sound)[2000:-2000]
    return 10 * torch.log10(sound[2000:-2000].square().sum() / error.square().sum())


@pytest.mark.parametrize(("rate_in", "rate_out"), RATES)
def test_tones_below_the_limit_come_back_from_another_rate(rate_in, rate_out):
    for share, least in ((0.1, 120), (1 / 3, 120), (2 / 3, 120), (0.9, 110)):
        assert there_and_back(rate_in, rate_out, share) > least
        if max(rate_in, rate_out) % 100 == 0:  # float32 rounds at about -140 dB
            assert there_and_back(rate_in, rate_out, share, torch.float32) > least - 10


@pytest.mark.parametrize(
    ("rate_in", "rate_out"), [(48_000, 16_000), (96_000, 44_100), (44_100, 16_000), (44_100, 8021)]
)
def test_tones_above_the_new_limit_are_removed(rate_in, rate_out):
    for share, most in ((1.03, -115), (1.1, -120), (1.5, -120)):
        samples = torch.arange(rate_in, dtype=torch.float64)
        sound = torch.sin(torch.pi * share * rate_out / rate_in * samples)
        gone = audio.resample(sound, rate_in, rate_out)[1000:-1000]
        assert 10 * torch.log10(gone.square().mean() / 0.5) < most


def test_rates_that_no_song_has_are_refused_instead_of_filling_the_memory():
    with pytest.raises(ValueError, match="2147483647 Hz cannot be resampled to 44100 Hz"):
        audio.resample(tone(), 2**31 - 1, 44_100)
    with pytest.raises(ValueError, match="of floats"):
        audio.resample(torch.zeros(9, dtype=torch.int16), 48_000, 44_100)


def test_one_filter_serves_every_call():
    audio._resampler.cache_clear()
    for _ in range(5):
        audio.resample(tone(), 44_100, 22_050)
    assert audio._resampler.cache_info().misses == 1


@pytest.mark.parametrize("rates", [(44_099, 44_100), (44_056, 44_100), (22_051, 44_100)])
def test_rates_without_a_common_ratio_resample_in_bounded_memory(rates):
    rate_in, rate_out = rates
    resampled = audio.resample(tone(1.0, rate_in), rate_in, rate_out)
    assert resampled.shape == (2, rate_out)
    expected = tone(1.0, rate_out)
    assert (resampled - expected)[:, 500:-500].abs().max() < 5e-3


def test_no_sample_is_missing_from_more_than_float32_can_count():
    samples = 2 * (2**24 + 1)
    resampled = audio.resample(torch.ones(samples), 44_100, 22_050)
    assert resampled.shape == (samples // 2,)
    assert resampled[1000:-1000].sub(1).abs().max() < 1e-3


def test_double_precision_stays_and_is_finer():
    for dtype, limit in ((torch.float32, 1e-3), (torch.float64, 1e-3)):
        resampled = audio.resample(tone(1.0).to(dtype), 44_100, 48_000)
        assert resampled.dtype == dtype
        assert (resampled - tone(1.0, 48_000))[:, 500:-500].abs().max() < limit


def test_no_samples_stay_none_and_a_rate_of_zero_is_refused():
    assert audio.resample(torch.zeros(2, 0), 44_100, 16_000).shape == (2, 0)
    with pytest.raises(ValueError, match="positive whole numbers"):
        audio.resample(tone(), 44_100, 0)


def test_a_file_type_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    for name, rate in (("song.xyz", 44_100), ("song", 44_100), ("song.wav", 0)):
        with pytest.raises(ValueError, match="cannot be written"):
            audio.write(tmp_path / name, tone(), rate)
    assert not any(tmp_path.iterdir())


def test_mono_becomes_stereo_and_five_channels_are_refused():
    assert torch.equal(audio.to_stereo(torch.ones(1, 3)), torch.ones(2, 3))
    with pytest.raises(ValueError, match="got 5"):
        audio.to_stereo(torch.ones(5, 3))


def test_levels():
    assert audio.rms_db(torch.zeros(2, 4)) == -float("inf")
    assert audio.peak_db(torch.tensor([[1.0, -1.0]])) == 0.0


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.wav"):
        audio.read(tmp_path / "missing.wav")
    (tmp_path / "text.wav").write_text("this is not audio")
    with pytest.raises(ValueError, match=r"text\.wav is not readable"):
        audio.read(tmp_path / "text.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros((0, 2)), 44_100)
    with pytest.raises(ValueError, match=r"empty\.wav holds no samples"):
        audio.read(tmp_path / "empty.wav")
    soundfile.write(tmp_path / "nan.wav", np.full((9, 2), np.nan), 44_100, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"nan\.wav contains NaN"):
        audio.read(tmp_path / "nan.wav")


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (torch.zeros(5), "channels, samples"),
        (torch.full((2, 5), torch.nan), "NaN"),
        (torch.full((2, 5), 1.5), "peak 1.500 would clip"),
    ],
)
def test_what_would_damage_a_file_is_refused_and_the_old_one_kept(tmp_path, waveform, message):
    path = audio.write(tmp_path / "song.wav", tone())
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        audio.write(path, waveform)
    assert path.read_bytes() == before


def test_ffmpeg_beside_the_interpreter_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(FileNotFoundError, match="ffmpeg is not on PATH"):
        audio.ensure_ffmpeg()
    for program in ("ffmpeg", "ffprobe"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    audio.ensure_ffmpeg()
    assert shutil.which("ffprobe") == str(tmp_path / "ffprobe")
    assert os.environ["PATH"].count(str(tmp_path)) == 2  # "nothing", and the folder added once
