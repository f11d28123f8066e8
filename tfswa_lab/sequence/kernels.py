"""The recursions of a hidden Markov model, compiled by numba, one thread.

Two ways of computing the same:

- *scaled*, for many sequences: arrays are `(t, k, b)`, sequences last, so that one instruction
  works on several sequences (`single_kernels` are for few). Emissions are divided by their best
  state. It is safe only where no transition is nearly zero (`compiled_engine` decides).
- *logarithmic*, a sequence at a time, in float64, for everything: logarithms are stored, sums are
  taken of plain numbers, and a sum so small that something was rounded to zero is taken again
  from the logarithms. So hard zeros and 900 nats between states cost nothing in accuracy.

Axis letters: `b` sequences, `t` frames, `k` states (also `i` from, `j` to), `n` best paths.

Notebook: 11_hmm
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numba import njit

# Sums may be reordered, so that each lane of a register adds up its own. NaN and inf stay.
SUMS = {"contract", "reassoc", "nsz", "arcp"}
# A sum of numbers up to 1 that is larger than this has lost at most 1e-58 of itself to underflow.
SMALLEST_SUM = 1e-250
MANY_STATES = 16  # from which on BLAS multiplies faster than a loop


def compiled(fastmath: set[str]) -> Callable:
    """numba's decorator, with the machine code kept on disk if there is a folder for it."""

    def decorate(function: Callable) -> Callable:
        options = {"fastmath": fastmath, "nogil": True, "error_model": "numpy"}
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # neither this folder nor the user's cache can be written
            return njit(**options)(function)

    return decorate


# Scaled, sequences last ------------------------------------------------------------------------


@compiled(SUMS)
def divide_by_best(log_emissions, lengths, lowest, relative, best):
    """Emissions minus the frame's best state, `(t, k, b)`, not below `lowest`; padding becomes 0.

    The sum of what was subtracted is added up in `best` `(b)`. -inf stays -inf.
    """
    t_size, k_size, b_size = log_emissions.shape
    top = np.empty(b_size, log_emissions.dtype)
    best[:] = 0.0
    for t in range(t_size):
        row, out = log_emissions[t], relative[t]
        for b in range(b_size):
            top[b] = row[0, b]
        for k in range(1, k_size):
            for b in range(b_size):
                top[b] = max(top[b], row[k, b])
        for b in range(b_size):
            if t < lengths[b]:
                best[b] += top[b]
            if top[b] == -np.inf:
                top[b] = 0
        for k in range(k_size):
            for b in range(b_size):
                x = row[k, b]
                y = max(x - top[b], lowest)
                out[k, b] = x if x == -np.inf else y
        for b in range(b_size):
            if t >= lengths[b]:
                for k in range(k_size):
                    out[k, b] = 0


@compiled(SUMS)
def forward(emissions, transmat, start, filtered, scale):
    """Fill `filtered` with p(z_t | x_1 … x_t) and `scale` `(t, b)` with what each frame multiplies.

    `filtered` has all frames, or two of them in turns where only the scales matter.
    """
    t_size, k_size, b_size = emissions.shape
    kept = filtered.shape[0]
    for t in range(t_size):
        now, seen = filtered[t % kept], emissions[t]
        if t == 0:
            for k in range(k_size):
                for b in range(b_size):
                    now[k, b] = start[k, b]
        else:
            _predict(filtered[(t - 1) % kept], transmat, now)
        total = scale[t]
        for b in range(b_size):
            total[b] = 0
        for k in range(k_size):
            for b in range(b_size):
                now[k, b] *= seen[k, b]
                total[b] += now[k, b]
        for k in range(k_size):
            for b in range(b_size):
                now[k, b] = now[k, b] / total[b] if total[b] > 0 else 0


@compiled(SUMS)
def _predict(states, transmat, predicted):
    """One step ahead: predicted[j] = Σ_i states[i] transmat[i, j]."""
    k_size, b_size = states.shape
    if k_size >= MANY_STATES:
        np.dot(transmat.T, states, predicted)
        return
    for j in range(k_size):
        for b in range(b_size):
            predicted[j, b] = 0
        for i in range(0, k_size - 3, 4):  # a sum is read and written once for four states
            w0, w1 = transmat[i, j], transmat[i + 1, j]
            w2, w3 = transmat[i + 2, j], transmat[i + 3, j]
            for b in range(b_size):
                predicted[j, b] += (w0 * states[i, b] + w1 * states[i + 1, b]) + (
                    w2 * states[i + 2, b] + w3 * states[i + 3, b]
                )
        for i in range(k_size - k_size % 4, k_size):
            w0 = transmat[i, j]
            for b in range(b_size):
                predicted[j, b] += w0 * states[i, b]


@compiled(SUMS)
def backward(emissions, transmat, filtered, lengths, transitions):
    """Turn `filtered` into p(z_t | x_1 … x_T), and fill `transitions` `(k, k, b)`.

    `transitions` are the expected numbers of steps from i to j, summed over time.
    """
    t_size, k_size, b_size = emissions.shape
    later = np.ones((k_size, b_size), emissions.dtype)  # p(what comes | z_t) up to a factor
    to_from = transmat.T.copy()
    seen = np.empty((k_size, b_size), emissions.dtype)
    total = np.empty(b_size, emissions.dtype)
    transitions[:] = 0
    for t in range(t_size - 1, -1, -1):
        now = filtered[t]
        if t < t_size - 1:
            _predict(seen, to_from, later)
        for b in range(b_size):
            if t >= lengths[b] - 1:
                for k in range(k_size):
                    later[k, b] = 1
        for b in range(b_size):
            total[b] = 0
        for k in range(k_size):
            for b in range(b_size):
                total[b] += now[k, b] * later[k, b]
        for b in range(b_size):
            total[b] = 1 / total[b] if total[b] > 0 else 0
        if t < t_size - 1:
            _count(now, seen, total, lengths, t, transitions)
        for k in range(k_size):
            for b in range(b_size):
                later[k, b] *= total[b]
                seen[k, b] = emissions[t, k, b] * later[k, b]
                now[k, b] *= later[k, b]
        for b in range(b_size):
            if t >= lengths[b]:
                for k in range(k_size):
                    now[k, b] = 0
    for i in range(k_size):
        for j in range(k_size):
            for b in range(b_size):
                transitions[i, j, b] *= transmat[i, j]


@compiled(SUMS)
def _count(states, seen, scale, lengths, t, transitions):
    """Add the step from frame t to the next, without its factor transmat[i, j]."""
    k_size, b_size = states.shape
    for b in range(b_size):
        if t >= lengths[b] - 1:
            scale[b] = 0
    for i in range(k_size):
        for j in range(k_size):
            for b in range(b_size):
                transitions[i, j, b] += states[i, b] * seen[j, b] * scale[b]
    for b in range(b_size):
        if t >= lengths[b] - 1:
            scale[b] = 1


@compiled(SUMS)
def viterbi(log_emissions, log_transmat, log_start, lengths, scores, path):
    """Fill `scores` `(t, k, b)`, relative to the frame's best, and the best `path` `(b, t)`.

    Only scores are stored; the best previous state is searched again along the path.
    """
    t_size, k_size, b_size = log_emissions.shape
    top = np.empty(b_size, log_emissions.dtype)
    for t in range(t_size):
        now, seen = scores[t], log_emissions[t]
        if t == 0:
            now[:] = log_start
        else:
            _best_step(scores[t - 1], log_transmat, now)
        top[:] = -np.inf
        for k in range(k_size):
            for b in range(b_size):
                x = now[k, b] + seen[k, b]
                now[k, b] = x
                top[b] = x if x > top[b] else top[b]
        for b in range(b_size):
            top[b] = top[b] if top[b] > -np.inf else 0
        for k in range(k_size):
            for b in range(b_size):
                now[k, b] -= top[b]
    trace_back(scores, log_transmat, lengths, path)


@compiled(SUMS)
def _best_step(before, steps, now):
    """now[j] = max_i before[i] + steps[i, j]."""
    k_size, b_size = before.shape
    for j in range(k_size):
        for b in range(b_size):
            now[j, b] = -np.inf
        for i in range(0, k_size - 3, 4):  # a score is read and written once for four states
            s0, s1, s2, s3 = steps[i, j], steps[i + 1, j], steps[i + 2, j], steps[i + 3, j]
            for b in range(b_size):
                x, y = before[i, b] + s0, before[i + 1, b] + s1
                z, w = before[i + 2, b] + s2, before[i + 3, b] + s3
                x = x if x > y else y
                z = z if z > w else w
                x = x if x > z else z
                now[j, b] = x if x > now[j, b] else now[j, b]
        for i in range(k_size - k_size % 4, k_size):
            s0 = steps[i, j]
            for b in range(b_size):
                x = before[i, b] + s0
                now[j, b] = x if x > now[j, b] else now[j, b]


@compiled(SUMS)
def trace_back(scores, log_transmat, lengths, path):
    """The best last state, then the best previous state, frame by frame; padding is -1."""
    t_size, k_size, b_size = scores.shape
    to_from = np.zeros((k_size + 1, k_size), scores.dtype)
    to_from[:k_size] = log_transmat.T  # and zeros, for what follows the end
    state = np.full(b_size, k_size)
    for t in range(t_size - 1, -1, -1):  # all sequences at once, whose scores are neighbours
        for b in range(b_size):
            j = state[b]
            best, most = 0, scores[t, 0, b] + to_from[j, 0]
            for i in range(1, k_size):
                score = scores[t, i, b] + to_from[j, i]
                if score > most:
                    best, most = i, score
            inside = t < lengths[b]
            state[b] = best if inside else k_size
            path[b, t] = best if inside else -1


@compiled(SUMS)
def path_scores(log_emissions, log_transmat, log_start, lengths, path, scores):
    """Fill `scores` `(b)` with log p(path, x), added up in float64; the arrays are as above."""
    for b in range(len(lengths)):
        total = np.float64(log_start[path[b, 0], b]) + log_emissions[0, path[b, 0], b]
        for t in range(1, lengths[b]):
            total += log_transmat[path[b, t - 1], path[b, t]]
            total += log_emissions[t, path[b, t], b]
        scores[b] = total


# Logarithmic, one sequence at a time -----------------------------------------------------------


@compiled({"contract"})
def log_sum(logs, more):
    """log Σ exp(logs + more), exactly, whatever the range."""
    top = -np.inf
    for i in range(len(logs)):
        top = max(top, logs[i] + more[i])
    if top == -np.inf:
        return top
    total = 0.0
    for i in range(len(logs)):
        total += math.exp(logs[i] + more[i] - top)
    return top + math.log(total)


@compiled({"contract"})
def log_forward(log_emissions, transmat, log_transmat, log_start, filtered):
    """Fill `filtered` `(t, k)` with log p(z_t, x_1 … x_t), relative to the frame's best.

    `transmat` is `(1, k, k)`, or `(t - 1, k, k)`; `log_transmat` holds its logarithms, transposed.
    Returns the log-likelihood, and the first frame that no path reaches (-1).
    """
    t_size, k_size = log_emissions.shape
    varies = transmat.shape[0] > 1
    linear = np.empty(k_size)
    total = 0.0
    for t in range(t_size):
        now = filtered[t]
        if t == 0:
            for j in range(k_size):
                now[j] = log_start[j] + log_emissions[0, j]
        else:
            before = filtered[t - 1]
            step = t - 1 if varies else 0
            for i in range(k_size):
                linear[i] = math.exp(before[i])
            for j in range(k_size):
                mass = 0.0
                for i in range(k_size):
                    mass += linear[i] * transmat[step, i, j]
                if mass > SMALLEST_SUM:
                    now[j] = math.log(mass) + log_emissions[t, j]
                else:
                    now[j] = log_sum(before, log_transmat[step, j]) + log_emissions[t, j]
        top = -np.inf
        for j in range(k_size):
            top = max(top, now[j])
        if top == -np.inf:
            filtered[t:] = -np.inf
            return -np.inf, t
        total += top
        for j in range(k_size):
            now[j] -= top
    return total + log_sum(filtered[t_size - 1], np.zeros(k_size)), -1


@compiled({"contract"})
def log_backward(log_emissions, transmat, log_transmat, filtered, states, transitions):
    """Fill `states` `(t, k)` with p(z_t | x_1 … x_T), and add to the expected `transitions`.

    `log_transmat` is not transposed here. `transitions` has one entry for all steps, or one each.
    """
    t_size, k_size = log_emissions.shape
    varies, each = transmat.shape[0] > 1, transitions.shape[0] > 1
    later, seen = np.zeros(k_size), np.empty(k_size)  # log p(what comes | z_t) up to a factor
    now, after = np.empty(k_size), np.empty(k_size)
    for t in range(t_size - 1, -1, -1):
        if t < t_size - 1:
            step = t if varies else 0
            top = -np.inf
            for j in range(k_size):
                later[j] += log_emissions[t + 1, j]
                top = max(top, later[j])
            for j in range(k_size):
                seen[j] = later[j] - top
                after[j] = math.exp(seen[j])
            for i in range(k_size):
                mass = 0.0
                for j in range(k_size):
                    mass += transmat[step, i, j] * after[j]
                if mass > SMALLEST_SUM:
                    later[i] = math.log(mass)
                else:
                    later[i] = log_sum(seen, log_transmat[step, i])
            _log_count(
                filtered[t],
                transmat[step],
                log_transmat[step],
                seen,
                after,
                transitions[t if each else 0],
            )
        total = log_sum(filtered[t], later)
        for i in range(k_size):
            now[i] = math.exp(filtered[t, i] + later[i] - total)
            states[t, i] = now[i]


@compiled({"contract"})
def _log_count(before, transmat, log_transmat, seen, after, transitions):
    """Add the probabilities of one step, from the logarithms where plain products underflow."""
    k_size = len(before)
    linear = np.empty(k_size)
    total = 0.0
    for i in range(k_size):
        linear[i] = math.exp(before[i])
        for j in range(k_size):
            total += linear[i] * transmat[i, j] * after[j]
    if total > SMALLEST_SUM:
        for i in range(k_size):
            for j in range(k_size):
                transitions[i, j] += linear[i] * transmat[i, j] * after[j] / total
        return
    top = -np.inf
    for i in range(k_size):
        for j in range(k_size):
            top = max(top, before[i] + log_transmat[i, j] + seen[j])
    total = 0.0
    for i in range(k_size):
        for j in range(k_size):
            total += math.exp(before[i] + log_transmat[i, j] + seen[j] - top)
    for i in range(k_size):
        for j in range(k_size):
            share = math.exp(before[i] + log_transmat[i, j] + seen[j] - top) / total
            transitions[i, j] += share


@compiled({"contract"})
def best_paths(log_emissions, log_transmat, log_start, n_size, paths, scores):
    """Fill `paths` `(n, t)` with the n best paths, best first, and `scores` `(n)`.

    Behind the last path that exists: -1 and -inf. Of equal scores, the smaller previous state is
    first. Returns the first frame that no path reaches (-1).
    """
    t_size, k_size = log_emissions.shape
    varies = log_transmat.shape[0] > 1
    before = np.full((k_size, n_size), -np.inf)
    now = np.empty((k_size, n_size))
    origin = np.empty((t_size, k_size, n_size), np.int32)  # previous state · n + its rank
    total = 0.0
    for k in range(k_size):
        before[k, 0] = log_start[k] + log_emissions[0, k]
    for t in range(t_size):
        if t > 0:
            step = t - 1 if varies else 0
            for j in range(k_size):
                _merge(before, log_transmat[step, :, j], now[j], origin[t, j])
                for r in range(n_size):
                    now[j, r] += log_emissions[t, j]
            before, now = now, before
        top = -np.inf
        for k in range(k_size):
            top = max(top, before[k, 0])
        if top == -np.inf:
            return t
        total += top
        for k in range(k_size):
            for r in range(n_size):
                before[k, r] -= top
    _merge(before, np.zeros(k_size), scores, origin[0, 0])
    last = origin[0, 0].copy()
    for r in range(n_size):
        if scores[r] == -np.inf:
            paths[r] = -1
            continue
        scores[r] += total
        place = last[r]
        for t in range(t_size - 1, -1, -1):
            paths[r, t] = place // n_size
            if t > 0:
                place = origin[t, place // n_size, place % n_size]
    return -1


@compiled({"contract"})
def _merge(before, steps, best, origin):
    """The n largest of before[i, r] + steps[i], largest first, and where they came from."""
    k_size, n_size = before.shape
    best[:] = -np.inf
    for i in range(k_size):
        for r in range(n_size):
            score = before[i, r] + steps[i]
            if not score > best[n_size - 1]:
                break  # the following ranks are smaller still
            place = n_size - 1
            while place > 0 and score > best[place - 1]:
                best[place], origin[place] = best[place - 1], origin[place - 1]
                place -= 1
            best[place], origin[place] = score, i * n_size + r


@compiled({"contract"})
def draw(logs, uniform):
    """An index with probability proportional to exp(logs)."""
    top = logs.max()
    rest = uniform * np.exp(logs - top).sum()
    last = 0
    for i in range(len(logs)):
        mass = math.exp(logs[i] - top)
        if mass > 0:
            last = i
            rest -= mass
            if rest < 0:
                break
    return last


@compiled({"contract"})
def sample_backwards(filtered, log_transmat, uniforms, paths):
    """Draw paths `(n, t)` from p(z | x), last state first; `uniforms` `(n, t)` in [0, 1)."""
    t_size, k_size = filtered.shape
    varies = log_transmat.shape[0] > 1
    logs = np.empty(k_size)
    for n in range(len(paths)):
        for t in range(t_size - 1, -1, -1):
            for i in range(k_size):
                logs[i] = filtered[t, i]
                if t < t_size - 1:
                    logs[i] += log_transmat[t if varies else 0, i, paths[n, t + 1]]
            paths[n, t] = draw(logs, uniforms[n, t])
