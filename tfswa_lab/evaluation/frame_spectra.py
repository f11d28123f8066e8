"""Spectra of stretches of references and errors, in which energies and correlations are sums.

A stretch is cut out, followed by silence, and transformed at a length that leaves room for the
tail of a filter. By Parseval, the energies of stretches, of what filters make of them, and their
correlations are then sums over bins: no filtered signal is ever made.

Axis letters: `n` stems, `c` channels, `s` samples, `p` = n · c channels of all references, `r` = 2p
of references and errors, `m` stretches, `l` lags, `f` bins.

Notebook: 08_evaluation
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tfswa_lab.evaluation.frames import Stretch

SAMPLES_AT_ONCE = 3_000_000  # of all channels: what is transformed while it is in the cache
GROUPS = 5  # of these make a chunk: products of matrices want more columns than that
KEEP_BYTES = 2**30  # of spectra that are needed twice; what is beyond is transformed twice


class FrameSpectra:
    """Spectra `(f, r, m)` of stretches, a chunk of them at a time.

    Args:
        references: `(n, c, s)`, any real type.
        estimates: `(n, c, s)`; their errors, estimates − references, are what is transformed.
        stretches: at least one; the longest decides about the length of the transform.
        taps: of the filters that will be applied.

    Notebook: 08_evaluation
    """

    def __init__(
        self, references: Tensor, estimates: Tensor, stretches: Sequence[Stretch], taps: int
    ):
        self.signals = references.flatten(0, 1), estimates.flatten(0, 1)
        self.stretches = list(stretches)
        longest = max(stop - start for start, stop in self.stretches)
        self.n_fft = fast_even_length(longest + taps - 1)
        self.bins = self.n_fft // 2 + 1
        self.channels = len(self.signals[0])  # p
        group = max(1, SAMPLES_AT_ONCE // (2 * self.channels * self.n_fft))
        group = min(group, len(self.stretches))
        # Written to again and again: fresh memory would cost as much time as the transform.
        shape = (2 * self.channels, group)
        self.cut = references.new_zeros(*shape, self.n_fft, dtype=torch.float64)
        self.transformed = references.new_empty(*shape, self.bins, dtype=torch.complex128)
        self.chunk = GROUPS * group
        self.kept = []

    def __iter__(self) -> Iterator[Tensor]:
        """Chunks in order; as many as there is room for are kept for the next time."""
        for number, first in enumerate(range(0, len(self.stretches), self.chunk)):
            if number < len(self.kept):
                yield self.kept[number]
                continue
            chunk = self._transform(self.stretches[first : first + self.chunk])
            if (number + 1) * chunk.nbytes <= KEEP_BYTES:
                self.kept.append(chunk)
            yield chunk

    def _transform(self, stretches: list[Stretch]) -> Tensor:
        shape = (self.bins, 2 * self.channels, len(stretches))
        spectra = self.cut.new_empty(shape, dtype=torch.complex128)
        group = self.cut.shape[1]
        for first in range(0, len(stretches), group):
            some = stretches[first : first + group]
            for place, stretch in enumerate(some):
                self._fill(self.cut[:, place], *stretch)
            torch.fft.rfft(self.cut, out=self.transformed)  # (r, m, f)
            by_bin = self.transformed[:, : len(some)].permute(2, 0, 1)
            spectra[..., first : first + len(some)] = by_bin
        return spectra

    def _fill(self, cut: Tensor, start: int, stop: int) -> None:
        """Samples `(r, s)` of a stretch, and silence."""
        references, errors = cut.split(self.channels)
        for part, signal in zip((references, errors), self.signals, strict=True):
            part[:, : stop - start] = signal[:, start:stop]
        errors -= references
        cut[:, stop - start :] = 0

    def correlations(self, lags: int) -> Tensor:
        """Σ x_k[t] y_j[t + m] within the stretches: `(l, r, p)`, by m, j and k."""
        shape = (self.bins, 2 * self.channels, self.channels)
        total = self.cut.new_zeros(shape, dtype=torch.complex128)
        for spectra in self:
            torch.baddbmm(total, spectra, spectra[:, : self.channels].mH, out=total)
        return torch.fft.irfft(total, n=self.n_fft, dim=0)[:lags]


def correlations_across(
    references: Tensor, estimates: Tensor, borders: Sequence[int], lags: int
) -> Tensor:
    """Σ x_k[t] y_j[t + m] over all t before a border with t + m behind it.

    Args:
        references: `(n, c, s)`.
        estimates: `(n, c, s)`.
        borders: where tiles meet; they must lie at least `lags` samples apart.
        lags: how many, from 0 on.

    Returns:
        `(l, r, p)`, by m, j and k; what the correlations within the tiles lack.

    Notebook: 08_evaluation
    """
    reach, end = lags - 1, references.shape[-1]
    before = [(border - reach, border) for border in borders]
    behind = [(border, min(border + reach, end)) for border in borders]
    both = FrameSpectra(references, estimates, before + behind, lags)
    first, second = torch.cat(list(both), -1).chunk(2, -1)
    cross = torch.fft.irfft(second @ first[:, : both.channels].mH, n=both.n_fft, dim=0)
    # Two samples at the same place of both stretches lie `reach` apart.
    return cross[(torch.arange(lags) - reach) % both.n_fft]


def fast_even_length(least: int) -> int:
    """The next even length whose only prime factors are 2, 3 and 5.

    FFT libraries differ in the primes that they have good code for; these three are always fast.

    >>> fast_even_length(44_611)
    45000

    Notebook: 08_evaluation
    """
    length = max(2, least + least % 2)
    while not _is_smooth(length):
        length += 2
    return length


def _is_smooth(number: int) -> bool:
    for prime in (2, 3, 5):
        while number % prime == 0:
            number //= prime
    return number == 1
