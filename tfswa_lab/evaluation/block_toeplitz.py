"""Filters from delayed copies of some signals to others: least squares without the big matrix.

The best filters of `l` taps from `p` channels to `q` others solve T h = d. T holds the correlations
of the channels at every difference of two delays: for four stereo stems and 512 taps it has 4096
rows, but it is made of one p × p block per delay. Cholesky's method takes a third of the cube of
the rows. The recursion below takes the square of the taps times the cube of the channels, and T is
never written down.

Axis letters: `b` independent systems, `l` taps, `p` channels, `q` right-hand sides, `f` bins.

Source: Akaike, "Block Toeplitz matrix inversion", SIAM J. Appl. Math. 24, 1973 (the recursion and
the form of the inverse).

Notebook: 08_evaluation
"""

from __future__ import annotations

import torch
from torch import Tensor

# Shares of the power of a channel, added to the diagonal in turn until T can be inverted.
LOADINGS = (0.0, *(10.0**exponent for exponent in range(-14, -5)))
SMALL = 1e-13  # residual over right-hand side at which a solution is as good as double precision
BAD = 1e-8  # relative residual above which a solution is rejected
ROUNDS = 12  # of refinement
CUT = 1e-14  # share of the largest eigenvalue below which `_solve_dense` leaves directions out


def solve(blocks: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
    """Solve T h = d for symmetric block-Toeplitz T.

    Channels that repeat or mix one another, such as both sides of a mono stem, make T singular. It
    is then inverted with the smallest of `LOADINGS` that works on its diagonal. The inverse only
    guides the refinement, whose residuals are those of T itself, so the loading hardly shows.

    Args:
        blocks: first column of blocks `(b, l, p, p)`; `[…, m, k, j]` is Σ x_k[t] x_j[t + m].
        sides: `(b, l, p, q)`; `[…, m, k, j]` is Σ x_k[t] y_j[t + m].

    Returns:
        Filters `(b, l, p, q)`, and the loading `(b,)` of each system; infinite where none works
        and the eigenvalues of T were needed.

    Raises:
        ArithmeticError: that does not work either: these are no correlations.
    """
    power = blocks[:, 0].diagonal(dim1=-2, dim2=-1)
    level = torch.where(power > 0, power, 1.0).sqrt()[:, None, :, None]  # (b, 1, p, 1)
    blocks, sides = blocks / level / level.mT, sides / level
    filters = torch.zeros_like(sides)
    loadings = sides.new_full((len(sides),), torch.nan)
    for loading in LOADINGS:
        left = loadings.isnan().nonzero()[:, 0]
        if not len(left):
            break
        found, good = _solve_loaded(blocks[left], sides[left], loading)
        filters[left[good]] = found[good]
        loadings[left[good]] = loading
    for system in loadings.isnan().nonzero()[:, 0].tolist():
        filters[system] = _solve_dense(blocks[system : system + 1], sides[system : system + 1])
        loadings[system] = torch.inf
    return filters / level, loadings


def _solve_loaded(blocks: Tensor, sides: Tensor, loading: float) -> tuple[Tensor, Tensor]:
    """Filters, and in which systems they are good `(b,)`."""
    loaded = blocks.clone()
    loaded[:, 0].diagonal(dim1=-2, dim2=-1).add_(loading)
    inverse, matrix = Inverse(loaded), _matrix(blocks)
    scale = _norm(sides).clamp(min=torch.finfo(sides.dtype).tiny)
    best, lowest = torch.zeros_like(sides), torch.full_like(scale, torch.inf)
    filters, residual = best, sides
    for _ in range(ROUNDS):
        filters = filters + inverse(residual)
        residual = sides - _product(matrix, filters)
        size = _norm(residual) / scale
        better = size < lowest  # false for NaN
        best = torch.where(better[:, None, None, None], filters, best)
        lowest = torch.where(better, size, lowest)
        if not (better & (lowest > SMALL)).any():
            break
    return best, inverse.exists & (lowest < BAD)


def _solve_dense(blocks: Tensor, sides: Tensor) -> Tensor:
    """Filters of one system from the eigenvalues of T: slow, and for the worst T.

    A float32 stem without high frequencies and a delayed copy of it need that.
    """
    _, taps, channels, _ = blocks.shape
    delays = torch.arange(taps)[:, None] - torch.arange(taps)
    both = torch.cat([blocks[0, 1:].flip(0).mT, blocks[0]])  # delays from 1 − l to l − 1
    dense = both[delays + taps - 1].transpose(1, 2).reshape(taps * channels, -1)
    powers, directions = torch.linalg.eigh((dense + dense.mT) / 2)
    inverted = torch.where(powers > CUT * powers[-1].abs(), 1 / powers, 0.0)[:, None]
    wanted = sides[0].reshape(taps * channels, -1)
    filters = directions @ (inverted * (directions.mT @ wanted))
    if (dense @ filters - wanted).norm() > BAD * wanted.norm():
        raise ArithmeticError("no filters fit, whatever is added: these are no correlations")
    return filters.view_as(sides[0])


class Inverse:
    """The inverse of block-Toeplitz matrices as a function, by convolutions.

    T⁻¹ = A E⁻¹ Aᵀ − C G⁻¹ Cᵀ, where A and C are lower triangular and Toeplitz as well: their first
    columns are the predictors of the channels from their future and from their past.

    Args:
        blocks: `(b, l, p, p)`.

    Attributes:
        exists: where T is positive definite, in the arithmetic of the recursion `(b,)`.
    """

    def __init__(self, blocks: Tensor):
        forward, backward, *errors = predictors(blocks)
        delayed = torch.cat([torch.zeros_like(backward[:, :1]), backward[:, :-1]], 1)
        self.columns = [_spectrum(forward), _spectrum(delayed)]
        factors, failed = zip(*map(torch.linalg.cholesky_ex, errors), strict=True)
        self.factors = [factor[:, None] for factor in factors]
        self.exists = sum(failed) == 0

    def __call__(self, sides: Tensor) -> Tensor:
        """T⁻¹ of `(b, l, p, q)`."""
        first, second = (
            _product(column, torch.cholesky_solve(_product(column.mH, sides), factor))
            for column, factor in zip(self.columns, self.factors, strict=True)
        )
        return first - second


def predictors(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and last column of the inverse, by growing the matrix a block at a time.

    Args:
        blocks: `(b, l, p, p)`.

    Returns:
        F and B `(b, l, p, p)`, whose first and last block is 1, and E and G `(b, p, p)`, with
        T F = (E, 0, …, 0) and T B = (0, …, 0, G). Meaningless where T is not positive definite.
    """
    systems, taps, channels, _ = blocks.shape
    # Blocks from the last to the first, side by side: any [R(n) … R(1)] is the end of it.
    row = blocks[:, 1:].flip(1).transpose(1, 2).reshape(systems, channels, -1)
    gap = blocks.new_zeros(systems, channels, channels)
    forward = backward = torch.eye(channels).to(blocks).expand_as(gap)
    forward_error = backward_error = blocks[:, 0]
    for _ in range(1, taps):
        # What the next row of T makes of F, and its first row of B, if a zero block is added.
        rest = row[..., -forward.shape[1] :] @ forward
        forward, backward = torch.cat([forward, gap], 1), torch.cat([gap, backward], 1)
        of_backward = _divided(rest, backward_error)
        of_forward = _divided(rest.mT, forward_error)
        forward, backward = forward - backward @ of_backward, backward - forward @ of_forward
        forward_error = forward_error - rest.mT @ of_backward
        backward_error = backward_error - rest @ of_forward
    shape = (systems, taps, channels, channels)
    return forward.view(shape), backward.view(shape), forward_error, backward_error


def _divided(numerator: Tensor, matrix: Tensor) -> Tensor:
    """Matrix⁻¹ numerator for positive definite matrices `(b, p, p)`; no error for others."""
    return torch.cholesky_solve(numerator, torch.linalg.cholesky_ex(matrix).L)


def _matrix(blocks: Tensor) -> Tensor:
    """The spectrum of T's blocks, those of negative delays at the end."""
    gap = torch.zeros_like(blocks[:, :1])
    return torch.fft.rfft(torch.cat([blocks, gap, blocks[:, 1:].flip(1).mT], 1), dim=1)


def _spectrum(column: Tensor) -> Tensor:
    """Bins `(b, l + 1, …)` of `(b, l, …)` and as many zeros."""
    return torch.fft.rfft(column, n=2 * column.shape[1], dim=1)


def _product(spectrum: Tensor, sides: Tensor) -> Tensor:
    """A Toeplitz matrix, given by its spectrum, times `(b, l, p, q)`."""
    taps = sides.shape[1]
    return torch.fft.irfft(spectrum @ _spectrum(sides), n=2 * taps, dim=1)[:, :taps]


def _norm(sides: Tensor) -> Tensor:
    """`(b,)` of `(b, l, p, q)`."""
    return sides.flatten(1).norm(dim=1)
