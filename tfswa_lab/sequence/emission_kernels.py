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
def log_density(x, means, precision, half_log, lengths, out):
    """Fill `out` `(t, k, b)` with log N(x; mean, 1 / precision), 0 in padding.

    `half_log` `(k, d)` is ½ log(2π variance). Returns where infinity stands (b · t + t), or -1.
    """
    b_size, t_size, d_size = x.shape
    k_size = len(means)
    constant, distance = np.empty(k_size, x.dtype), np.empty(k_size, x.dtype)
    for k in range(k_size):
        constant[k] = -half_log[k].sum()
    # Zeros are appended, because what is left of a row behind whole registers is slow.
    width = d_size if d_size < WIDTH else -(-d_size // WIDTH) * WIDTH
    wide = np.zeros(width, x.dtype)
    m, p = np.zeros((k_size, width), x.dtype), np.zeros((k_size, width), x.dtype)
    m[:, :d_size], p[:, :d_size] = means, precision
    place = -1
    for b in range(b_size):
        for t in range(lengths[b]):
            row = x[b, t]
            for d in range(d_size):
                wide[d] = row[d]
            for k in range(0, k_size - 3, 4):
                distance[k], distance[k + 1], distance[k + 2], distance[k + 3] = _four_distances(
                    wide, m[k], m[k + 1], m[k + 2], m[k + 3], p[k], p[k + 1], p[k + 2], p[k + 3]
                )
            for k in range(k_size - k_size % 4, k_size):
                distance[k] = _distance(wide, m[k], p[k])
            for k in range(k_size):
                if distance[k] - distance[k] == 0:  # neither NaN nor infinite
                    out[t, k, b] = constant[k] - distance[k] / 2
                else:
                    out[t, k, b] = _with_gaps(row, means[k], precision[k], half_log[k])
                    if place < 0 and np.isinf(row).any():
                        place = b * t_size + t
        for t in range(lengths[b], t_size):
            for k in range(k_size):
                out[t, k, b] = 0
    return place


@compiled(SUMS)
def _distance(row, mean, precision):
    """Σ (x - mean)² precision."""
    total = row.dtype.type(0)
    for d in range(len(row)):
        z = row[d] - mean[d]
        total += z * z * precision[d]
    return total


@compiled(SUMS)
def _four_distances(row, mean0, mean1, mean2, mean3, weight0, weight1, weight2, weight3):
    """The same for four states: a feature is read once for them."""
    total0 = total1 = total2 = total3 = row.dtype.type(0)
    for d in range(len(row)):
        x = row[d]
        z0, z1, z2, z3 = x - mean0[d], x - mean1[d], x - mean2[d], x - mean3[d]
        total0 += z0 * z0 * weight0[d]
        total1 += z1 * z1 * weight1[d]
        total2 += z2 * z2 * weight2[d]
        total3 += z3 * z3 * weight3[d]
    return total0, total1, total2, total3


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
    k_size = len(means)
    sums = np.empty((k_size, 3, d_size), x.dtype)  # of one sequence: float32 is enough
    whole = np.empty(k_size, x.dtype)
    for b in range(b_size):
        sums[:] = 0
        whole[:] = 0
        t = 0
        while t < lengths[b]:
            together = t + FRAMES <= lengths[b] and not math.isnan(x[b, t : t + FRAMES].sum())
            for k in range(k_size):
                mean = means[k]
                if together:
                    for step in range(FRAMES):
                        whole[k] += weights[t + step, k, b]
                    _add_four(x[b, t : t + FRAMES], weights[t:, k, b], mean, sums[k])
                else:
                    _add_one(x[b, t], weights[t, k, b], mean, sums[k])
            t += FRAMES if together else 1
        for k in range(k_size):
            for d in range(d_size):
                count[k, d] += sums[k, 0, d] + whole[k]
                first[k, d] += sums[k, 1, d]
                second[k, d] += sums[k, 2, d]


@compiled(SUMS)
def _add_four(rows, weights, mean, sums):
    """Four frames without gaps at once: sums are read and written once for them."""
    row0, row1, row2, row3 = rows[0], rows[1], rows[2], rows[3]
    w0, w1, w2, w3 = weights[0], weights[1], weights[2], weights[3]
    if w0 == 0 and w1 == 0 and w2 == 0 and w3 == 0:
        return
    first, second = sums[1], sums[2]
    for d in range(len(mean)):
        m = mean[d]
        z0, z1, z2, z3 = row0[d] - m, row1[d] - m, row2[d] - m, row3[d] - m
        a0, a1, a2, a3 = w0 * z0, w1 * z1, w2 * z2, w3 * z3
        first[d] += (a0 + a1) + (a2 + a3)
        second[d] += (a0 * z0 + a1 * z1) + (a2 * z2 + a3 * z3)


@compiled(SUMS)
def _add_one(row, weight, mean, sums):
    """One frame, in which features may be missing."""
    for d in range(len(row)):
        if not math.isnan(row[d]):
            z = row[d] - mean[d]
            sums[0, d] += weight
            sums[1, d] += weight * z
            sums[2, d] += weight * z * z
