"""Planted lags, levels and polarities are found; imperfect estimates and loops get no note."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from tfswa_lab.audio import STEMS, read
from tfswa_lab.evaluation.alignment import alignment_note, best_lag, match
from tfswa_lab.evaluation.oracles import BOUNDS
from tfswa_lab.evaluation.ratios import usdr
from tfswa_lab.inference.separate import separate

RATE = 44_100


@pytest.fixture(scope="module")
def song(band_root):
    """Three seconds of the four stems `(n, 2, s)` of a song of the band."""
    folder = min((band_root / "test").iterdir())
    return torch.stack([read(folder / f"{x}.wav", 4 * RATE, 3 * RATE)[0] for x in STEMS])


def noise(like, decibels, seed=0):
    """White noise, so many dB above the RMS of a waveform."""
    random = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    return random * like.square().mean().sqrt() * 10 ** (decibels / 20)


def delayed(waveform, lag):
    samples = waveform.shape[-1]
    if lag >= 0:
        return F.pad(waveform, (lag, 0))[..., :samples]
    return F.pad(waveform[..., -lag:], (0, -lag))


def usdr_of(reference, estimate):
    return usdr(reference[None], estimate[None]).item()


@pytest.mark.parametrize("lag", [-30_000, -20, 1105, 2257])
def test_a_planted_lag_is_found_to_the_sample(song, lag):
    for number, stem in enumerate(song):
        honest = 0.9 * stem + 0.1 * song.sum(0) + noise(stem, -10, number)
        late = delayed(honest, lag)
        note = alignment_note(stem, late, RATE)
        manner = "late" if lag > 0 else "early"
        assert note.startswith(f"is {abs(lag)} samples ({abs(lag) / 44.1:.1f} ms) {manner};"), note
        corrected, there = map(float, re.findall(r"(-?[\d.]+) dB", note))
        assert there == pytest.approx(usdr_of(stem, late), abs=0.006)
        moved = delayed(late, -lag)  # loses the end
        assert corrected == pytest.approx(usdr_of(stem, moved), abs=0.5)


def test_lags_agree_with_the_definition_of_correlation():
    random = torch.Generator().manual_seed(0)
    for samples, reach in ((1, 5), (7, 3), (50, 80)):
        for _ in range(5):
            one, two = torch.randn(2, 2, samples, generator=random, dtype=torch.float64)
            lags = range(-min(reach, samples - 1), min(reach, samples - 1) + 1)
            products = {
                lag: sum(
                    (one[:, t] * two[:, t + lag]).sum().item()
                    for t in range(samples)
                    if 0 <= t + lag < samples
                )
                for lag in lags
            }
            assert best_lag(one, two, reach) in lags
            for lag, product in products.items():
                assert match(one, two, lag).product == pytest.approx(product)


@pytest.mark.parametrize("gain_db", [-20.0, -6.0, 6.0, 20.0])
@pytest.mark.parametrize("lag", [0, 1105])
def test_a_planted_level_is_told_with_the_gain_that_fits_best(song, gain_db, lag):
    stem = song[0]
    honest = stem + noise(stem, -20)
    note = alignment_note(stem, delayed(honest, lag) * 10 ** (gain_db / 20), RATE)
    gain, corrected, _ = (float(x) for x in re.findall(r"([+-]?[\d.]+) dB", note))
    assert gain == pytest.approx(-gain_db, abs=0.15)
    restored = delayed(delayed(honest, lag), -lag)  # which has lost its end
    assert corrected == pytest.approx(usdr_of(stem, restored), abs=0.3)
    assert ("late" in note) == bool(lag)


def test_a_turned_polarity_is_told(song):
    for stem in song:
        note = alignment_note(stem, -(stem + noise(stem, -6)), RATE)
        assert note.startswith("is inverted (of opposite polarity); corrected,"), note
        corrected, there = map(float, re.findall(r"(-?[\d.]+) dB", note))
        assert corrected == pytest.approx(6, abs=0.1)
        assert there == pytest.approx(-10 * math.log10(4 + 10**-0.6), abs=0.1)
    note = alignment_note(song[0], -0.25 * delayed(song[0], -529), RATE)
    assert "529 samples (12.0 ms) early and is inverted" in note
    assert "fits best with a gain of +12.0 dB" in note


@pytest.mark.parametrize("snr_db", [20, 3, -6])
def test_noisy_and_leaky_estimates_get_no_note(song, snr_db):
    for number, stem in enumerate(song):
        rest = song.sum(0) - stem
        leak = rest * (stem.square().sum() / rest.square().sum()).sqrt() * 10 ** (-snr_db / 20)
        shrunk = 1 / (1 + 10 ** (-snr_db / 10))  # as the best estimate from noise is
        for estimate in (
            stem + noise(stem, -snr_db, number),
            shrunk * (stem + noise(stem, -snr_db, number)),
            stem + leak,
            stem.mean(0, keepdim=True).expand(2, -1),
        ):
            assert alignment_note(stem, estimate, RATE) == ""


def test_separated_stems_and_bounds_get_no_note(song):
    mixture = song.sum(0)
    made = {name: bound(mixture, song) for name, bound in BOUNDS.items()}
    made["band"] = torch.stack(list(separate(mixture, RATE).values()))
    made["wrong stems"] = song.roll(1, 0)
    for name, estimates in made.items():
        for stem, reference, estimate in zip(STEMS, song, estimates, strict=True):
            assert alignment_note(reference, estimate, RATE) == "", (name, stem)


@pytest.mark.parametrize("period", [2205, 11_025, 22_050])
def test_a_loop_has_no_lag_of_its_period(period):
    decay = torch.exp(-torch.arange(period) / 2000)
    loop = noise(torch.ones(2, period), -20) * decay
    reference = loop.repeat(1, 4 * RATE // period)
    honest = reference + noise(reference, 0, seed=1)
    late_entry = honest.clone()
    late_entry[:, : 3 * period] = 0
    fading = honest * torch.linspace(0, 1, honest.shape[-1])
    for estimate in (reference, honest, late_entry, fading):
        assert alignment_note(reference, estimate, RATE) == ""
    note = alignment_note(reference, delayed(honest, 700), RATE)
    assert note.startswith("is 700 samples (15.9 ms) late;")


@pytest.mark.parametrize("hertz", [41.2, 110.0, 440.0])
@pytest.mark.parametrize("lag", [0, 1105, -2257])
def test_the_lag_of_a_noisy_tone_brings_its_phase_back(hertz, lag):
    tone = 0.3 * torch.sin(2 * torch.pi * hertz / RATE * torch.arange(3 * RATE)).expand(2, -1)
    late = delayed(tone + noise(tone, -12), lag)
    note = alignment_note(tone, late, RATE)
    if not note:  # another period of it hides the lag
        assert usdr_of(tone, late) > 8
        return
    corrected, _ = map(float, re.findall(r"(-?[\d.]+) dB", note))
    assert corrected > 10.8  # of 12, without the end that is lost
    found = int(re.search(r"is (\d+) samples", note)[1]) * (-1 if "early" in note else 1)
    periods = (found - lag) * hertz / RATE  # all of them fit equally well
    assert abs(periods - round(periods)) < 0.03 + 2 * hertz / RATE


def test_silence_short_songs_and_odd_levels_are_no_obstacle():
    wave = noise(torch.ones(2, 300), 0).double()
    assert alignment_note(wave, torch.zeros_like(wave), RATE) == ""
    assert alignment_note(torch.zeros_like(wave), wave, RATE) == ""
    assert alignment_note(wave[:, :1], wave[:, :1], RATE) == ""
    note = alignment_note(1e-60 * wave, 1e60 * delayed(wave, 3), RATE)  # beyond float32
    assert note.startswith("is 3 samples (0.1 ms) late and fits best with a gain of -2400.0 dB")
