"""Spectra of stretches of references and errors, in which energies and correlations are sums.

A stretch is cut out, followed by silence, and transformed at a length that leaves room for the
tail of a filter. By Parseval, the energies of stretches, of what filters make of them, and their
correlations are then sums over bins: no filtered signal is ever made.

Axis letters: `n` stems, `c` channels, `s` samples, `p` = n · c channels of all references, `r` = 2p
of references and errors, `m` stretches, `l` lags, `f` bins.

Notebook: 08_evaluation
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tfswa_lab.evaluation.frames import Stretch
from tfswa_lab.evaluation.threads import side_by_side
from tfswa_lab.memory.sizes import GIB

SAMPLES_AT_ONCE = 3_000_000  # of all channels: what is transformed while it is in the cache
CHUNK = 20  # stretches: products of matrices want some, but a copy of what is kept is no use
KEEP_BYTES = GIB  # of spectra that are needed twice; what is beyond is transformed twice


class FrameSpectra:
    """A sequence of spectra `(f, m, r)`, each of a chunk of stretches.

    In memory, stretches come before bins: that is how spectra are turned fastest, and products of
    matrices, bin by bin, take it as it is.

    Args:
        references: `(n, c, s)`, any real type.
        estimates: `(n, c, s)`; their errors, estimates − references, are what is transformed.
        stretches: at least one; the longest decides about the length of the transform.
        taps: of the filters that will be applied.
    """

    def __init__(
        self, references: Tensor, estimates: Tensor, stretches: Sequence[Stretch], taps: int
    ):
        self.signals = references.flatten(0, 1), estimates.flatten(0, 1)
        self.chunks = [stretches[k : k + CHUNK] for k in range(0, len(stretches), CHUNK)]
        longest = max(stop - start for start, stop in stretches)
        self.n_fft = fast_even_length(longest + taps - 1)
        self.bins = self.n_fft // 2 + 1
        self.channels = len(self.signals[0])  # p
        self.kept = {}

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> Tensor:
        """What was kept of it, or made anew."""
        if number in self.kept:
            return self.kept[number]
        stretches = self.chunks[number]  # IndexError ends a loop
        shape = (len(stretches), self.bins, 2 * self.channels)
        spectra = self.signals[0].new_empty(shape, dtype=torch.complex128)
        group = max(1, SAMPLES_AT_ONCE // (2 * self.channels * self.n_fft))
        shape = (2 * self.channels, min(group, len(stretches)), self.n_fft)
        cut = self.signals[0].new_empty(shape, dtype=torch.float64)
        for first in range(0, len(stretches), group):
            some = stretches[first : first + group]
            for place, stretch in enumerate(some):
                self._fill(cut[:, place], *stretch)
            transformed = torch.fft.rfft(cut[:, : len(some)])  # (r, m, f)
            spectra[first : first + len(some)] = transformed.permute(1, 2, 0)
        return spectra.transpose(0, 1)

    def _fill(self, cut: Tensor, start: int, stop: int) -> None:
        """Samples `(r, s)` of a stretch, and silence."""
        references, errors = cut.split(self.channels)
        for part, signal in zip((references, errors), self.signals, strict=True):
            part[:, : stop - start] = signal[:, start:stop]
        errors -= references
        cut[:, stop - start :] = 0

    def correlations(self, lags: int) -> Tensor:
        """Σ x_k[t] y_j[t + m] within the stretches: `(l, p, r)`, by m, k and j.

        As many spectra as there is room for are kept for the next time.
        """
        products = self._no_products()
        for number, spectra in enumerate(side_by_side(self.__getitem__, range(len(self)))):
            _add_products(products, spectra[..., : self.channels], spectra)
            if (number + 1) * spectra.nbytes <= KEEP_BYTES:
                self.kept[number] = spectra
        return _by_lag(products, self.n_fft)[:lags]

    def correlations_across(self) -> Tensor:
        """The same at all lags, of the first half of the stretches with the second half."""
        chunks = side_by_side(self.__getitem__, range(len(self)))
        first, second = torch.cat(list(chunks), 1).chunk(2, 1)
        products = self._no_products()
        _add_products(products, first[..., : self.channels], second)
        return _by_lag(products, self.n_fft)

    def _no_products(self) -> Tensor:
        shape = (self.bins, 2 * self.channels, 4 * self.channels)
        return self.signals[0].new_zeros(shape, dtype=torch.float64)


def _add_products(products: Tensor, first: Tensor, second: Tensor) -> None:
    """Σ over stretches, of real and imaginary parts with one another: `(f, 2p, 2r)`.

    Real matrices, because torch would copy complex ones to conjugate them.
    """
    first, second = (torch.view_as_real(x).flatten(-2) for x in (first, second))
    torch.baddbmm(products, first.mT, second, out=products)


def _by_lag(products: Tensor, n_fft: int) -> Tensor:
    """Correlations `(l, p, r)` at all lags from products `(f, 2p, 2r)`."""
    products = products.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (f, p, 2, r, 2)
    real = products[:, :, 0, :, 0] + products[:, :, 1, :, 1]
    imaginary = products[:, :, 0, :, 1] - products[:, :, 1, :, 0]
    return torch.fft.irfft(torch.complex(real, imaginary), n=n_fft, dim=0)


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
        `(l, p, r)`, by m, k and j: what the correlations within the tiles lack.
    """
    reach, end = lags - 1, references.shape[-1]
    before = [(border - reach, border) for border in borders]
    behind = [(border, min(border + reach, end)) for border in borders]
    both = FrameSpectra(references, estimates, before + behind, lags)
    # Two samples at the same place of both stretches lie `reach` apart.
    return both.correlations_across()[(torch.arange(lags) - reach) % both.n_fft]


def fast_even_length(least: int) -> int:
    """The next even length whose only prime factors are 2, 3 and 5.

    FFT libraries differ in the primes that they have good code for; these three are always fast.

    >>> fast_even_length(44_611)
    45000
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
