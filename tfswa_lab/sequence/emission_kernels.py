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

FRAMES = 4  # that are taken together, so that a mean is read once for them


@compiled(SUMS)
def log_density(x, means, precision, half_log, lengths, out):
    """Fill `out` `(t, k, b)` with log N(x; mean, 1 / precision), 0 in padding.

    `half_log` `(k, d)` is ½ log(2π variance). Returns where infinity stands (b · t + t), or -1.
    The loop over features reads tables in place, those of the model from copies, of which the
    compiler knows that `out` is elsewhere: each costs a third of the time otherwise.
    """
    b_size, t_size, d_size = x.shape
    k_size, zero = len(means), x.dtype.type(0)
    m, p, constant = means.copy(), precision.copy(), np.empty(k_size, x.dtype)
    for k in range(k_size):
        constant[k] = -half_log[k].sum()
    place = -1
    for b in range(b_size):
        whole = lengths[b] - lengths[b] % FRAMES
        has_gaps = False
        for t in range(0, whole, FRAMES):
            for k in range(k_size):
                s0 = s1 = s2 = s3 = zero
                for d in range(d_size):
                    z0, z1 = x[b, t, d] - m[k, d], x[b, t + 1, d] - m[k, d]
                    z2, z3 = x[b, t + 2, d] - m[k, d], x[b, t + 3, d] - m[k, d]
                    s0 += z0 * z0 * p[k, d]
                    s1 += z1 * z1 * p[k, d]
                    s2 += z2 * z2 * p[k, d]
                    s3 += z3 * z3 * p[k, d]
                out[t, k, b], out[t + 1, k, b] = constant[k] - s0 / 2, constant[k] - s1 / 2
                out[t + 2, k, b], out[t + 3, k, b] = constant[k] - s2 / 2, constant[k] - s3 / 2
                total = s0 + s1 + s2 + s3
                has_gaps |= math.isnan(total) or math.isinf(total)
        for t in range(0 if has_gaps else whole, lengths[b]):
            for k in range(k_size):
                if t < whole and not (math.isnan(out[t, k, b]) or math.isinf(out[t, k, b])):
                    continue
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
    k_size, m = len(means), means.copy()
    # Of one sequence, for which float32 is enough; `counts` are those of frames taken singly.
    whole, counts = np.empty(k_size, x.dtype), np.empty((k_size, d_size), x.dtype)
    sums, squares = np.empty((k_size, d_size), x.dtype), np.empty((k_size, d_size), x.dtype)
    for b in range(b_size):
        for careful in range(2):  # again, if a feature is missing somewhere
            whole[:], counts[:], sums[:], squares[:] = 0, 0, 0, 0
            t = 0
            while t < lengths[b]:
                if t + FRAMES > lengths[b] or (careful and _have_gaps(x[b], t)):
                    _add_one(x[b, t], weights[t, :, b], m, counts, sums, squares)
                    t += 1
                    continue
                for k in range(k_size):
                    w0, w1 = weights[t, k, b], weights[t + 1, k, b]
                    w2, w3 = weights[t + 2, k, b], weights[t + 3, k, b]
                    if w0 == 0 and w1 == 0 and w2 == 0 and w3 == 0:
                        continue
                    whole[k] += (w0 + w1) + (w2 + w3)
                    for d in range(d_size):
                        z0, z1 = x[b, t, d] - m[k, d], x[b, t + 1, d] - m[k, d]
                        z2, z3 = x[b, t + 2, d] - m[k, d], x[b, t + 3, d] - m[k, d]
                        a0, a1, a2, a3 = w0 * z0, w1 * z1, w2 * z2, w3 * z3
                        sums[k, d] += (a0 + a1) + (a2 + a3)
                        squares[k, d] += (a0 * z0 + a1 * z1) + (a2 * z2 + a3 * z3)
                t += FRAMES
            if not math.isnan(sums.sum()):
                break
        for k in range(k_size):
            for d in range(d_size):
                count[k, d] += whole[k] + counts[k, d]
                first[k, d] += sums[k, d]
                second[k, d] += squares[k, d]


@compiled(SUMS)
def _have_gaps(frames, t):
    """Whether a feature is missing in one of the frames from t on."""
    total = frames.dtype.type(0)
    for step in range(FRAMES):
        for d in range(frames.shape[1]):
            total += frames[t + step, d]
    return math.isnan(total)


@compiled(SUMS)
def _add_one(row, weights, means, counts, sums, squares):
    """One frame, in which features may be missing."""
    for k in range(len(means)):
        for d in range(len(row)):
            if not math.isnan(row[d]):
                z = row[d] - means[k, d]
                counts[k, d] += weights[k]
                sums[k, d] += weights[k] * z
                squares[k, d] += weights[k] * z * z
