"""Floor and ceilings of a score: the mixture itself, and masks computed from the true sources.

Waveforms are transformed one by one: all spectra of a whole song together, with intermediate
results, would take gigabytes.

Axis letters: `n` stems, `c` and `d` channels, `s` samples, `f` bins, `t` frames.

Notebook: 08_evaluation
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import einsum, reduce
from torch import Tensor

from tfswa_lab.stft import STFTProcessor

N_FFT, HOP_LENGTH = 4096, 1024  # of both oracles
BINS_AT_ONCE = 16  # of the Wiener filter: a song's fit into the cache of a core
LOADING = 1e-8  # of the mixture's power, so that its covariance can be inverted
SILENCE = 1e-100  # instead of a power of 0, to divide by


def mixture_as_estimate(mixture: Tensor, sources: Tensor) -> Tensor:
    """The mixture `(c, s)` as the estimate of every source `(n, c, s)`: no separation."""
    return mixture.expand_as(sources)


def ideal_ratio_mask(mixture: Tensor, sources: Tensor) -> Tensor:
    """Estimates `(n, c, s)` by masks |S| / Σ|S|: the share of each source in the magnitudes.

    Windows of 4096 samples, 1024 apart. The ceiling of masks that leave the mixture its phase.

    Args:
        mixture: `(c, s)`.
        sources: all that the mixture is made of, `(n, c, s)`.
    """
    stft, estimates = STFTProcessor(N_FFT, HOP_LENGTH), sources.new_empty(sources.shape)
    for channel, waveform in enumerate(mixture):
        spectrum = stft(waveform)
        shares = spectrum.real.new_empty(len(sources), *spectrum.shape)
        for share, source in zip(shares, sources, strict=True):
            share[:] = stft(source[channel]).abs()
        shares /= shares.sum(0).clamp(min=torch.finfo(shares.dtype).tiny)
        for estimate, share in zip(estimates, shares, strict=True):
            estimate[channel] = stft.istft(share * spectrum, len(waveform))
    return estimates


def multichannel_wiener(mixture: Tensor, sources: Tensor) -> Tensor:
    """Estimates `(n, c, s)` by the multichannel Wiener filter of the true sources.

    Each source is modelled as Gaussian noise with covariance v(f, t) R(f): its power in every cell,
    and one matrix per bin for its place between the channels. In every cell the filter

        v R (Σ v R)⁻¹

    then has the least expected error. Windows of 4096 samples, 1024 apart.

    Args:
        mixture: `(c, s)`, of one channel or two.
        sources: all that the mixture is made of, `(n, c, s)`.

    Source: Duong, Vincent & Gribonval, "Under-determined reverberant audio source separation using
    a full-rank spatial covariance model", IEEE TASLP 18, 2010, eqs. 3 and 15; R is the mean over
    the track, weighted by energy.
    """
    stft, estimates = STFTProcessor(N_FFT, HOP_LENGTH), sources.new_empty(sources.shape)
    spectrum = stft(mixture)
    spectra = spectrum.new_empty(len(sources), *spectrum.shape)
    for one, waveform in zip(spectra.flatten(0, 1), sources.flatten(0, 1), strict=True):
        one[:] = stft(waveform)
    for some in torch.arange(N_FFT // 2 + 1, device=mixture.device).split(BINS_AT_ONCE):
        spectra[:, :, some] = wiener_filter(spectrum[:, some], spectra[:, :, some])
    for one, estimate in zip(spectra.flatten(0, 1), estimates.flatten(0, 1), strict=True):
        estimate[:] = stft.istft(one, len(estimate))
    return estimates


def wiener_filter(mixture: Tensor, sources: Tensor) -> Tensor:
    """The filter of `multichannel_wiener` on spectra `(c, f, t)` and `(n, c, f, t)`."""
    x, s = mixture.to(torch.complex128), sources.to(torch.complex128)
    power = reduce(s.abs().square(), "n c f t -> n f t", "mean")
    energy = reduce(power, "n f t -> n f 1 1", "sum").clamp(min=SILENCE)
    place = einsum(s, s.conj(), "n c f t, n d f t -> n f c d") / energy
    total = einsum(power.to(s.dtype), place, "n f t, n f c d -> f t c d")
    total += _loading(total)
    whitened = einsum(_inverse(total), x, "f t c d, d f t -> f t c")
    spread = einsum(place, whitened, "n f c d, f t d -> n c f t")
    return (power[:, None] * spread).to(sources.dtype)


def _loading(matrix: Tensor) -> Tensor:
    """Diagonal matrices `(…, c, c)`: a small share of the mean of each matrix's diagonal."""
    level = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return (LOADING * level + SILENCE) * torch.eye(matrix.shape[-1]).to(matrix)


def _inverse(matrix: Tensor) -> Tensor:
    """Inverse matrices `(…, c, c)`; written out for stereo, faster than a library for millions."""
    if matrix.shape[-1] != 2:
        return torch.linalg.inv(matrix)
    a, b, c, d = matrix.flatten(-2).unbind(-1)
    adjugate = torch.stack([d, -b, -c, a], -1).unflatten(-1, (2, 2))
    return adjugate / (a * d - b * c)[..., None, None]


# The floor, and two ceilings: name → (mixture, sources) → estimates.
BOUNDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mixture": mixture_as_estimate,
    "irm": ideal_ratio_mask,
    "mwf": multichannel_wiener,
}
