"""Time, pitch and speed by the physics of tones and clicks; music against a plain vocoder."""

import math

import pytest
import torch

from tfswa_lab.audio import read, rms_db
from tfswa_lab.data.augment import PitchShift, SpeedPerturbation, TimeStretch
from tfswa_lab.data.augment.stretch import change_speed, looped, pitch_shift, time_stretch

RATE = 44_100


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tone(frequency, seconds=2.0):
    s = torch.arange(round(seconds * RATE))
    return 0.5 * torch.sin(2 * math.pi * frequency * s / RATE).expand(2, -1)


def peak_frequency(waveform):
    """The loudest frequency in Hz, to 0.1 Hz, of `(2, s)` without its ends."""
    middle = waveform[0, 4000:-4000].double()
    spectrum = torch.fft.rfft(middle * torch.hann_window(len(middle)), n=10 * RATE).abs()
    return spectrum.argmax().item() / 10


def as_batch(item):
    """One item `(n, c, s)` as a batch."""
    return {"mixture": item.sum(0)[None], "stems": item[None]}


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.1])
def test_a_stretched_tone_keeps_its_frequency_and_level(factor):
    stretched = time_stretch(tone(440), factor)
    assert stretched.shape[-1] == round(2 * RATE * factor)
    assert abs(peak_frequency(stretched) - 440) < 0.2
    assert abs(rms_db(stretched) - rms_db(tone(440))) < 0.05


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_stretched_clicks_are_as_far_apart_as_the_factor_says(factor):
    clicks = torch.zeros(1, 3 * RATE)
    clicks[:, :: RATE // 4] = 1.0
    stretched = time_stretch(clicks, factor)[0].abs()
    for k in range(1, 11):
        expected = round(k * RATE / 4 * factor)
        around = stretched[expected - 2000 : expected + 2000]
        assert abs(around.argmax() - 2000) <= 512  # frames are copied: off by up to a hop, 12 ms
        assert around.max() > 0.1  # a click that a splice hits is smeared over a window


@pytest.mark.parametrize("semitones", [-2.0, -0.7, 1.0, 2.0])
def test_a_shifted_tone_peaks_where_the_scale_says(semitones):
    shifted = pitch_shift(tone(440), semitones)
    assert shifted.shape == tone(440).shape
    cents = 1200 * math.log2(peak_frequency(shifted) / 440) - 100 * semitones
    assert abs(cents) < 1.5
    assert abs(rms_db(shifted[:, 4000:-4000]) - rms_db(tone(440))) < 0.05


def test_higher_speed_is_higher_and_shorter():
    fast = change_speed(tone(440), 1.1)
    assert fast.shape[-1] == math.ceil(2 * RATE / 1.1)
    assert abs(peak_frequency(fast) - 484) < 0.2


def test_the_factor_one_returns_the_waveform():
    x = 0.1 * torch.randn(2, 20_000, generator=seeded())
    torch.testing.assert_close(time_stretch(x, 1.0), x, atol=1e-6, rtol=0)
    torch.testing.assert_close(pitch_shift(x, 0.0), x, atol=1e-6, rtol=0)


def test_stretching_keeps_the_channels_phase_and_level():
    """A right channel that is the left one, half as loud and upside down, stays so."""
    left = 0.1 * torch.randn(1, 30_000, generator=seeded())
    stretched = time_stretch(torch.cat([left, -0.5 * left]), 1.1)
    torch.testing.assert_close(stretched[1], -0.5 * stretched[0], atol=1e-6, rtol=0)


def test_two_tones_far_apart_are_turned_apart():
    """Where all bins turned alike, the splices would smear the second tone."""
    chord = tone(440) + tone(1000)
    stretched = time_stretch(chord, 1.1)[0, 4000:-4000]
    power = torch.fft.rfft(stretched * torch.hann_window(len(stretched))).abs().square()
    frequency = torch.fft.rfftfreq(len(stretched), 1 / RATE)
    away = ((frequency - 440).abs() > 5) & ((frequency - 1000).abs() > 5)
    assert 10 * torch.log10(power[away].sum() / power.sum()) < -40


def logarithmic_spectrum(waveform):
    """Mean power in dB per 43 Hz of `(c, s)`."""
    stft = torch.stft(waveform, 1024, 512, window=torch.hann_window(1024), return_complex=True)
    return 10 * (stft.abs().square().mean((0, 2)) + 1e-12).log10()


@pytest.mark.audio
def test_music_keeps_its_level_where_a_plain_phase_vocoder_loses_it(audio_root):
    from torchaudio.functional import phase_vocoder

    flac = sorted(audio_root.glob("music_delta/*/*/other.flac"))[0]
    music, _ = read(flac, start=10 * RATE, frames=4 * RATE)
    stft = {"n_fft": 2048, "hop_length": 512, "window": torch.hann_window(2048)}
    advance = torch.linspace(0, math.pi * 512, 1025)[:, None]
    plain = phase_vocoder(torch.stft(music, **stft, return_complex=True), 1 / 1.1, advance)
    loss_of_plain = rms_db(torch.istft(plain, **stft)) - rms_db(music)
    stretched = time_stretch(music, 1.1)
    assert abs(rms_db(stretched) - rms_db(music)) < 1.0
    assert loss_of_plain < -2.0
    change = logarithmic_spectrum(stretched) - logarithmic_spectrum(music)
    assert change[2:200].abs().mean() < 1.0


@pytest.mark.parametrize(
    ("augment", "frequency"),
    [
        (TimeStretch((0.9, 0.9)), 440),
        (TimeStretch((1.1, 1.1)), 440),
        (PitchShift((2.0, 2.0)), 440 * 2 ** (2 / 12)),
        (PitchShift((-2.0, -2.0)), 440 / 2 ** (2 / 12)),
        (SpeedPerturbation((0.9,)), 396),
        (SpeedPerturbation((1.1,)), 484),
        (SpeedPerturbation((1.0051,)), 444.4),  # of which 1.01 is the simple ratio
    ],
)
def test_an_item_keeps_its_samples_and_is_loud_to_its_end(augment, frequency):
    batch = as_batch(torch.stack([tone(440), tone(440)]))
    new = augment(batch, seeded())["stems"]
    assert new.shape == batch["stems"].shape
    assert abs(peak_frequency(new[0, 0]) - frequency) < 0.3
    torch.testing.assert_close(new[0, 0], new[0, 1])
    last_tenth = new[0, 0, :, -RATE // 5 :]
    assert abs(rms_db(last_tenth) - rms_db(tone(440))) < 1.0


@pytest.mark.parametrize("augment", [TimeStretch(), PitchShift(), SpeedPerturbation()])
def test_equal_stems_stay_equal_so_music_stays_together(augment):
    stem = 0.1 * torch.randn(4, 1, 2, 8000, generator=seeded())
    batch = {"mixture": 2 * stem[:, 0], "stems": stem.expand(4, 2, 2, 8000)}
    new = augment(batch, seeded())["stems"]
    torch.testing.assert_close(new[:, 0], new[:, 1])
    assert not torch.equal(new[0], new[1])


def test_silence_stays_silent_and_short_items_are_long_enough():
    batch = as_batch(torch.zeros(2, 1, 500))
    for augment in (TimeStretch(), PitchShift(), SpeedPerturbation()):
        assert torch.equal(augment(batch, seeded())["stems"], batch["stems"])
    assert torch.equal(looped(torch.arange(3), 7), torch.tensor([0, 1, 2, 0, 1, 2, 0]))
