"""Checks of lesson 01: find a bin, share the power, invent a phase.

Axis letters: `n` stems, `c` channels, `f` frequency bins, `t` frames, `s` samples.

Notebook: 01_sound_to_spectrogram
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tfswa_lab.stft import STFTProcessor
from tfswa_lab.teaching.checks import mismatch, mismatch_or_mistake, verdict

# On the chord below, 60 rounds of Griffin & Lim gain 15 dB from a phase of zero, more from a random
# one; five rounds gain less than this.
GAIN_WANTED_DB = 12.0


def check_nearest_bin(nearest_bin: Callable[[float, int, int], object]) -> bool:
    """Exercise 1: `nearest_bin(hz, n_fft, rate)` is the bin whose frequency is nearest."""
    for hz, n_fft, rate in [(440.0, 2048, 44_100), (440.0, 512, 16_000), (30.0, 4096, 44_100)]:
        expected = min(range(n_fft // 2 + 1), key=lambda k: abs(k * rate / n_fft - hz))
        if hint := mismatch(nearest_bin(hz, n_fft, rate), expected):
            return verdict("nearest_bin", f"{hz:g} Hz, n_fft={n_fft}, {rate} Hz rate: {hint}")
    return verdict("nearest_bin", None)


def check_power_mask(power_mask: Callable[[Tensor], object]) -> bool:
    """Exercise 2: `power_mask(stems)` `(n, c, f, t)` is each stem's share of the summed power."""
    stems = torch.randn(3, 2, 5, 7, dtype=torch.cfloat, generator=torch.Generator().manual_seed(0))
    magnitude, power, mixture = stems.abs(), stems.abs() ** 2, stems.sum(0)
    mistakes = {
        "these are shares of the magnitude; the power is its square": magnitude / magnitude.sum(0),
        "that divides by the power of the mixture, so the shares do not sum to 1": (
            power / mixture.abs() ** 2
        ),
    }
    if hint := mismatch_or_mistake(power_mask(stems.clone()), power / power.sum(0), mistakes):
        return verdict("power_mask", hint)
    stems[..., 3] = 0  # a frame in which all stems are silent
    silence = torch.as_tensor(power_mask(stems.clone()))[..., 3]
    if not torch.isfinite(silence).all():
        return verdict("power_mask", "where all stems are silent it divides 0 by 0")
    return verdict("power_mask", None)


def check_griffin_lim(griffin_lim: Callable[[Tensor, STFTProcessor, int, int], object]) -> bool:
    """Exercise 3: `griffin_lim(magnitude, stft, length, rounds)` finds a waveform `(s,)`.

    The measure is the magnitude the waveform really has, compared with the one asked for; the
    starting point is a phase of zero everywhere.
    """
    stft, length = STFTProcessor(512, 128), 8_000
    time = torch.arange(length) / 8_000
    chord = sum(torch.sin(6.2832 * hz * time + hz) for hz in (220.0, 277.2, 329.6))
    magnitude = stft(chord * torch.exp(-3 * time)).abs()
    start = magnitude_error_db(stft.istft(magnitude.to(torch.cfloat), length), magnitude, stft)
    torch.manual_seed(0)  # the answer may begin with a random phase
    got = griffin_lim(magnitude.clone(), stft, length, 60)
    if not isinstance(got, Tensor) or got.shape != (length,):
        return verdict("griffin_lim", mismatch(got, torch.zeros(length)))
    if not got.any():
        return verdict("griffin_lim", "silence has no phase problem; return the waveform")
    better = start - magnitude_error_db(got, magnitude, stft)
    if better < GAIN_WANTED_DB:
        hint = f"{better:.1f} dB better than a phase of zero; 60 rounds reach {GAIN_WANTED_DB:g} dB"
        return verdict("griffin_lim", hint)
    return verdict("griffin_lim", None)


def magnitude_error_db(waveform: Tensor, magnitude: Tensor, stft: STFTProcessor) -> float:
    """Difference of the magnitude of `waveform` from `magnitude` `(f, t)`, in dB relative to it."""
    error = stft(waveform).abs() - magnitude
    return 20 * (error.norm() / magnitude.norm()).log10().item()
