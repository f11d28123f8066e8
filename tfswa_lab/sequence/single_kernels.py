"""The scaled recursions for one sequence, compiled by numba, one thread.

They compute what those of `kernels` do, with the states last: for few sequences there is nothing to
put side by side but states. Axis letters: `t` frames, `k` states (also `i` from, `j` to).

Notebook: 11_hmm
"""

from __future__ import annotations

import numpy as np

from tfswa_lab.sequence.kernels import SUMS, compiled, trace_back


@compiled(SUMS)
def divide_by_best(log_emissions, lowest, relative):
    """Emissions `(t, k)` minus the frame's best state, not below `lowest`; -inf stays -inf.

    Returns the sum of what was subtracted.
    """
    t_size, k_size = log_emissions.shape
    total = 0.0
    for t in range(t_size):
        row, out = log_emissions[t], relative[t]
        top = row[0]
        for k in range(1, k_size):
            top = max(top, row[k])
        total += top
        top = 0 if top == -np.inf else top
        for k in range(k_size):
            out[k] = row[k] if row[k] == -np.inf else max(row[k] - top, lowest)
    return total


@compiled(SUMS)
def forward(emissions, transmat, start, filtered, scale):
    """Fill `filtered` with p(z_t | x_1 … x_t) and `scale` `(t)` with what each frame multiplies.

    `filtered` has all frames, or two of them in turns where only the scales matter.
    """
    t_size, k_size = emissions.shape
    kept = len(filtered)
    for t in range(t_size):
        now, seen = filtered[t % kept], emissions[t]
        if t == 0:
            now[:] = start
        else:
            _predict(filtered[(t - 1) % kept], transmat, now)
        total = scale.dtype.type(0)
        for k in range(k_size):
            now[k] *= seen[k]
            total += now[k]
        scale[t] = total
        inverse = 1 / total if total > 0 else 0
        for k in range(k_size):
            now[k] *= inverse


@compiled(SUMS)
def _predict(states, transmat, predicted):
    """One step ahead: predicted[j] = Σ_i states[i] transmat[i, j]."""
    k_size = len(states)
    for j in range(k_size):
        predicted[j] = states[0] * transmat[0, j]
    for i in range(1, k_size):
        weight, row = states[i], transmat[i]
        for j in range(k_size):
            predicted[j] += weight * row[j]


@compiled(SUMS)
def backward(emissions, to_from, filtered):
    """Turn `filtered` into p(z_t | x_1 … x_T), and `emissions` into what steps are counted with.

    `to_from` is transmat transposed. The expected number of steps from i to j is transmat[i, j]
    times the product of what was in `filtered[t, i]` and is in `emissions[t + 1, j]`, over all t.
    """
    t_size, k_size = emissions.shape
    later, seen = np.ones(k_size, emissions.dtype), np.empty(k_size, emissions.dtype)
    for t in range(t_size - 1, -1, -1):
        now = filtered[t]
        if t < t_size - 1:
            _predict(seen, to_from, later)
        total = emissions.dtype.type(0)
        for k in range(k_size):
            total += now[k] * later[k]
        inverse = 1 / total if total > 0 else 0
        if t < t_size - 1:
            for k in range(k_size):
                emissions[t + 1, k] = seen[k] * inverse
        for k in range(k_size):
            later[k] *= inverse
            seen[k] = emissions[t, k] * later[k]
            now[k] *= later[k]


@compiled(SUMS)
def viterbi(log_emissions, log_transmat, log_start, scores, path):
    """Fill `scores` `(t, k)`, relative to the frame's best, and the best `path` `(t)`.

    Only scores are stored; the best previous state is searched again along the path.
    """
    t_size, k_size = log_emissions.shape
    for t in range(t_size):
        now, seen = scores[t], log_emissions[t]
        if t == 0:
            now[:] = log_start
        else:
            _best_step(scores[t - 1], log_transmat, now)
        top = now[0] + seen[0]
        for k in range(k_size):
            now[k] += seen[k]
            top = max(top, now[k])
        top = 0 if top == -np.inf else top
        for k in range(k_size):
            now[k] -= top
    one = scores.reshape((t_size, k_size, 1))
    trace_back(one, log_transmat, np.array([t_size]), path.reshape((1, t_size)))


@compiled(SUMS)
def _best_step(before, steps, now):
    """now[j] = max_i before[i] + steps[i, j]."""
    k_size = len(before)
    for j in range(k_size):
        now[j] = before[0] + steps[0, j]
    for i in range(1, k_size):
        score, row = before[i], steps[i]
        for j in range(k_size):
            now[j] = max(now[j], score + row[j])
