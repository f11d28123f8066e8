"""Densities and moments of Gaussians with diagonal covariance, compiled by numba, one thread.

One pass over the features and nothing of their size in between. Differences are squared, so large
features do not cancel as in x² - 2xµ + µ². Missing features are NaN and are left out.

Axis letters: `b` sequences, `t` frames, `d` features, `k` states (or states × components).

Notebook: 11_hmm
"""

from __future__ import annotations

import math

import numpy as np

from tfswa_lab.sequence.kernels import SUMS, compiled

FRAMES = 4  # that are added to the moments together
WIDTH = 32  # numbers that a loop over features takes at once


@compiled(SUMS)
def _padded(d_size):
    """Zeros are appended to rows, because what is left of one behind whole registers is slow."""
    return d_size if d_size < WIDTH else -(-d_size // WIDTH) * WIDTH


@compiled(SUMS)
def log_density(x, means, precision, half_log, lengths, out):
    """Fill `out` `(t, k, b)` with log N(x; mean, 1 / precision), 0 in padding.

    `half_log` `(k, d)` is ½ log(2π variance). Returns where infinity stands (b · t + t), or -1.
    Loops over features read tables in place: a function for a row would cost as much as the row.
    """
    b_size, t_size, d_size = x.shape
    k_size, width = len(means), _padded(d_size)
    zero = x.dtype.type(0)
    constant, distance = np.empty(k_size, x.dtype), np.empty(k_size, x.dtype)
    for k in range(k_size):
        constant[k] = -half_log[k].sum()
    row = np.zeros(width, x.dtype)
    m, p = np.zeros((k_size, width), x.dtype), np.zeros((k_size, width), x.dtype)
    m[:, :d_size], p[:, :d_size] = means, precision
    place = -1
    for b in range(b_size):
        for t in range(lengths[b]):
            for d in range(d_size):
                row[d] = x[b, t, d]
            for k in range(0, k_size - 3, 4):  # a feature is read once for four states
                sum0 = sum1 = sum2 = sum3 = zero
                for d in range(width):
                    z0, z1 = row[d] - m[k, d], row[d] - m[k + 1, d]
                    z2, z3 = row[d] - m[k + 2, d], row[d] - m[k + 3, d]
                    sum0 += z0 * z0 * p[k, d]
                    sum1 += z1 * z1 * p[k + 1, d]
                    sum2 += z2 * z2 * p[k + 2, d]
                    sum3 += z3 * z3 * p[k + 3, d]
                distance[k], distance[k + 1] = sum0, sum1
                distance[k + 2], distance[k + 3] = sum2, sum3
            for k in range(k_size - k_size % 4, k_size):
                sum0 = zero
                for d in range(width):
                    z0 = row[d] - m[k, d]
                    sum0 += z0 * z0 * p[k, d]
                distance[k] = sum0
            for k in range(k_size):
                if distance[k] - distance[k] == 0:  # neither NaN nor infinite
                    out[t, k, b] = constant[k] - distance[k] / 2
                else:
                    out[t, k, b] = _with_gaps(x[b, t], means[k], precision[k], half_log[k])
                    if place < 0 and np.isinf(x[b, t]).any():
                        place = b * t_size + t
        for t in range(lengths[b], t_size):
            for k in range(k_size):
                out[t, k, b] = 0
    return place


@compiled(SUMS)
def _with_gaps(row, mean, precision, half_log):
    """log density of the features that are there."""
    total = row.dtype.type(0)
    for d in range(len(row)):
        if not math.isnan(row[d]):
            z = row[d] - mean[d]
            total -= z * z * precision[d] / 2 + half_log[d]
    return total


@compiled(SUMS)
def moments(x, weights, means, lengths, count, first, second):
    """Add up `weights` `(t, k, b)`, times 1, x - mean and (x - mean)², for each feature.

    `count`, `first` and `second` are `(k, d)` in float64: each feature counts where it is there.
    """
    b_size, _, d_size = x.shape
    k_size, width = len(means), _padded(d_size)
    m, rows = np.zeros((k_size, width), x.dtype), np.zeros((FRAMES, width), x.dtype)
    m[:, :d_size] = means
    # Of one sequence, for which float32 is enough: of frames without gaps, and of the others.
    whole = np.empty(k_size, x.dtype)
    sums, squares = np.empty((k_size, width), x.dtype), np.empty((k_size, width), x.dtype)
    others = np.empty((k_size, 3, d_size), x.dtype)
    for b in range(b_size):
        whole[:], sums[:], squares[:], others[:] = 0, 0, 0, 0
        t = 0
        while t < lengths[b]:
            if t + FRAMES > lengths[b] or _have_gaps(x[b], t, rows):
                for k in range(k_size):
                    _add_one(x[b, t], weights[t, k, b], means[k], others[k])
                t += 1
                continue
            for k in range(k_size):  # sums are read and written once for four frames
                w0, w1 = weights[t, k, b], weights[t + 1, k, b]
                w2, w3 = weights[t + 2, k, b], weights[t + 3, k, b]
                if w0 == 0 and w1 == 0 and w2 == 0 and w3 == 0:
                    continue
                whole[k] += (w0 + w1) + (w2 + w3)
                for d in range(width):
                    z0, z1 = rows[0, d] - m[k, d], rows[1, d] - m[k, d]
                    z2, z3 = rows[2, d] - m[k, d], rows[3, d] - m[k, d]
                    a0, a1, a2, a3 = w0 * z0, w1 * z1, w2 * z2, w3 * z3
                    sums[k, d] += (a0 + a1) + (a2 + a3)
                    squares[k, d] += (a0 * z0 + a1 * z1) + (a2 * z2 + a3 * z3)
            t += FRAMES
        for k in range(k_size):
            for d in range(d_size):
                count[k, d] += whole[k] + others[k, 0, d]
                first[k, d] += sums[k, d] + others[k, 1, d]
                second[k, d] += squares[k, d] + others[k, 2, d]


@compiled(SUMS)
def _have_gaps(frames, t, rows):
    """Copy the frames from t on to `rows`; whether a feature is missing in one of them."""
    total = frames.dtype.type(0)
    for step in range(len(rows)):
        for d in range(frames.shape[1]):
            rows[step, d] = frames[t + step, d]
            total += frames[t + step, d]
    return math.isnan(total)


@compiled(SUMS)
def _add_one(row, weight, mean, sums):
    """One frame, in which features may be missing."""
    for d in range(len(row)):
        if not math.isnan(row[d]):
            z = row[d] - mean[d]
            sums[0, d] += weight
            sums[1, d] += weight * z
            sums[2, d] += weight * z * z
