"""GNSDR, GSIR and GSAR: what papers report for clips of singing, such as those of MIR-1K.

A clip without a score, NaN, leaves its source without a mean: which clips are left out is for those
to decide who report the mean.

Axis letters: `n` sources, `s` samples.

Notebook: 08_evaluation
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tfswa_lab.evaluation.bsseval import decibels, energies_of_track
from tfswa_lab.evaluation.frames import checked_pair, checked_taps


@dataclass(frozen=True)
class ClipScores:
    """BSSEval v3 of the sources of one mono clip, `(n,)` each, in dB, float64.

    Args:
        sdr: signal to distortion; what a filter of the source can explain is no distortion.
        sir: signal to interference.
        sar: signal to artifacts.
        seconds: how long the clip is.
        floor: SDR of the mixture taken for each source; `score_clip` knows it.
    """

    sdr: Tensor
    sir: Tensor
    sar: Tensor
    seconds: float
    floor: Tensor | None = None


def bss_eval_mono(
    references: Tensor | np.ndarray,
    estimates: Tensor | np.ndarray,
    filter_length: int = 512,
    rate: int = 16_000,
) -> ClipScores:
    """SDR, SIR and SAR of a whole mono clip.

    The values of `bss_eval_sources` of BSS Eval v3 and of mir_eval, without its permutations.

    Args:
        references: the true sources `(n, s)`.
        estimates: of the same shape, in the same order.
        filter_length: taps of the distortion filters.
        rate: samples per second.

    Raises:
        ValueError: the shapes differ or are not of this form, samples are no finite floats, a
            source is silent, or a number makes no sense.

    Source: Vincent, Gribonval & Févotte, "Performance measurement in blind audio source
    separation", IEEE TASLP 14, 2006.
    """
    references, estimates = checked_pair(references, estimates)
    taps = checked_taps(filter_length)
    if not 0 < rate < math.inf:
        raise ValueError(f"rate={rate} Hz makes no sense; clips are weighted by their seconds")
    if references.shape[1] != 1:
        raise ValueError(f"{tuple(references.shape)} is not mono, (sources, samples); mix it down")
    for name, sources in (("references", references), ("estimates", estimates)):
        if not sources.any(-1).all():
            raise ValueError(f"one of the {name} is silent, which has no ratio; leave its clip out")
    samples = references.shape[-1]
    energies, _ = energies_of_track(references, estimates, [(0, samples)], taps)
    _, _, _, interference, artifacts, filtered, explained = energies[..., 0]
    return ClipScores(
        # Artifacts are orthogonal to all that filters make of the sources: the energies add up.
        decibels(filtered, interference + artifacts),
        decibels(filtered, interference),
        decibels(explained, artifacts),
        samples / rate,
    )


def score_clip(
    references: Tensor | np.ndarray, estimates: Tensor | np.ndarray, rate: int = 16_000
) -> ClipScores:
    """The same, with the mixture, the sum of the sources, as the floor.

    Raises:
        ValueError: as `bss_eval_mono`.
    """
    references, estimates = checked_pair(references, estimates)
    mixture = references.sum(0).expand_as(references)
    scores = bss_eval_mono(references, estimates, rate=rate)
    floor = bss_eval_mono(references, mixture, rate=rate).sdr
    return ClipScores(scores.sdr, scores.sir, scores.sar, scores.seconds, floor)


def gnsdr(clips: Sequence[ClipScores]) -> Tensor:
    """Global normalised SDR `(n,)`: the mean gain over the mixture, weighted by length.

    Raises:
        ValueError: there are no clips, or one has no floor.

    Source: Hsu & Jang, "On the improvement of singing voice separation for monaural recordings
    using the MIR-1K dataset", IEEE TASLP 18, 2010.
    """
    for number, clip in enumerate(clips):
        if clip.floor is None:
            raise ValueError(f"clips[{number}] has no floor to gain over; score it by score_clip")
    return _weighted_mean(clips, [clip.sdr - clip.floor for clip in clips])


def gsir(clips: Sequence[ClipScores]) -> Tensor:
    """Global SIR `(n,)`: the mean, weighted by length.

    Raises:
        ValueError: there are no clips.
    """
    return _weighted_mean(clips, [clip.sir for clip in clips])


def gsar(clips: Sequence[ClipScores]) -> Tensor:
    """Global SAR `(n,)`: the mean, weighted by length.

    Raises:
        ValueError: there are no clips.
    """
    return _weighted_mean(clips, [clip.sar for clip in clips])


def _weighted_mean(clips: Sequence[ClipScores], values: list[Tensor]) -> Tensor:
    if not values:
        raise ValueError("there are no clips to take the mean of")
    seconds = values[0].new_tensor([clip.seconds for clip in clips])
    return (torch.stack(values, 1) * seconds).sum(1) / seconds.sum()
