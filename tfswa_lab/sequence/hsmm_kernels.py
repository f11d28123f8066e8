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

from tfswa_lab.sequence.kernels import SMALLEST_SUM, SUMS, compiled, draw, log_sum

WIDEST = 300.0  # nats that a plain copy may lie above its offset
# Sums and factors from this to its inverse are multiplied as they are: no product underflows.
SMALLEST, MOST = 1e-80, 1e30


@compiled({"contract"})
def cumulated(log_emissions, before, possible_from, seen):
    """Fill `before` `(t + 1, k)` with the sums of log emissions before each frame, `seen` `(t, k)`.

    Each frame is divided by its best state, and the sum of those is returned; `seen` are the
    emissions after that. An impossible state counts as 1: `possible_from` `(t, k)` says where a
    segment that reaches frame t can start.
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
            log = log_emissions[t, k] - top
            start = possible_from[t - 1, k] if t > 0 else 0
            possible_from[t, k] = t + 1 if log == -np.inf else start
            log = 0.0 if log == -np.inf else log
            before[t + 1, k] = before[t, k] + log
            seen[t, k] = math.exp(log)
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
def dot(a, b):
    """Σ a b."""
    total = 0.0
    for n in range(len(a)):
        total += a[n] * b[n]
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


@compiled(SUMS)
def forward(
    seen, before, possible_from, transmat, log_to_from, log_start, reverse, log_reverse,
    starts, start_shifts, ends, end_shifts,
):  # fmt: skip
    """Weights of entering and of ending at each frame, `(k, t)`: value · exp(shift).

    A start is divided by the product C of the emissions before it. `seen` `(t, k)` are emissions
    over the frame's best, 1 where impossible. `reverse` `(k, d)` holds the durations'
    probabilities, the longest first.

    While all states are within reach of each other, a frame takes plain numbers only: `reach` is
    what turns a sum of `plain` starts into the weight of an end, relative to `scale`. Where they
    are not, or a sum is so small that a start may have been rounded to zero, `_by_logs` takes the
    frame.
    """
    k_size, d_size = reverse.shape
    t_size = len(seen)
    plain, offset = np.zeros((k_size, t_size + 1)), np.zeros(k_size)
    reach, end, linear = np.ones(k_size), np.empty(k_size), np.empty(k_size)
    logs, enter = np.empty(k_size), np.empty(k_size)
    scale = 0.0
    steps_are_plain = _are_plain(transmat)
    for k in range(k_size):
        plain[k, 0] = starts[k, 0] = math.exp(log_start[k])
        start_shifts[k, 0] = 0.0
    for t in range(t_size):
        is_plain, total = steps_are_plain, 0.0
        for k in range(k_size):
            reach[k] *= seen[t, k]
            first = max(possible_from[t, k], t - d_size + 1)
            is_plain &= SMALLEST < reach[k] < 1 / SMALLEST
            end[k] = 0.0
            if first <= t:
                mass = dot(plain[k, first : t + 1], reverse[k, d_size - 1 - t + first :])
                is_plain &= mass > SMALLEST
                end[k] = mass * reach[k]
            total += end[k]
        if is_plain and total > 0:
            for j in range(k_size):
                enter[j] = 0.0
                for i in range(k_size):
                    enter[j] += end[i] * transmat[i, j]
                # 0 is exact here: no end was rounded to it, and no step is so improbable.
                is_plain &= enter[j] == 0 or enter[j] > SMALLEST
        if is_plain and total > 0:
            for k in range(k_size):
                ends[k, t], end_shifts[k, t] = end[k], scale
                if t + 1 < t_size:
                    starts[k, t + 1] = plain[k, t + 1] = enter[k] / reach[k]
                    start_shifts[k, t + 1] = offset[k]
                    if plain[k, t + 1] > MOST:  # the state has become bad: count its starts anew
                        offset[k] -= math.log(reach[k])
                        for s in range(max(0, t - d_size + 1), t + 2):
                            plain[k, s] *= reach[k]
                        reach[k] = 1.0
            if not 1 / MOST < total < MOST:
                scale += math.log(total)
                for k in range(k_size):
                    reach[k] /= total
            continue
        _end_logs(
            t, before, possible_from, reverse, log_reverse, starts, start_shifts, plain, offset,
            logs,
        )  # fmt: skip
        scale = logs.max() if logs.max() > -np.inf else scale
        for k in range(k_size):
            ends[k, t], end_shifts[k, t] = _as_weight(logs[k])
        if t + 1 < t_size:
            step(logs, transmat, log_to_from, linear, enter)
            for k in range(k_size):
                log = enter[k] - before[t + 1, k]
                starts[k, t + 1], start_shifts[k, t + 1] = _as_weight(log)
                if log - offset[k] > WIDEST:
                    first = max(0, t - d_size + 2)
                    _rebase(starts[k], start_shifts[k], plain[k], offset, k, first, t + 2)
                else:
                    plain[k, t + 1] = math.exp(log - offset[k])
                reach[k] = math.exp(offset[k] + before[t + 1, k] - scale)


@compiled({"contract"})
def _are_plain(transmat):
    """Whether no step is so improbable that a product could underflow; 0 is exact."""
    return not np.any((transmat > 0) & (transmat < SMALLEST))


@compiled({"contract"})
def _as_weight(log):
    """A logarithm as a value and a shift."""
    return (0.0, 0.0) if log == -np.inf else (1.0, log)


@compiled({"contract"})
def _rebase(values, shifts, plain, offset, k, first, stop):
    """Make the plain starts of a state relative to their largest."""
    top = -np.inf
    for s in range(first, stop):
        if values[s] > 0:
            top = max(top, math.log(values[s]) + shifts[s])
    offset[k] = offset[k] if top == -np.inf else top
    for s in range(first, stop):
        log = math.log(values[s]) + shifts[s] if values[s] > 0 else -np.inf
        plain[s] = math.exp(log - offset[k])


@compiled({"contract"})
def _end_logs(
    t, before, possible_from, reverse, log_reverse, starts, shifts, plain, offset, logs
):  # fmt: skip
    """Fill `logs` `(k)` with the logarithms of the weights of ending at frame t."""
    k_size, d_size = reverse.shape
    for k in range(k_size):
        first = max(possible_from[t, k], t - d_size + 1)
        skip = d_size - 1 - (t - first)
        logs[k] = -np.inf
        if first > t:
            continue
        mass = dot(plain[k, first : t + 1], reverse[k, skip:])
        if mass > SMALLEST_SUM:
            logs[k] = math.log(mass) + offset[k]
        else:
            _rebase(starts[k], shifts[k], plain[k], offset, k, first, t + 1)
            window = np.full(t + 1 - first, -np.inf)
            for s in range(first, t + 1):
                if starts[k, s] > 0:
                    window[s - first] = math.log(starts[k, s]) + shifts[k, s]
            logs[k] = log_sum(window, log_reverse[k, skip:])
        logs[k] += before[t + 1, k]


@compiled({"contract"})
def log_likelihood(
    before, possible_from, starts, start_shifts, ends, end_shifts, log_survival, censored
):  # fmt: skip
    """log p(x) relative to the best states: the last segment ends, or goes on."""
    k_size, t_size = starts.shape
    logs, none = np.full(k_size, -np.inf), np.zeros(k_size)
    for k in range(k_size):
        if not censored:
            if ends[k, t_size - 1] > 0:
                logs[k] = math.log(ends[k, t_size - 1]) + end_shifts[k, t_size - 1]
            continue
        first = max(possible_from[t_size - 1, k], t_size - log_survival.shape[1])
        window = np.full(t_size - first, -np.inf)
        ages = np.empty(t_size - first)
        for s in range(first, t_size):
            ages[s - first] = log_survival[k, t_size - s - 1]
            if starts[k, s] > 0:
                window[s - first] = math.log(starts[k, s]) + start_shifts[k, s]
        logs[k] = log_sum(window, ages) + before[t_size, k]
    return log_sum(logs, none)


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
                mass = dot(plain[k, s:stop], durations[k])
                if mass > SMALLEST_SUM:
                    after_start[k] = math.log(mass) + offset[k] - before[s, k]
                else:
                    offset[k] = rebase(logs[k], plain[k], offset[k], s, stop)
                    after_start[k] = log_sum(logs[k, s:stop], log_durations[k]) - before[s, k]
                _count(
                    starts[k, s], offset[k] - likelihood, plain[k, s:stop], logs[k, s:stop],
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
    for t in range(t_size):  # sums over many frames drift
        total = states[t].sum()
        for k in range(k_size):
            states[t, k] /= total


@compiled({"contract"})
def _log_add(a, b):
    top = max(a, b)
    return top if top == -np.inf else top + math.log(math.exp(a - top) + math.exp(b - top))


@compiled(SUMS)
def _count(start, shift, plain, logs, likelihood, durations, counts):
    """Add the probabilities of the segments that start at a frame, by duration."""
    log_weight = start + shift
    if log_weight < WIDEST:
        weight = math.exp(log_weight)
        for d in range(len(plain)):
            counts[d] += weight * plain[d] * durations[d]
    else:
        for d in range(len(plain)):
            if durations[d] > 0:
                counts[d] += math.exp(start + logs[d] - likelihood) * durations[d]


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
                best = _largest(starts[k, first : t + 1], log_reverse[k, skip:])
                ends[k, t] = best + before[t + 1, k]
        for j in range(k_size):
            enter[j] = -np.inf
            for i in range(k_size):
                enter[j] = max(enter[j], ends[i, t] + log_to_from[j, i])


@compiled(SUMS)
def _largest(a, b):
    """max(a + b)."""
    best = -np.inf
    for n in range(len(a)):
        x = a[n] + b[n]
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
        state = _choose(logs, uniforms[number, 0] if drawn else -1.0)
        if number == 0:
            weight = logs[state]
        first = max(possible_from[end, state], end - d_size + 1)
        size = end - first + 1
        for n in range(size):  # by duration
            log = log_survival[state, n] if last else log_reverse[state, d_size - 1 - n]
            ages[n] = starts[state, end - n] + log
        duration = 1 + _choose(ages[:size], uniforms[number, 1] if drawn else -1.0)
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
    total = log_sum(weights, ages) if summed else _largest(weights, ages)
    return total + before[t_size, state]


@compiled({"contract"})
def _choose(logs, uniform):
    """The largest, or one drawn in proportion to exp(logs) if `uniform` is not negative."""
    return np.argmax(logs) if uniform < 0 else draw(logs, uniform)
