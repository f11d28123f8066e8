"""The ratios that need no filters: SDR of frames, of whole tracks, and regardless of scale.

Four numbers go by the name of SDR. `sdr` is BSSEval v4's (also SNR, framewise); `usdr` is that of
the whole track (the Music Demixing Challenge's); `si_sdr` leaves the gain out; and BSSEval's
`bsseval.bss_eval_mono` leaves out whatever a filter of 512 taps can do.

Axis letters: `n` stems, `c` channels, `s` samples, `m` frames.

Notebook: 08_evaluation
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tfswa_lab.audio import decibels
from tfswa_lab.evaluation.frames import (
    audible,
    checked_pair,
    frames_in_seconds,
    select_stems,
    silent_frames,
)

SAMPLES_AT_ONCE = 2**16  # of every channel


def sdr(
    references: Tensor | np.ndarray,
    estimates: Tensor | np.ndarray,
    window: float = 1.0,
    hop: float = 1.0,
    rate: int = 44_100,
) -> Tensor:
    """Signal-to-distortion ratio of every frame, which is all of BSSEval v4's SDR.

    Args:
        references: `(n, c, s)` or `(n, s)`.
        estimates: the same.
        window: length of a frame in seconds.
        hop: from one frame to the next, in seconds.
        rate: samples per second.

    Returns:
        `(n, m)` in dB, float64, with NaN for silence as `bss_eval` has it.

    Raises:
        ValueError: the shapes differ or are not of this form, samples are no finite floats, or a
            number makes no sense.
    """
    references, estimates = checked_pair(references, estimates)
    frames = frames_in_seconds(references.shape[-1], window, hop, rate)
    _, scored, _ = audible(references, estimates)
    ratios = references.new_full((len(references), len(frames)), torch.nan, dtype=torch.float64)
    if scored:
        silent = silent_frames(references, estimates, scored, frames)
        pair = select_stems(references, scored), select_stems(estimates, scored)
        by_frame = [_ratio(*(x[..., start:stop] for x in pair)) for start, stop in frames]
        ratios[scored] = torch.stack(by_frame, 1).masked_fill(silent, torch.nan)
    return ratios


def usdr(references: Tensor | np.ndarray, estimates: Tensor | np.ndarray) -> Tensor:
    """One signal-to-distortion ratio for a whole track, in dB `(n,)`.

    Args:
        references: `(n, c, s)` or `(n, s)`.
        estimates: the same.

    Returns:
        `(n,)` in dB, float64; NaN where the reference is silent throughout, infinite for an
        estimate without any error.

    Raises:
        ValueError: the shapes differ or are not of this form, or samples are no finite floats.

    Source: Mitsufuji et al., "Music demixing challenge 2021", Frontiers in Signal Processing 2022,
    eq. 1.
    """
    return _usdr(*checked_pair(references, estimates))


def si_sdr(references: Tensor | np.ndarray, estimates: Tensor | np.ndarray) -> Tensor:
    """The same after the reference was given the gain that fits the estimate best.

    One gain for all channels of a stem: the panning counts, the level does not.

    Args:
        references: `(n, c, s)` or `(n, s)`.
        estimates: the same.

    Returns:
        `(n,)` in dB, float64; NaN where reference or estimate is silent throughout.

    Raises:
        ValueError: the shapes differ or are not of this form, or samples are no finite floats.

    Source: Le Roux et al., "SDR – half-baked or well done?", ICASSP 2019, eq. 5.
    """
    return _si_sdr(*checked_pair(references, estimates))


def whole_ratios(
    references: Tensor | np.ndarray, estimates: Tensor | np.ndarray
) -> dict[str, Tensor]:
    """Both ratios of whole tracks, by name: `{"uSDR": (n,), "SI-SDR": (n,)}`.

    Raises:
        ValueError: the shapes differ or are not of this form, or samples are no finite floats.
    """
    pair = checked_pair(references, estimates)
    return {"uSDR": _usdr(*pair), "SI-SDR": _si_sdr(*pair)}


def _usdr(references: Tensor, estimates: Tensor) -> Tensor:
    return _ratio(references, estimates).masked_fill(_silent(references), torch.nan)


def _si_sdr(references: Tensor, estimates: Tensor) -> Tensor:
    product = power = 0.0
    for reference, estimate in _blocks(references, estimates):
        product = product + _sum(reference * estimate)
        power = power + _sum(reference.square())
    ratio = _ratio(references, estimates, (product / power)[:, None, None])
    return ratio.masked_fill(_silent(estimates), torch.nan)


def _ratio(references: Tensor, estimates: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    """Energy of the references, times a gain, over that of their errors, `(n,)` in dB."""
    signal = noise = 0.0
    for reference, estimate in _blocks(references, estimates):
        target = gain * reference
        signal = signal + _sum(target.square())
        noise = noise + _sum((estimate - target).square())
    return decibels(signal, noise)


def _blocks(references: Tensor, estimates: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of both in float64; a whole song in float64 would take much memory."""
    pair = (x.split(SAMPLES_AT_ONCE, -1) for x in (references, estimates))
    for reference, estimate in zip(*pair, strict=True):
        yield reference.double(), estimate.double()


def _sum(block: Tensor) -> Tensor:
    """Over channels and samples, `(n,)`."""
    return block.sum((1, 2))


def _silent(stems: Tensor) -> Tensor:
    return ~stems.any(-1).any(-1)
