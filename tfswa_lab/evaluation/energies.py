"""Energies in frames, of references, errors, and what filters make of the references.

A short frame is followed by silence in its transform, so its energies are sums over bins and no
filtered signal is ever made. A long one is filtered piece by piece, in bounded memory.

Axis letters: `n` stems, `c` channels, `s` samples, `m` frames, `l` taps, `f` bins, `p` = n · c
channels of all references, `r` = 2p of references and errors.

Notebook: 08_evaluation
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from tfswa_lab.evaluation.frame_spectra import FrameSpectra
from tfswa_lab.evaluation.frames import Stretch
from tfswa_lab.evaluation.threads import side_by_side

BINS_AT_ONCE = 128  # of a chunk of frames: what a core's cache holds
PIECE = 44_100  # samples of a long frame


def energies(spectra: FrameSpectra, filters: Sequence[Tensor], stems: int) -> Tensor:
    """Sums of squares of what `_fill_parts` makes, in all stretches.

    Args:
        spectra: of the frames.
        filters: to the errors, from all references and from those of the same stem, `(l, p, p)`.
        stems: n.

    Returns:
        `(7, n, m)`: s, the error, its three parts, s + spatial, s + spatial + interference.
    """
    gains = _gains(filters, spectra.n_fft)
    weights = gains[0].real.new_full((spectra.bins,), 2.0 / spectra.n_fft)  # a bin stands for two
    weights[[0, -1]] /= 2  # but the outermost

    def of_chunk(number: int) -> Tensor:
        return _energies_of_chunk(spectra[number], gains, weights)

    found = torch.cat(list(side_by_side(of_chunk, range(len(spectra)))), -1)  # (7, p, m)
    return found.unflatten(1, (stems, -1)).sum(2)


def _energies_of_chunk(chunk: Tensor, gains: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Of every channel `(7, p, m)`."""
    bins, frames, channels = chunk.shape[0], chunk.shape[1], chunk.shape[2] // 2
    parts = chunk.new_empty(7, min(BINS_AT_ONCE, bins), channels, frames)
    sums = 0.0
    for first in range(0, bins, BINS_AT_ONCE):
        some = slice(first, first + BINS_AT_ONCE)
        now = parts[:, : bins - first]
        _fill_parts(now, chunk[some], *(each[some] for each in gains))
        real = torch.view_as_real(now).flatten(2)  # (7, f, p · m · 2)
        sums = sums + weights[some] @ real.square_()
    return sums.view(7, channels, frames, 2).sum(-1)


def energies_of_long(
    references: Tensor, estimates: Tensor, frame: Stretch, filters: Sequence[Tensor]
) -> Tensor:
    """The same `(7, n, 1)` of a single frame of any length.

    Args:
        references: `(n, c, s)`.
        estimates: `(n, c, s)`.
        frame: the first sample, and the one after the last.
        filters: as above.
    """
    taps, (start, stop) = len(filters[0]), frame
    # What a filter makes of a piece depends on the samples before it, and it rings on at the end.
    starts = range(start, stop, PIECE)
    stretches = [(max(first - taps + 1, start), min(first + PIECE, stop)) for first in starts]
    spectra = FrameSpectra(references, estimates, stretches, taps)
    gains = _gains(filters, spectra.n_fft)
    columns = chain.from_iterable(chunk.unbind(1) for chunk in spectra)
    total = 0.0
    for column, first, (begin, end) in zip(columns, starts, stretches, strict=True):
        parts = column.new_empty(7, spectra.bins, spectra.channels, 1)
        _fill_parts(parts, column[:, None], *gains)
        signals = torch.fft.irfft(parts[..., 0], n=spectra.n_fft, dim=1)  # (7, s, p)
        rest = taps - 1 if end == stop else 0
        total = total + signals[:, first - begin : end + rest - begin].square().sum(1)
    return total.view(7, len(references), -1).sum(-1, keepdim=True)


def _gains(filters: Sequence[Tensor], n_fft: int) -> list[Tensor]:
    """Matrices `(f, p, p)`; a column of a filter matrix makes one channel, hence the transposes."""
    return [torch.fft.rfft(each, n=n_fft, dim=0).mT.contiguous() for each in filters]


def _fill_parts(parts: Tensor, chunk: Tensor, all_gains: Tensor, own_gains: Tensor) -> None:
    """Spectra `(7, f, p, m)` in the order of `energies`, of some bins `(f, m, r)`."""
    parts[:2] = chunk.mT.unflatten(1, (2, -1)).transpose(0, 1)
    s, error, spatial, interference, artifacts, filtered, explained = parts
    torch.matmul(own_gains, s, out=spatial)
    torch.matmul(all_gains, s, out=explained)
    torch.sub(explained, spatial, out=interference)
    torch.sub(error, explained, out=artifacts)
    torch.add(s, spatial, out=filtered)
    explained += s
