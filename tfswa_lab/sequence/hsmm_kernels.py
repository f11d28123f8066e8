"""The recursions of a hidden semi-Markov model, compiled by numba, a sequence at a time, float64.

A segment of state k from frame s to frame e has the weight enter_s(k) P_k(e - s + 1) Π emissions.
The product is the same for all segments that end together, but for where they start, so it is
taken out: with C_s(k) the sum of the log emissions before frame s, the sum over durations becomes
a dot product of P_k with exp(log enter_s(k) - C_s(k)), which the compiler vectorises.

Logarithms are stored; the dot product works on plain copies of them, relative to an `offset` of
each state. Where it is so small that something may have been rounded to zero, it is taken again
from the logarithms. So no range of emissions is too large, and nothing falls back as a whole.

Axis letters: `t` frames (`s` start and `e` end of a segment), `k` states (`i` from, `j` to),
`d` durations; index d - 1 holds duration d.

Source: Yu, "Hidden semi-Markov models", 2010.

Notebook: 11_hmm
"""

from __future__ import annotations

import math

import numpy as np

from tfswa_lab.sequence.kernels import SMALLEST_SUM, SUMS, compiled, log_sum

WIDEST = 300.0  # nats that a plain copy may lie above its offset


@compiled({"contract"})
def cumulated(log_emissions, before, possible_from):
    """Fill `before` `(t + 1, k)` with the sums of log emissions before each frame.

    Each frame is divided by its best state, and the sum of those is returned. An impossible state
    counts as 0: `possible_from` `(t, k)` says where a segment that reaches frame t can start.
    """
    t_size, k_size = log_emissions.shape
    total = 0.0
    for k in range(k_size):
        before[0, k] = 0.0
    for t in range(t_size):
        top = log_emissions[t].max()
        if top == -np.inf:
            top = 0.0
        total += top
        for k in range(k_size):
            seen = log_emissions[t, k] - top
            before[t + 1, k] = before[t, k] + (0.0 if seen == -np.inf else seen)
            start = possible_from[t - 1, k] if t > 0 else 0
            possible_from[t, k] = t + 1 if seen == -np.inf else start
    return total


@compiled({"contract"})
def rebase(logs, plain, offset, first, stop):
    """Make plain copies of logs[first:stop] relative to their largest, which is returned."""
    top = -np.inf
    for s in range(first, stop):
        top = max(top, logs[s])
    if top == -np.inf:
        plain[first:stop] = 0.0
        return offset
    for s in range(first, stop):
        plain[s] = math.exp(logs[s] - top)
    return top


@compiled(SUMS)
def dot(a, a_first, b, b_first, size):
    """Σ a b over a part of each; parts are given by index, because rows are known to be dense."""
    total = 0.0
    for n in range(size):
        total += a[a_first + n] * b[b_first + n]
    return total


@compiled({"contract"})
def step(sources, transmat, log_transmat, linear, out):
    """out[j] = log Σ_i exp(sources[i]) transmat[i, j]; `log_transmat` is transposed."""
    k_size = len(sources)
    top = -np.inf
    for i in range(k_size):
        top = max(top, sources[i])
    if top == -np.inf:
        out[:] = -np.inf
        return
    for i in range(k_size):
        linear[i] = math.exp(sources[i] - top)
    for j in range(k_size):
        mass = 0.0
        for i in range(k_size):
            mass += linear[i] * transmat[i, j]
        out[j] = top + math.log(mass) if mass > SMALLEST_SUM else log_sum(sources, log_transmat[j])


@compiled({"contract"})
def forward(
    before, possible_from, transmat, log_to_from, log_start, reverse, log_reverse, starts, ends
):  # fmt: skip
    """Fill `starts` and `ends` `(k, t)`: log p of entering, less C, and of ending at each frame.

    `reverse` `(k, d)` holds the durations' probabilities, the longest first.
    """
    k_size, d_size = reverse.shape
    t_size = len(possible_from)
    plain = np.zeros((k_size, t_size))
    offset = np.zeros(k_size)
    enter, end, linear = log_start.copy(), np.empty(k_size), np.empty(k_size)
    for t in range(t_size):
        for k in range(k_size):
            log = enter[k] - before[t, k]
            starts[k, t] = log
            first = max(possible_from[t, k], t - d_size + 1)
            if log - offset[k] > WIDEST:
                offset[k] = rebase(starts[k], plain[k], offset[k], min(first, t), t + 1)
            else:
                plain[k, t] = math.exp(log - offset[k])
            if first > t:
                end[k] = -np.inf
            else:
                skip = d_size - 1 - (t - first)
                mass = dot(plain[k], first, reverse[k], skip, t + 1 - first)
                if mass > SMALLEST_SUM:
                    end[k] = math.log(mass) + offset[k] + before[t + 1, k]
                else:
                    offset[k] = rebase(starts[k], plain[k], offset[k], first, t + 1)
                    logs = log_sum(starts[k, first : t + 1], log_reverse[k, skip:])
                    end[k] = logs + before[t + 1, k]
            ends[k, t] = end[k]
        step(end, transmat, log_to_from, linear, enter)


@compiled({"contract"})
def log_likelihood(before, possible_from, starts, ends, log_survival, censored):
    """log p(x) relative to the best states: the last segment ends, or goes on."""
    k_size, t_size = starts.shape
    if not censored:
        return log_sum(ends[:, t_size - 1].copy(), np.zeros(k_size))
    d_size = log_survival.shape[1]
    logs = np.empty(k_size)
    for k in range(k_size):
        first = max(possible_from[t_size - 1, k], t_size - d_size)
        ages = log_survival[k, : max(0, t_size - first)][::-1].copy()
        logs[k] = log_sum(starts[k, first:], ages) + before[t_size, k] if len(ages) else -np.inf
    return log_sum(logs, np.zeros(k_size))


@compiled({"contract"})
def backward(
    before, possible_from, transmat, log_from_to, durations, log_durations, log_survival, censored,
    likelihood, starts, ends, states, transitions, counts,
):  # fmt: skip
    """Fill `states` `(t, k)`, and add to the expected `transitions` `(k, k)` and `counts` `(k, d)`.

    `starts` and `ends` come from `forward`, `likelihood` from `log_likelihood`.
    """
    k_size, t_size = starts.shape
    d_size = durations.shape[1]
    plain, logs = np.zeros((k_size, t_size)), np.full((k_size, t_size), -np.inf)
    offset = np.zeros(k_size)
    to_from = transmat.T.copy()
    after_end = np.full(k_size, -np.inf if censored else 0.0)  # log p(what follows | end at e)
    after_start, linear = np.empty(k_size), np.empty(k_size)
    impossible = np.full(k_size, t_size)  # the first frame from s on that a state cannot explain
    entering, leaving = np.zeros((t_size, k_size)), np.zeros((t_size, k_size))
    for s in range(t_size - 1, -1, -1):
        for k in range(k_size):
            leaving[s, k] = math.exp(ends[k, s] + after_end[k] - likelihood)
            if possible_from[s, k] == s + 1:
                impossible[k] = s
            log = after_end[k] + before[s + 1, k]
            logs[k, s] = log
            stop = min(impossible[k], s + d_size, t_size)
            if log - offset[k] > WIDEST:
                offset[k] = rebase(logs[k], plain[k], offset[k], s, max(stop, s + 1))
            else:
                plain[k, s] = math.exp(log - offset[k])
            after_start[k] = -np.inf
            if stop > s:
                mass = dot(plain[k], s, durations[k], 0, stop - s)
                if mass > SMALLEST_SUM:
                    after_start[k] = math.log(mass) + offset[k] - before[s, k]
                else:
                    offset[k] = rebase(logs[k], plain[k], offset[k], s, stop)
                    after_start[k] = log_sum(logs[k, s:stop], log_durations[k]) - before[s, k]
                _count(
                    starts[k, s], offset[k] - likelihood, plain[k], logs[k], s, stop,
                    likelihood, durations[k], counts[k],
                )  # fmt: skip
            age = t_size - s
            if censored and impossible[k] == t_size and age <= d_size:
                goes_on = log_survival[k, age - 1] + before[t_size, k] - before[s, k]
                after_start[k] = _log_add(after_start[k], goes_on)
                weight = math.exp(starts[k, s] + before[s, k] + goes_on - likelihood)
                if weight > 0:
                    _spread(weight, log_survival[k, age - 1], age, durations[k], counts[k])
            entering[s, k] = math.exp(starts[k, s] + before[s, k] + after_start[k] - likelihood)
        if s > 0:
            _count_steps(
                ends[:, s - 1], transmat, log_from_to, after_start, likelihood, transitions
            )
            step(after_start, to_from, log_from_to, linear, after_end)
    for k in range(k_size):
        inside = 0.0
        for t in range(t_size):
            inside += entering[t, k]
            states[t, k] = 0.0 if possible_from[t, k] == t + 1 else max(inside, 0.0)
            inside -= leaving[t, k]
            if inside < 1e-11:  # what rounding leaves of a state that has certainly ended
                inside = 0.0


@compiled({"contract"})
def _log_add(a, b):
    top = max(a, b)
    return top if top == -np.inf else top + math.log(math.exp(a - top) + math.exp(b - top))


@compiled(SUMS)
def _count(start, shift, plain, logs, first, stop, likelihood, durations, counts):
    """Add the probabilities of the segments that start at a frame, by duration."""
    log_weight = start + shift
    if log_weight < WIDEST:
        weight = math.exp(log_weight)
        for d in range(stop - first):
            counts[d] += weight * plain[first + d] * durations[d]
    else:
        for d in range(stop - first):
            if durations[d] > 0:
                counts[d] += math.exp(start + logs[first + d] - likelihood) * durations[d]


@compiled({"contract"})
def _spread(weight, log_survival, age, durations, counts):
    """A segment that goes on has the durations from its age on, in proportion."""
    for d in range(age - 1, len(durations)):
        counts[d] += weight * durations[d] / math.exp(log_survival)


@compiled({"contract"})
def _count_steps(ends, transmat, log_transmat, after_start, likelihood, transitions):
    """Add the probabilities of the steps from one segment to the next."""
    k_size = len(ends)
    for i in range(k_size):
        if ends[i] == -np.inf:
            continue
        for j in range(k_size):
            if transmat[i, j] > 0 and after_start[j] > -np.inf:
                transitions[i, j] += math.exp(
                    ends[i] + log_transmat[i, j] + after_start[j] - likelihood
                )


# The best segmentation, and random ones --------------------------------------------------------


@compiled({"contract"})
def best_forward(before, possible_from, log_to_from, log_start, log_reverse, starts, ends):
    """Like `forward`, with the best instead of the sum, in logarithms only."""
    k_size, d_size = log_reverse.shape
    enter = log_start.copy()
    for t in range(len(possible_from)):
        for k in range(k_size):
            starts[k, t] = enter[k] - before[t, k]
            first = max(possible_from[t, k], t - d_size + 1)
            ends[k, t] = -np.inf
            if first <= t:
                skip = d_size - 1 - (t - first)
                best = _largest(starts[k], first, log_reverse[k], skip, t + 1 - first)
                ends[k, t] = best + before[t + 1, k]
        for j in range(k_size):
            enter[j] = -np.inf
            for i in range(k_size):
                enter[j] = max(enter[j], ends[i, t] + log_to_from[j, i])


@compiled(SUMS)
def _largest(a, a_first, b, b_first, size):
    """max(a + b) over a part of each."""
    best = -np.inf
    for n in range(size):
        x = a[a_first + n] + b[b_first + n]
        best = x if x > best else best
    return best


@compiled({"contract"})
def trace_back(
    before, possible_from, log_to_from, log_reverse, log_survival, censored, starts, ends, uniforms,
    path, segments,
):  # fmt: skip
    """Fill `path` `(t)` and `segments` `(n, 2)`, last first; returns how many, and the log weight.

    With `uniforms` `(t, 2)`, choices are drawn in proportion to their weights; without (empty),
    the best one is taken. `starts` and `ends` come from `forward` or `best_forward`.
    """
    k_size, t_size = starts.shape
    d_size = log_reverse.shape[1]
    drawn = len(uniforms) > 0
    end, number, state, weight = t_size - 1, 0, -1, 0.0
    logs, ages = np.empty(k_size), np.empty(d_size)
    while end >= 0:
        last = end == t_size - 1 and censored
        for k in range(k_size):
            if last:
                logs[k] = _going_on(before, possible_from, starts, log_survival, k, drawn)
            else:
                logs[k] = ends[k, end] + (0.0 if state < 0 else log_to_from[state, k])
        state = _choose(logs, k_size, uniforms[number, 0] if drawn else -1.0)
        if number == 0:
            weight = logs[state]
        first = max(possible_from[end, state], end - d_size + 1)
        size = end - first + 1
        for n in range(size):  # by duration
            log = log_survival[state, n] if last else log_reverse[state, d_size - 1 - n]
            ages[n] = starts[state, end - n] + log
        duration = 1 + _choose(ages, size, uniforms[number, 1] if drawn else -1.0)
        path[end - duration + 1 : end + 1] = state
        segments[number, 0], segments[number, 1] = state, duration
        number += 1
        end -= duration
    return number, weight


@compiled({"contract"})
def _going_on(before, possible_from, starts, log_survival, state, summed):
    """The log weight of a last segment of a state that may go on: the sum, or the best."""
    t_size = starts.shape[1]
    first = max(possible_from[t_size - 1, state], t_size - log_survival.shape[1])
    if first >= t_size:
        return -np.inf
    ages = log_survival[state, : t_size - first][::-1].copy()
    weights = starts[state, first:]
    total = log_sum(weights, ages) if summed else _largest(weights, 0, ages, 0, len(ages))
    return total + before[t_size, state]


@compiled({"contract"})
def _choose(logs, size, uniform):
    """The largest, or one drawn in proportion to exp(logs) if `uniform` is not negative."""
    best = 0
    for n in range(1, size):
        if logs[n] > logs[best]:
            best = n
    if uniform < 0:
        return best
    total = 0.0
    for n in range(size):
        total += math.exp(logs[n] - logs[best])
    rest = uniform * total
    chosen = best
    for n in range(size):
        mass = math.exp(logs[n] - logs[best])
        if mass > 0:
            chosen = n
            rest -= mass
            if rest < 0:
                break
    return chosen
