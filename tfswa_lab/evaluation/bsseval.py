"""BSSEval: how much of an estimate's error is which kind of error, exactly and fast.

An estimate is its reference s plus an error. With filters of 512 taps, fitted by least squares, the
error falls into three parts: *spatial*, what a filter of the reference itself explains;
*interference*, what filters of all references explain beyond that; *artifacts*, the rest.

    SDR = s² / (spatial + interference + artifacts)²
    ISR = s² / spatial²
    SIR = (s + spatial)² / interference²
    SAR = (s + spatial + interference)² / artifacts²

These are the values of `museval.metrics.bss_eval`. Here the filters are fitted to the errors, so
that nothing cancels; each frame is transformed once and its energies are summed over bins; and the
equations are solved by their structure, in `block_toeplitz`.

Axis letters: `n` stems, `c` channels, `s` samples, `m` frames, `l` taps, `f` bins, `p` = n · c
channels of all references.

Source: Vincent, Gribonval & Févotte, "Performance measurement in blind audio source separation",
IEEE TASLP 14, 2006; Vincent et al., "The signal separation evaluation campaign (2007–2010)", Signal
Processing 92, 2012 (images, v3); Stöter, Liutkus & Ito, "The 2018 signal separation evaluation
campaign", LVA/ICA 2018 (v4).

Notebook: 08_evaluation
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch import Tensor

from tfswa_lab.evaluation.block_toeplitz import solve
from tfswa_lab.evaluation.energies import energies, energies_of_long
from tfswa_lab.evaluation.frame_spectra import FrameSpectra, correlations_across
from tfswa_lab.evaluation.frames import (
    Stretch,
    audible,
    checked_pair,
    checked_taps,
    chosen,
    frames_in_seconds,
    silent_frames,
)
from tfswa_lab.evaluation.threads import compute_threads

MODES = ("v4", "v3")
TILE = 44_100  # samples, for the correlations of a track that its frames do not tile
LONGEST = 8 * TILE  # samples of a frame that is transformed in one piece


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
        notes: what the reader of the numbers should know, such as why some are NaN.
    """

    sdr: Tensor
    isr: Tensor
    sir: Tensor
    sar: Tensor
    window: float
    hop: float
    notes: tuple[str, ...]

    def medians(self) -> dict[str, Tensor]:
        """`{"SDR": (n,), …}`: medians over the frames that have a value, as museval takes them."""
        named = {"SDR": self.sdr, "ISR": self.isr, "SIR": self.sir, "SAR": self.sar}
        return {
            name: ratio.new_tensor([median_of(frames) for frames in ratio.tolist()])
            for name, ratio in named.items()
        }


def median_of(values: list[float]) -> float:
    """The median of those that are numbers, NaN if none is.

    >>> median_of([1.0, math.nan, 4.0])
    2.5
    """
    numbers = [value for value in values if not math.isnan(value)]
    return median(numbers) if numbers else math.nan


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

    The last frame must be whole: what is left behind it takes part in the filters only. A frame in
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
        pair = chosen(references, sounding), chosen(estimates, sounding)
        energies, loading = _decompose(*pair, frames, taps, mode)
        silent = silent_frames(chosen(references, scored), chosen(estimates, scored), frames)
        ratios[:, sounding] = _ratios(energies).masked_fill(silent, torch.nan)
        notes += _note_of_loading(loading, *pair[0].shape, taps)
    ratios[:, [stem for stem in range(len(references)) if stem not in scored]] = torch.nan
    return BSSEval(*ratios, window, hop, notes)


def _decompose(
    references: Tensor, estimates: Tensor, frames: list[Stretch], taps: int, mode: str
) -> tuple[Tensor, float]:
    """Energies `(7, n, m)` as `energies_of_track` has them, and the loading of the equations."""
    if mode == "v4":
        return energies_of_track(references, estimates, frames, taps)
    alone = []
    for start, stop in frames:  # one with filters of its own is a track of one frame
        pair = references[..., start:stop], estimates[..., start:stop]
        alone.append(energies_of_track(*pair, [(0, stop - start)], taps))
    energies, loadings = zip(*alone, strict=True)
    return torch.cat(energies, -1), max(loadings)


def energies_of_track(
    references: Tensor, estimates: Tensor, frames: list[Stretch], taps: int
) -> tuple[Tensor, float]:
    """What the ratios are made of, with filters fitted to the whole track.

    Args:
        references: `(n, c, s)`.
        estimates: `(n, c, s)`.
        frames: as `frames_of` has them.
        taps: of the filters.

    Returns:
        Energies `(7, n, m)` of s, the error, its three parts, s + spatial, and s + spatial +
        interference; and the loading that the equations needed, 0 for none.
    """
    tiles = _tiles(references.shape[-1], frames[0][1], taps)
    spectra = FrameSpectra(references, estimates, tiles, taps)
    correlations = spectra.correlations(taps)
    if len(tiles) > 1:
        borders = [start for start, _ in tiles[1:]]
        correlations += correlations_across(references, estimates, borders, taps)
    *filters, loading = _filters(correlations, *references.shape[:2])
    if frames[0][1] > LONGEST:
        del spectra
        long = [energies_of_long(references, estimates, frame, filters) for frame in frames]
        return torch.cat(long, -1), loading
    if tiles[: len(frames)] != frames:
        spectra = FrameSpectra(references, estimates, frames, taps)
    return energies(spectra, filters, len(references))[..., : len(frames)], loading


def _tiles(samples: int, frame: int, taps: int) -> list[Stretch]:
    """Stretches side by side, frames if possible: then these need not be transformed again."""
    step = frame if taps <= frame <= LONGEST else max(TILE, taps)
    return [(start, min(start + step, samples)) for start in range(0, samples, step)]


def _filters(correlations: Tensor, stems: int, channels: int) -> tuple[Tensor, Tensor, float]:
    """Filters `(l, p, p)` to the errors from all references and from the own ones, and loading.

    The recursion is thousands of small steps, whose launches alone take a GPU longer than the CPU
    needs for all of it: the few MiB of correlations are solved on the CPU, wherever the songs are.
    """
    device = correlations.device
    blocks, sides = correlations[None].cpu().chunk(2, -1)
    own_blocks, own_sides = (_own(x[0], stems, channels) for x in (blocks, sides))
    with compute_threads(1):  # steps are so small that threads would wait for each other
        of_all, loading = solve(blocks, sides)
        of_own, own_loadings = solve(own_blocks.movedim(-1, 0), own_sides.movedim(-1, 0))
    apart = torch.zeros_like(of_all[0])
    _own(apart, stems, channels).copy_(of_own.movedim(0, -1))
    loading = max(loading.item(), own_loadings.max().item())
    return of_all[0].to(device), apart.to(device), loading


def _own(matrices: Tensor, stems: int, channels: int) -> Tensor:
    """The blocks `(l, c, c, n)` of `(l, p, p)` in which a stem meets itself."""
    apart = matrices.unflatten(2, (stems, channels)).unflatten(1, (stems, channels))
    return apart.diagonal(0, 1, 3)


def _ratios(energies: Tensor) -> Tensor:
    """SDR, ISR, SIR and SAR in dB `(4, n, m)` from energies `(7, n, m)`."""
    s, error, spatial, interference, artifacts, filtered, explained = energies
    pairs = ((s, error), (s, spatial), (filtered, interference), (explained, artifacts))
    return torch.stack([decibels(signal, noise) for signal, noise in pairs])


def decibels(signal: Tensor, noise: Tensor) -> Tensor:
    """The ratio of two energies in dB, infinite where there is no noise."""
    return (10 * (signal / noise).log10()).masked_fill(noise == 0, torch.inf)


def _note_of_loading(
    loading: float, stems: int, channels: int, samples: int, taps: int
) -> tuple[str, ...]:
    if not loading:
        return ()
    if samples + taps - 1 < stems * channels * taps:  # fewer equations than unknowns
        reason = f"too short to determine {stems * channels} filters of {taps} taps"
    else:
        reason = "the channels of the references repeat one another (a mono stem?)"
    return (f"{reason}: solved with {loading:.0e} of their power added",)
