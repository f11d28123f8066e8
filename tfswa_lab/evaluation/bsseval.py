"""BSSEval: how much of an estimate's error is which kind of error, exactly and fast.

An estimate is its reference s plus an error. With filters of 512 taps, fitted by least squares, the
error falls into three parts: *spatial*, what a filter of the reference itself explains;
*interference*, what filters of all references explain beyond that; *artifacts*, the rest.

    SDR = s² / (spatial + interference + artifacts)²
    ISR = s² / spatial²
    SIR = (s + spatial)² / interference²
    SAR = (s + spatial + interference)² / artifacts²

`bss_eval` gives the values of `museval.metrics.bss_eval`. Here the filters are fitted to the
errors, so that nothing cancels; each frame is transformed once and its energies are summed over
bins, in `energies`; and the equations are solved by their structure, in `block_toeplitz`.

`bss_eval_mono` gives SDR, SIR and SAR of a whole mono clip, and `gnsdr`, `gsir` and `gsar` their
means over clips: the numbers that papers report for MIR-1K.

Axis letters: `n` stems or sources, `c` channels, `s` samples, `m` frames.

Source: Vincent, Gribonval & Févotte, "Performance measurement in blind audio source separation",
IEEE TASLP 14, 2006; Vincent et al., "The signal separation evaluation campaign (2007–2010)", Signal
Processing 92, 2012 (images, v3); Stöter, Liutkus & Ito, "The 2018 signal separation evaluation
campaign", LVA/ICA 2018 (v4).

Notebook: 08_evaluation
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tfswa_lab.audio import decibels
from tfswa_lab.evaluation.energies import energies_of_track
from tfswa_lab.evaluation.frames import (
    Span,
    audible,
    checked_pair,
    checked_taps,
    frames_in_seconds,
    select_stems,
    silent_frames,
)

MODES = ("v4", "v3")


@dataclass(frozen=True)
class BSSEval:
    """Ratios in dB of every stem in every frame.

    Args:
        sdr: signal to distortion `(n, m)`, float64, NaN where a stem is silent.
        isr: image to spatial distortion.
        sir: signal to interference.
        sar: signal to artifacts.
        window: length of a frame in seconds.
        hop: from one frame to the next, in seconds.
        notes: remarks for the reader, such as why some ratios are NaN.
    """

    sdr: Tensor
    isr: Tensor
    sir: Tensor
    sar: Tensor
    window: float
    hop: float
    notes: tuple[str, ...]

    def ratios(self) -> dict[str, Tensor]:
        """`{"SDR": (n, m), …}`: the four ratios by the names that museval gives them."""
        return {"SDR": self.sdr, "ISR": self.isr, "SIR": self.sir, "SAR": self.sar}

    def medians(self) -> dict[str, Tensor]:
        """`{"SDR": (n,), …}`: medians over the frames that have a value, as museval takes them."""
        return {
            name: ratio.new_tensor(ignoring_nan(np.nanmedian, ratio.numpy(force=True), axis=1))
            for name, ratio in self.ratios().items()
        }


def ignoring_nan(
    statistic: Callable, values: np.ndarray | Sequence[float], axis: int | None = None
) -> np.ndarray:
    """numpy's `nanmedian`, `nanmean` or `nanmax`; NaN, without a warning, where all values are.

    >>> ignoring_nan(np.nanmedian, [1.0, math.nan, 4.0]).item()
    2.5
    """
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        return statistic(values, axis=axis)


def bss_eval(
    references: Tensor | np.ndarray,
    estimates: Tensor | np.ndarray,
    window: float = 1.0,
    hop: float = 1.0,
    filter_length: int = 512,
    mode: str = "v4",
    rate: int = 44_100,
) -> BSSEval:
    """SDR, ISR, SIR and SAR of separated stems, frame by frame.

    The last frame must be whole: samples behind it only count for the filters. A frame in
    which the channels of any reference or estimate cancel at every sample is NaN for all stems. A
    stem that is silent from beginning to end is NaN itself and left out of everything else; one
    whose channels cancel throughout is NaN as well, but it still interferes.

    Args:
        references: the true stems `(n, c, s)`, or `(n, s)` for mono, on any device.
        estimates: of the same shape, in the same order.
        window: length of a frame in seconds; `math.inf` for one frame that is the whole track.
        hop: from one frame to the next, in seconds.
        filter_length: taps of the distortion filters.
        mode: "v4" fits the filters once, to the whole track; "v3" to every frame anew.
        rate: samples per second.

    Raises:
        ValueError: the shapes differ or are not of this form, samples are not finite floats, or a
            number makes no sense.

    >>> stems = torch.randn(2, 1, 16_000, generator=torch.Generator().manual_seed(0))
    >>> result = bss_eval(stems, 0.9 * stems, rate=8000)  # a tenth of s is missing
    >>> result.isr.round().tolist()
    [[20.0, 20.0], [20.0, 20.0]]
    """
    references, estimates = checked_pair(references, estimates)
    frames = frames_in_seconds(references.shape[-1], window, hop, rate)
    taps = checked_taps(filter_length)
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: choose v4 (filters of the track) or v3 (of each frame)")
    ratios = references.new_full((4, len(references), len(frames)), torch.nan, dtype=torch.float64)
    sounding, scored, notes = audible(references, estimates)
    if scored:
        silent = silent_frames(references, estimates, scored, frames)
        pair = select_stems(references, sounding), select_stems(estimates, sounding)
        energies, loading = _decompose(*pair, frames, taps, mode)
        ratios[:, sounding] = _ratios(energies).masked_fill(silent, torch.nan)
        notes += _note_of_loading(loading, *pair[0].shape, taps)
    ratios[:, [stem for stem in range(len(references)) if stem not in scored]] = torch.nan
    return BSSEval(*ratios, window, hop, notes)


def _decompose(
    references: Tensor, estimates: Tensor, frames: list[Span], taps: int, mode: str
) -> tuple[Tensor, float]:
    """Energies `(7, n, m)` in the order of `energies_of_track`, and the loading."""
    if mode == "v4":
        return energies_of_track(references, estimates, frames, taps)
    alone = []
    for start, stop in frames:  # a frame with filters of its own is a track of one frame
        pair = references[..., start:stop], estimates[..., start:stop]
        alone.append(energies_of_track(*pair, [(0, stop - start)], taps))
    energies, loadings = zip(*alone, strict=True)
    return torch.cat(energies, -1), max(loadings)


def _ratios(energies: Tensor) -> Tensor:
    """SDR, ISR, SIR and SAR in dB `(4, n, m)` from energies `(7, n, m)`."""
    s, error, spatial, interference, artifacts, filtered, explained = energies
    pairs = ((s, error), (s, spatial), (filtered, interference), (explained, artifacts))
    return torch.stack([decibels(signal, noise) for signal, noise in pairs])


def _note_of_loading(
    loading: float, stems: int, channels: int, samples: int, taps: int
) -> tuple[str, ...]:
    if not loading:
        return ()
    if samples + taps - 1 < stems * channels * taps:  # fewer equations than unknowns
        reason = f"too short to determine {stems * channels} filters of {taps} taps"
    else:
        reason = "the channels of the references repeat one another (a mono stem?)"
    way = f"with {loading:.0e} of their power added" if math.isfinite(loading) else "in part"
    return (f"{reason}: solved {way}",)


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
    return replace(scores, floor=bss_eval_mono(references, mixture, rate=rate).sdr)


def gnsdr(clips: Sequence[ClipScores]) -> Tensor:
    """Global normalised SDR `(n,)`: the mean gain over the mixture, weighted by length.

    If the score of a source is NaN in one clip, its mean is NaN: leave such clips out before, and
    report which.

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
