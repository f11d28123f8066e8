"""Whether an estimate comes in time and at its level: what another program did to the file shows.

An encoder of MP3 delays the sound by 1105 or 2257 samples, a normaliser changes the level, a mixer
turns the polarity. Each costs many dB and says nothing about the separation, so it gets a note.

Axis letters: `c` channels, `s` samples, `f` bins.

Notebook: 08_evaluation
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tfswa_lab.evaluation.ratios import SAMPLES_AT_ONCE
from tfswa_lab.evaluation.report import show

REACH = 1.0  # seconds, late or early
NEAR = 20  # samples to either side of a peak
# By how much an honest estimate seems to be better at another lag or level: at most 0.06 dB and
# 1.33 dB, of 847 by masks, oracles and a network, also a poor one, of the band and of Music Delta.
LAG_DB, GAIN_DB = 0.5, 2.5
FLOOR = 1e-12  # of the reference's energy: an error below it is rounding


class Match(NamedTuple):
    """Energies of a reference and of an estimate, and their inner product, at one lag."""

    reference: float
    estimate: float
    product: float

    @property
    def gain(self) -> float:
        """The gain at which the estimate is nearest to the reference."""
        return self.product / self.estimate

    @property
    def usdr(self) -> float:
        """uSDR in dB as it is."""
        return self.usdr_with(1.0)

    def usdr_with(self, gain: float) -> float:
        """uSDR in dB of the estimate times a gain."""
        error = self.reference + gain * (gain * self.estimate - 2 * self.product)
        return -10 * math.log10(max(error / self.reference, FLOOR))

    @property
    def correction(self) -> float:
        """The gain that the estimate needs; 1 where imperfect separation explains its level.

        If the estimate is the reference plus noise, the best gain is below 1. If it is what can be
        known of the reference, the reference's level in it is below 1. Separators are between the
        two. So a level is only odd if the estimate improves by a gain that brings both to 1.
        """
        level = self.product / self.reference
        sign = math.copysign(1, level)
        honest = 1 / level if abs(level) > 1 else sign * max(abs(self.gain), 1)
        improved = self.usdr_with(honest)
        if improved < self.usdr + GAIN_DB:
            return 1.0
        return sign if improved < self.usdr_with(sign) + GAIN_DB else self.gain


def alignment_note(reference: Tensor, estimate: Tensor, rate: int) -> str:
    """How an estimate is late, early, inverted or at another level; empty if it is not.

    Args:
        reference: the true stem `(c, s)`.
        estimate: `(c, s)`, on the same device.
        rate: samples per second.
    """
    if not (reference.any() and estimate.any()):
        return ""
    lag = best_lag(reference, estimate, round(REACH * rate))
    here, there = match(reference, estimate, 0), match(reference, estimate, lag)
    if there.usdr_with(there.gain) < here.usdr_with(here.gain) + LAG_DB:
        lag, there = 0, here
    gain = there.correction
    faults = faults_of(lag, gain, rate)
    if not faults:
        return ""
    return (
        f"{' and '.join(faults)}; corrected, its uSDR would be {show(there.usdr_with(gain))} dB "
        f"instead of {show(here.usdr)} dB"
    )


def faults_of(lag: int, gain: float, rate: int) -> list[str]:
    """A lag in samples and a gain in words; nothing for 0 and 1."""
    faults = []
    if lag:
        manner = "late" if lag > 0 else "early"
        faults += [f"is {abs(lag)} samples ({1000 * abs(lag) / rate:.1f} ms) {manner}"]
    if gain < 0:
        faults += ["is inverted (of opposite polarity)"]
    if decibels := round(20 * math.log10(abs(gain)), 1):
        faults += [f"fits best with a gain of {decibels:+.1f} dB"]
    return faults


def best_lag(reference: Tensor, estimate: Tensor, reach: int) -> int:
    """The lag with the largest correlation, of either sign; positive where the estimate is late.

    Correlations of blocks are added as spectra, so that memory is bounded. Near their peak, that of
    the square roots of the spectra counts: it is sharper. A bass is often a sample off without it.
    Float32 is enough to find the lag; `match` computes what follows from it.

    Args:
        reference: `(c, s)`.
        estimate: `(c, s)`.
        reach: the largest lag in samples.
    """
    samples = reference.shape[-1]
    reach = min(reach, samples - 1)
    size = 2 ** (6 * reach + 1).bit_length()
    step = size - 2 * reach
    peaks = reference.abs().max(), estimate.abs().max()  # float32 cannot hold all levels
    padded = F.pad(estimate, (reach, reach + step))
    total = 0.0
    for start in range(0, samples, step):
        blocks = reference[:, start : start + step], padded[:, start : start + size]
        first, second = (
            torch.fft.rfft((block / peak).float(), n=size)
            for block, peak in zip(blocks, peaks, strict=True)
        )
        total = total + (first.conj() * second).sum(0)
    sharp = total / total.abs().clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    blunt, sharp = (torch.fft.irfft(x, n=size)[: 2 * reach + 1].abs() for x in (total, sharp))
    first = max(0, int(blunt.argmax()) - NEAR)
    return first + int(sharp[first : first + 2 * NEAR + 1].argmax()) - reach


def match(reference: Tensor, estimate: Tensor, lag: int) -> Match:
    """Energies and inner product of `(c, s)` with the estimate taken `lag` samples later."""
    samples = reference.shape[-1]
    early = reference[:, max(0, -lag) : samples - max(0, lag)]
    late = estimate[:, max(0, lag) : samples + min(0, lag)]
    pairs = ((reference, reference), (estimate, estimate), (early, late))
    return Match(*(_inner_product(*pair) for pair in pairs))


def _inner_product(first: Tensor, second: Tensor) -> float:
    """In float64, in blocks that fit into the cache of a core."""
    blocks = zip(first.split(SAMPLES_AT_ONCE, -1), second.split(SAMPLES_AT_ONCE, -1), strict=True)
    return sum((x.double() * y.double()).sum().item() for x, y in blocks)
