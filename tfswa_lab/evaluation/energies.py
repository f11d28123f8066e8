"""Energies of a track's references and of the parts of its errors, frame by frame.

Filters are fitted to the errors by least squares, from correlations of the whole track. A short
span of samples is followed by silence in its transform, at a length that leaves room for the tail
of a filter. By Parseval, its energies, those of what filters make of it, and correlations are then
sums over bins: no filtered signal is ever made. A long frame is filtered block by block, in bounded
memory.

Axis letters: `n` stems, `c` channels, `s` samples, `m` frames or other spans, `l` lags or taps, `f`
bins, `p` = n · c channels of all references, `r` = 2p of references and errors.

Notebook: 08_evaluation
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

import scipy.fft
import torch
from torch import Tensor

from tfswa_lab.device import compute_threads
from tfswa_lab.evaluation.block_toeplitz import solve
from tfswa_lab.evaluation.frames import Span
from tfswa_lab.memory.sizes import GIB

TILE = 44_100  # samples, for the correlations of a track that its frames do not tile
LONGEST = 8 * TILE  # samples of a frame that is transformed at once
BLOCK = 44_100  # samples of a longer frame that are transformed at once
SAMPLES_AT_ONCE = 3_000_000  # of all channels: these fit into the cache while they are transformed
BINS_AT_ONCE = 128  # of a chunk of spans: these fit into the cache of a core
CHUNK = 20  # spans: fewer slow down the matrix products, more take memory for nothing
KEEP_BYTES = GIB  # of spectra for their second use; the rest is transformed twice

Item, Result = TypeVar("Item"), TypeVar("Result")


def energies_of_track(
    references: Tensor, estimates: Tensor, frames: list[Span], taps: int
) -> tuple[Tensor, float]:
    """Energies in each frame, with filters fitted to the whole track.

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


def _tiles(samples: int, frame: int, taps: int) -> list[Span]:
    """Spans side by side; frames where possible, which then need no second transform."""
    step = frame if taps <= frame <= LONGEST else max(TILE, taps)
    return [(start, min(start + step, samples)) for start in range(0, samples, step)]


def _filters(correlations: Tensor, stems: int, channels: int) -> tuple[Tensor, Tensor, float]:
    """Filters `(l, p, p)` to the errors, from all references and from the same stem; the loading.

    The recursion has thousands of small steps. Launching them on a GPU takes longer than the whole
    solution on a CPU, so the few MiB of correlations are always solved on the CPU.
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


class FrameSpectra:
    """A sequence of spectra `(f, m, r)`, each of a chunk of spans.

    In memory, spans come before bins: spectra are transposed fastest into this order, and matrix
    products, bin by bin, need no other.

    Args:
        references: `(n, c, s)`, any real type.
        estimates: `(n, c, s)`; references and errors, estimates − references, are transformed.
        spans: at least one; the longest one decides the length of the transform.
        taps: of the filters that will be applied.
    """

    def __init__(self, references: Tensor, estimates: Tensor, spans: Sequence[Span], taps: int):
        self.signals = references.flatten(0, 1), estimates.flatten(0, 1)
        self.chunks = [spans[k : k + CHUNK] for k in range(0, len(spans), CHUNK)]
        longest = max(stop - start for start, stop in spans)
        # Even, with the prime factors 2, 3 and 5 only: FFTs can be twice as slow with 7 or 11.
        self.n_fft = 2 * scipy.fft.next_fast_len(max(1, (longest + taps) // 2), real=True)
        self.bins = self.n_fft // 2 + 1
        self.channels = len(self.signals[0])  # p
        self.kept = {}

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> Tensor:
        """The spectra of a chunk, kept or computed anew."""
        if number in self.kept:
            return self.kept[number]
        spans = self.chunks[number]  # IndexError ends a loop
        shape = (len(spans), self.bins, 2 * self.channels)
        spectra = self.signals[0].new_empty(shape, dtype=torch.complex128)
        group = max(1, SAMPLES_AT_ONCE // (2 * self.channels * self.n_fft))
        shape = (2 * self.channels, min(group, len(spans)), self.n_fft)
        cut = self.signals[0].new_empty(shape, dtype=torch.float64)
        for first in range(0, len(spans), group):
            some = spans[first : first + group]
            for place, span in enumerate(some):
                self._fill(cut[:, place], *span)
            transformed = torch.fft.rfft(cut[:, : len(some)])  # (r, m, f)
            spectra[first : first + len(some)] = transformed.permute(1, 2, 0)
        return spectra.transpose(0, 1)

    def _fill(self, cut: Tensor, start: int, stop: int) -> None:
        """Write the samples `(r, s)` of a span, and silence after them."""
        references, errors = cut.split(self.channels)
        for part, signal in zip((references, errors), self.signals, strict=True):
            part[:, : stop - start] = signal[:, start:stop]
        errors -= references
        cut[:, stop - start :] = 0

    def correlations(self, lags: int) -> Tensor:
        """Σ x_k[t] y_j[t + m] within the spans: `(l, p, r)`, by m, k and j.

        Spectra are kept for the next use, up to `KEEP_BYTES`.
        """
        products = self._no_products()
        for number, spectra in enumerate(side_by_side(self.__getitem__, range(len(self)))):
            _add_products(products, spectra[..., : self.channels], spectra)
            if (number + 1) * spectra.nbytes <= KEEP_BYTES:
                self.kept[number] = spectra
        return _by_lag(products, self.n_fft)[:lags]

    def correlations_across(self) -> Tensor:
        """Correlations at all lags of the first half of the spans with the second half."""
        chunks = side_by_side(self.__getitem__, range(len(self)))
        first, second = torch.cat(list(chunks), 1).chunk(2, 1)
        products = self._no_products()
        _add_products(products, first[..., : self.channels], second)
        return _by_lag(products, self.n_fft)

    def _no_products(self) -> Tensor:
        shape = (self.bins, 2 * self.channels, 4 * self.channels)
        return self.signals[0].new_zeros(shape, dtype=torch.float64)


def _add_products(products: Tensor, first: Tensor, second: Tensor) -> None:
    """Add the products of real and imaginary parts, summed over spans: `(f, 2p, 2r)`.

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
    """Σ x_k[t] y_j[t + m] over all t before a border with t + m at or after it.

    Args:
        references: `(n, c, s)`.
        estimates: `(n, c, s)`.
        borders: where tiles meet; they must lie at least `lags` samples apart.
        lags: how many, from 0 on.

    Returns:
        `(l, p, r)`, by m, k and j; with those within the tiles they are those of the track.
    """
    reach, end = lags - 1, references.shape[-1]
    before = [(border - reach, border) for border in borders]
    behind = [(border, min(border + reach, end)) for border in borders]
    both = FrameSpectra(references, estimates, before + behind, lags)
    # Two samples at the same place of both spans lie `reach` apart.
    return both.correlations_across()[(torch.arange(lags) - reach) % both.n_fft]


def energies(spectra: FrameSpectra, filters: Sequence[Tensor], stems: int) -> Tensor:
    """Energies of the signals that `_fill_parts` makes, in all spans.

    Args:
        spectra: of the frames.
        filters: to the errors, from all references and from those of the same stem, `(l, p, p)`.
        stems: n.

    Returns:
        `(7, n, m)`: s, the error, its three parts, s + spatial, s + spatial + interference.
    """
    gains = _gains(filters, spectra.n_fft)
    weights = gains[0].real.new_full((spectra.bins,), 2.0 / spectra.n_fft)  # a bin stands for two,
    weights[[0, -1]] /= 2  # except the first and the last

    def of_chunk(number: int) -> Tensor:
        return _energies_of_chunk(spectra[number], gains, weights)

    found = torch.cat(list(side_by_side(of_chunk, range(len(spectra)))), -1)  # (7, p, m)
    return found.unflatten(1, (stems, -1)).sum(2)


def _energies_of_chunk(chunk: Tensor, gains: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Energies `(7, p, m)` of every channel in a chunk of spans."""
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
    references: Tensor, estimates: Tensor, frame: Span, filters: Sequence[Tensor]
) -> Tensor:
    """Energies `(7, n, 1)` of a single frame of any length.

    Args:
        references: `(n, c, s)`.
        estimates: `(n, c, s)`.
        frame: the first sample, and the one after the last.
        filters: as `energies` takes them.
    """
    taps, (start, stop) = len(filters[0]), frame
    # The output of a filter depends on the samples before a block, and rings on after the last.
    starts = range(start, stop, BLOCK)
    spans = [(max(first - taps + 1, start), min(first + BLOCK, stop)) for first in starts]
    spectra = FrameSpectra(references, estimates, spans, taps)
    gains = _gains(filters, spectra.n_fft)
    columns = chain.from_iterable(chunk.unbind(1) for chunk in spectra)
    total = 0.0
    for column, first, (begin, end) in zip(columns, starts, spans, strict=True):
        parts = column.new_empty(7, spectra.bins, spectra.channels, 1)
        _fill_parts(parts, column[:, None], *gains)
        signals = torch.fft.irfft(parts[..., 0], n=spectra.n_fft, dim=1)  # (7, s, p)
        rest = taps - 1 if end == stop else 0
        total = total + signals[:, first - begin : end + rest - begin].square().sum(1)
    return total.view(7, len(references), -1).sum(-1, keepdim=True)


def _gains(filters: Sequence[Tensor], n_fft: int) -> list[Tensor]:
    """Frequency responses `(f, p, p)`, transposed: a filter's columns become rows of a product."""
    return [torch.fft.rfft(each, n=n_fft, dim=0).mT.contiguous() for each in filters]


def _fill_parts(parts: Tensor, chunk: Tensor, all_gains: Tensor, own_gains: Tensor) -> None:
    """Write spectra `(7, f, p, m)` in the order of `energies`, from some bins `(f, m, r)`."""
    parts[:2] = chunk.mT.unflatten(1, (2, -1)).transpose(0, 1)
    s, error, spatial, interference, artifacts, filtered, explained = parts
    torch.matmul(own_gains, s, out=spatial)
    torch.matmul(all_gains, s, out=explained)
    torch.sub(explained, spatial, out=interference)
    torch.sub(error, explained, out=artifacts)
    torch.add(s, spatial, out=filtered)
    explained += s


def side_by_side(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map` in as many threads as torch uses, each with a single thread of torch's.

    Torch splits every operation among its threads and waits for all of them. Where operations are
    many and short, and a core is busy with something else, the waiting takes longer than the work.
    Here each thread gets an item of its own.

    Results come in order; few more than there are threads are held until they are taken.
    """
    count = torch.get_num_threads()
    if count == 1:
        yield from map(function, items)
        return
    with compute_threads(1), ThreadPoolExecutor(count) as pool:
        pending = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
