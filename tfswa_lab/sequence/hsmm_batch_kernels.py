"""The forward pass of hidden semi-Markov models for many sequences at once, in plain numbers.

One instruction works on several sequences, so they come last. What plain numbers cannot hold is
noticed, and left to `hsmm_kernels`, which takes one sequence at a time.

Axis letters: `b` sequences, `t` frames, `k` states, `n` durations, `m` frames within reach.

Notebook: 11_hmm
"""

import math

import numpy as np

from tfswa_lab.sequence.kernels import SUMS, compiled

SMALLEST = 1e-80  # sums and factors from this to its inverse are multiplied as they are
# A factor beyond the first is put into the starts of segments, one beyond the second is refused.
NEAREST, FARTHEST = 1e-60, 1e-140


@compiled(SUMS)
def forward(
    log_emissions, lengths, transmat, start, reverse, last, censored, plain, scale, best, safe
):  # fmt: skip
    """Fill `scale` `(t, b)` and `best` `(b)`: log p(x) = Σ log scale + best.

    `log_emissions` is `(t, k, b)`, `lengths` `(b)` are floats. `reverse` and `last` `(k, n)` are
    the laws of a segment and of the last one, the longest first, with zeros in front to a multiple
    of 4. `plain` `(k, m, b)`, zeros, m > n, holds the starts within reach. `safe` `(b)` becomes 0
    for a sequence in which something that matters might have been rounded to zero.
    """
    t_size, k_size, b_size = log_emissions.shape
    n, rows = reverse.shape[1], plain.shape[1]
    reach, end = np.ones((k_size, b_size)), np.empty((k_size, b_size))
    lossy = np.zeros((k_size, b_size))  # until which frame a 0 may be a number rounded to it
    enter, inverse, relative = np.empty(b_size), np.ones(b_size), np.empty((k_size, b_size))
    now = n - 1  # the row of the starts at this frame
    for k in range(k_size):
        plain[k, now] = start[k]
    for t in range(t_size):
        first, total = now - n + 1, scale[t]
        _divide_by_best(log_emissions[t], t, lengths, relative, enter, best)
        total[:] = 0.0
        for k in range(k_size):
            _grow(relative[k], inverse, reach[k])
            _keep_in_range(
                relative[k], t, plain[k, first : now + 1], reach[k], lossy[k], lengths, safe
            )
            _windows(plain[k], first, reverse[k], end[k])
            _end(t, reach[k], lossy[k], lengths, end[k], total, safe)
        if censored:
            for b in range(b_size):
                if t == lengths[b] - 1:
                    total[b] = _going_on(plain[:, first : now + 1], last, reach, b)
        _invert(t, lengths, total, inverse, safe)
        now += 1
        if now == rows:
            for k in range(k_size):
                plain[k, : n - 1] = plain[k, rows - n + 1 :].copy()
            now = n - 1
        for j in range(k_size):
            _enter(t, end, transmat[:, j], reach[j], inverse, lengths, enter, plain[j, now], safe)


@compiled(SUMS)
def _divide_by_best(log_emissions, t, lengths, relative, top, best):
    """Log emissions `(k, b)` minus those of the best state; 0 in padding."""
    k_size, b_size = relative.shape
    for b in range(b_size):
        top[b] = log_emissions[0, b]
    for k in range(1, k_size):
        for b in range(b_size):
            x = log_emissions[k, b]
            top[b] = x if x > top[b] else top[b]
    for b in range(b_size):
        top[b] = top[b] if top[b] > -np.inf else 0.0
        best[b] += top[b] if t < lengths[b] else 0.0
    for k in range(k_size):
        for b in range(b_size):
            x = log_emissions[k, b] - top[b]
            relative[k, b] = x if t < lengths[b] else 0.0


@compiled(SUMS)
def _grow(relative, inverse, reach):
    """Multiply `reach` by the emissions of a frame, and divide it by the total before."""
    for b in range(len(reach)):
        reach[b] *= math.exp(relative[b]) * inverse[b]


@compiled({"contract"})
def _keep_in_range(relative, t, plain, reach, lossy, lengths, safe):
    """Where `reach` runs out of range, multiply the starts by it; clear them where impossible."""
    for b in range(len(reach)):
        if NEAREST < reach[b] < 1 / NEAREST:
            continue
        inside = t < lengths[b]
        if relative[b] == -np.inf:
            plain[:, b] = 0.0
            reach[b] = 1.0
            continue
        if not FARTHEST < reach[b] < 1 / FARTHEST:
            safe[b] = 0.0 if inside else safe[b]
            continue
        for s in range(len(plain)):
            before = plain[s, b]
            plain[s, b] = before * reach[b]
            if before > 0 and plain[s, b] < FARTHEST:
                lossy[b] = t + len(plain)
            if not plain[s, b] < 1 / FARTHEST and inside:
                safe[b] = 0.0
        reach[b] = 1.0


@compiled(SUMS)
def _windows(plain, first, law, sums):
    """Σ_n law[n] plain[first + n], for each sequence."""
    sums[:] = 0.0
    for n in range(0, len(law), 4):
        p, q, r, s = law[n], law[n + 1], law[n + 2], law[n + 3]
        if p == 0 and q == 0 and r == 0 and s == 0:
            continue
        here = first + n
        a, b, c, d = plain[here], plain[here + 1], plain[here + 2], plain[here + 3]
        for m in range(len(sums)):
            sums[m] += (p * a[m] + q * b[m]) + (r * c[m] + s * d[m])


@compiled(SUMS)
def _end(t, reach, lossy, lengths, end, total, safe):
    """Turn sums of starts into weights of ends, and add them to the total."""
    for b in range(len(end)):
        mass = end[b]
        exact = (mass > SMALLEST) | ((mass == 0) & (lossy[b] <= t)) | (lengths[b] <= t)
        safe[b] = safe[b] if exact else 0.0
        end[b] = mass * reach[b]
        total[b] += end[b]


@compiled(SUMS)
def _invert(t, lengths, total, inverse, safe):
    """1 / total; a total of 0 (no segment can end yet) divides nothing."""
    for b in range(len(total)):
        some = (total[b] > SMALLEST) & (total[b] < 1 / SMALLEST)
        none = (total[b] == 0) & (t < lengths[b] - 1)
        inverse[b] = 1 / total[b] if total[b] > 0 else 1.0
        safe[b] = safe[b] if some | none | (lengths[b] <= t) else 0.0


@compiled(SUMS)
def _enter(t, end, steps, reach, inverse, lengths, enter, starts, safe):
    """The starts of a state at the next frame; `reach` is divided by the total there."""
    enter[:] = 0.0
    for i in range(len(steps)):
        weight = steps[i]
        for b in range(len(enter)):
            enter[b] += weight * end[i, b]
    for b in range(len(enter)):
        x = enter[b]
        starts[b] = x / reach[b]
        exact = (x == 0) | (x * inverse[b] > SMALLEST) | (lengths[b] <= t + 1)
        safe[b] = safe[b] if exact else 0.0


@compiled(SUMS)
def _going_on(plain, last, reach, b):
    """The weight of all last segments of sequence b that may go on."""
    total = 0.0
    for k in range(len(last)):
        for n in range(last.shape[1]):
            total += last[k, n] * plain[k, n, b] * reach[k, b]
    return total
