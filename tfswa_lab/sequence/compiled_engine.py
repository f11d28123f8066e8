"""The compiled engine: which kernel may compute a batch, and its arrays in and out.

Scaling divides each frame by its best state, so states 60 nats (float32) below it are rounded.
That is harmless while every state can be reached from every other in one step that is not nearly
impossible: what was rounded away could have reached no state that the rest does not reach with a
far larger probability. So scaling is used if the smallest transition is at least `SAFE`, and the
first frame is not far from what `startprob` allows; all other sequences go through logarithms.

Notebook: 11_hmm
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tfswa_lab.sequence import kernels, single_kernels
from tfswa_lab.sequence.inputs import Problem, Smoothed, inside, replace_rows

SAFE = {torch.float32: 1e-6, torch.float64: 1e-60}  # the smallest transition that allows scaling
LOWEST = {torch.float32: -60.0, torch.float64: -600.0}  # nats below the best state
SMALLEST_SCALE = {torch.float32: 1e-7, torch.float64: 1e-61}
FEW = 4  # sequences, below which one after the other is faster than side by side,
FEW_BY_STATES = 0.5  # or below this times the states


def log_likelihood(problem: Problem) -> Tensor:
    """log p(x) `(b)`, float64."""
    if not scaling_is_safe(problem):
        return _log_filtered(problem)[0]
    scaled = _scaled(problem, keep=2)
    if len(scaled.rest):
        scaled.log_likelihood[scaled.rest] = _log_filtered(problem.select(scaled.rest))[0]
    return scaled.log_likelihood


def filtered(problem: Problem) -> tuple[Tensor, Tensor]:
    """log p(x) `(b)`, and p(z_t | x_1 … x_t) `(b, t, k)`."""
    if not scaling_is_safe(problem):
        return _filtered_by_logs(problem)
    frames = problem.log_emissions.shape[1]
    scaled = _scaled(problem, keep=frames)
    states = scaled.states() * inside(problem.lengths, frames)[..., None]
    results = (scaled.log_likelihood, states)
    if len(scaled.rest):
        replace_rows(results, scaled.rest, _filtered_by_logs(problem.select(scaled.rest)))
    return results


def smoothed(problem: Problem) -> Smoothed:
    """The posteriors, and the expected transitions."""
    if not scaling_is_safe(problem):
        return _smoothed_by_logs(problem)
    scaled = _scaled(problem, keep=problem.log_emissions.shape[1])
    results = Smoothed(scaled.log_likelihood, *scaled.smoothed())
    if len(scaled.rest):
        replace_rows(results, scaled.rest, _smoothed_by_logs(problem.select(scaled.rest)))
    return results


def viterbi(problem: Problem) -> tuple[Tensor, Tensor]:
    """The most probable states `(b, t)`, and log p(states, x) `(b)`."""
    b, t, _ = problem.log_emissions.shape
    if problem.varies:
        states, scores = best_paths(problem, 1)
        return states[:, 0], scores[:, 0]
    emissions, lengths = _last(problem.log_emissions), problem.lengths.numpy()
    with np.errstate(divide="ignore"):
        steps = np.log(double_array(problem.transmat))
        start = np.log(_start(problem).astype(np.float64))
    dtype = emissions.dtype
    path, scores = np.full((b, t), -1), np.empty(b)
    tables = (steps.astype(dtype), start.astype(dtype))
    if _are_few(problem):
        rows = problem.log_emissions.contiguous().numpy()
        for row, length in enumerate(lengths):
            seen, first = rows[row, :length], np.ascontiguousarray(tables[1][:, row])
            cells = np.empty_like(seen)
            single_kernels.viterbi(seen, tables[0], first, cells, path[row, :length])
    else:
        kernels.viterbi(emissions, *tables, lengths, np.empty_like(emissions), path)
    kernels.path_scores(emissions, steps, start, lengths, path, scores)
    return torch.from_numpy(path), torch.from_numpy(scores)


def best_paths(problem: Problem, number: int) -> tuple[Tensor, Tensor]:
    """The `number` most probable paths `(b, n, t)`, best first, and their scores `(b, n)`."""
    b, t, _ = problem.log_emissions.shape
    paths = np.full((b, number, t), -1)
    scores = np.full((b, number), -np.inf)
    for row in range(b):
        one = _Sequence(problem, row)
        kernels.best_paths(
            one.emissions,
            one.log_transmat,
            one.log_start,
            number,
            paths[row, :, : one.length],
            scores[row],
        )
    return torch.from_numpy(paths), torch.from_numpy(scores)


def sample_paths(problem: Problem, uniforms: Tensor) -> Tensor:
    """Paths `(b, n, t)` drawn from p(z | x), one for each row of `uniforms` `(b, n, t)`."""
    paths = np.full(uniforms.shape, -1)
    _, logs = _log_filtered(problem)
    for row in range(len(paths)):
        one = _Sequence(problem, row)
        kernels.sample_backwards(
            logs[row, : one.length],
            one.log_transmat,
            uniforms[row, :, : one.length].numpy(),
            paths[row, :, : one.length],
        )
    return torch.from_numpy(paths)


def first_impossible_frame(problem: Problem, row: int) -> int:
    """The first frame of a sequence that no path reaches, or -1."""
    one = _Sequence(problem, row)
    return one.forward(np.empty_like(one.emissions))[1]


# Scaled ----------------------------------------------------------------------------------------


def scaling_is_safe(problem: Problem) -> bool:
    """Whether rounding small states to zero changes nothing, so that scaling may be used."""
    smallest = SAFE[problem.log_emissions.dtype]
    return not problem.varies and bool(problem.transmat.min() >= smallest)


def _scaled(problem: Problem, keep: int) -> _SideBySide | _OneByOne:
    """A forward pass with scaling, that keeps so many frames; `rest` are sequences it left."""
    return (_OneByOne if _are_few(problem) else _SideBySide)(problem, keep)


def _are_few(problem: Problem) -> bool:
    sequences, _, states = problem.log_emissions.shape
    return sequences < max(FEW, FEW_BY_STATES * states)


class _SideBySide:
    """Arrays `(t, k, b)`."""

    def __init__(self, problem: Problem, keep: int):
        dtype = problem.log_emissions.dtype
        self.lengths = problem.lengths.numpy()
        emissions = _last(problem.log_emissions)
        frames, states, sequences = emissions.shape
        # Dense, for numba compiles anew for every other layout.
        self.transmat = np.ascontiguousarray(problem.transmat.numpy(), emissions.dtype)
        best = np.empty(sequences)
        self.emissions = np.empty_like(emissions)
        kernels.divide_by_best(emissions, self.lengths, LOWEST[dtype], self.emissions, best)
        np.exp(self.emissions, out=self.emissions)
        scale = np.empty((frames, sequences), emissions.dtype)
        self.filtered = np.empty((min(keep, frames), states, sequences), emissions.dtype)
        start = _start(problem).astype(emissions.dtype)
        kernels.forward(self.emissions, self.transmat, start, self.filtered, scale)
        if self.lengths.min() < frames:
            scale[np.arange(frames)[:, None] >= self.lengths] = 1
        self.rest, self.log_likelihood = _judged(scale, best, dtype)

    def states(self) -> Tensor:
        """The filtered probabilities `(b, t, k)`; anything in padding."""
        return _first(self.filtered)

    def smoothed(self) -> tuple[Tensor, Tensor]:
        """The posteriors `(b, t, k)`, and the expected transitions `(b, k, k)`."""
        states, sequences = self.emissions.shape[1:]
        counts = np.empty((states, states, sequences), self.emissions.dtype)
        kernels.backward(self.emissions, self.transmat, self.filtered, self.lengths, counts)
        return _first(self.filtered), torch.from_numpy(counts).permute(2, 0, 1)


class _OneByOne:
    """Arrays `(b, t, k)`, for few sequences."""

    def __init__(self, problem: Problem, keep: int):
        logs, self.lengths = problem.log_emissions.contiguous().numpy(), problem.lengths.tolist()
        b, frames, states = logs.shape
        dtype = problem.log_emissions.dtype
        self.transmat = np.ascontiguousarray(problem.transmat.numpy(), logs.dtype)
        self.emissions = np.zeros_like(logs)
        self.filtered = np.zeros((b, min(keep, frames), states), logs.dtype)
        scale, best = np.ones((frames, b), logs.dtype), np.empty(b)
        start = np.ascontiguousarray(_start(problem).T, logs.dtype)
        for row, length in enumerate(self.lengths):
            seen, total = self.emissions[row, :length], np.empty(length, logs.dtype)
            best[row] = single_kernels.divide_by_best(logs[row, :length], LOWEST[dtype], seen)
            np.exp(seen, out=seen)
            single_kernels.forward(seen, self.transmat, start[row], self.filtered[row], total)
            scale[:length, row] = total
        self.rest, self.log_likelihood = _judged(scale, best, dtype)

    def states(self) -> Tensor:
        """The filtered probabilities `(b, t, k)`."""
        return torch.from_numpy(self.filtered)

    def smoothed(self) -> tuple[Tensor, Tensor]:
        """The posteriors `(b, t, k)`, and the expected transitions `(b, k, k)`."""
        counts = np.empty((len(self.lengths), *self.transmat.shape), self.transmat.dtype)
        to_from = np.ascontiguousarray(self.transmat.T)
        for row, length in enumerate(self.lengths):
            seen, states = self.emissions[row, :length], self.filtered[row, :length]
            before = states.copy()
            single_kernels.backward(seen, to_from, states)
            counts[row] = self.transmat * (before[:-1].T @ seen[1:])
        return torch.from_numpy(self.filtered), torch.from_numpy(counts)


def _judged(scale: np.ndarray, best: np.ndarray, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sequences that scaling cannot do, by index, and the log-likelihoods `(b)` of the others."""
    rest = np.flatnonzero(scale.min(0) < SMALLEST_SCALE[dtype])
    with np.errstate(divide="ignore"):
        logs = np.log(scale, out=scale).sum(0, dtype=np.float64)
    return torch.from_numpy(rest), torch.from_numpy(logs + best)


def _last(log_emissions: Tensor) -> np.ndarray:
    """From `(b, t, k)` to `(t, k, b)`; no copy is made if the memory is in this order already."""
    return log_emissions.permute(1, 2, 0).contiguous().numpy()


def _first(array: np.ndarray) -> Tensor:
    """From `(t, k, b)` to `(b, t, k)`, without a copy."""
    return torch.from_numpy(array).permute(2, 0, 1)


def _start(problem: Problem) -> np.ndarray:
    """`startprob` as `(k, b)`."""
    b, _, k = problem.log_emissions.shape
    return np.ascontiguousarray(problem.startprob.expand(b, k).T.numpy())


# One sequence at a time, in logarithms ---------------------------------------------------------


class _Sequence:
    """One sequence of a problem, without its padding, in float64."""

    def __init__(self, problem: Problem, row: int):
        self.length = int(problem.lengths[row])
        self.emissions = double_array(problem.log_emissions[row, : self.length])
        start, transmat = problem.startprob, problem.transmat
        steps = transmat[row, : self.length - 1] if problem.varies else transmat[None]
        self.transmat = double_array(steps)
        with np.errstate(divide="ignore"):
            self.log_start = np.log(double_array(start[row] if start.ndim == 2 else start))
            self.log_transmat = np.log(self.transmat)

    def forward(self, logs: np.ndarray) -> tuple[float, int]:
        """Fill the filtered logarithms; the log-likelihood, and the frame that no path reaches."""
        to_from = np.ascontiguousarray(self.log_transmat.transpose(0, 2, 1))
        return kernels.log_forward(self.emissions, self.transmat, to_from, self.log_start, logs)


def double_array(tensor: Tensor) -> np.ndarray:
    """A tensor as a dense array in float64."""
    return tensor.detach().to("cpu", torch.float64).contiguous().numpy()


def _log_filtered(problem: Problem) -> tuple[Tensor, np.ndarray]:
    """log p(x) `(b)`, and log p(z_t, x_1 … x_t) relative to the frame's best, -inf in padding."""
    logs = np.full(tuple(problem.log_emissions.shape), -np.inf)
    likelihood = np.empty(len(logs))
    for row in range(len(logs)):
        one = _Sequence(problem, row)
        likelihood[row], _ = one.forward(logs[row, : one.length])
    return torch.from_numpy(likelihood), logs


def _filtered_by_logs(problem: Problem) -> tuple[Tensor, Tensor]:
    likelihood, logs = _log_filtered(problem)
    states = torch.from_numpy(np.exp(logs))
    total = states.sum(-1, keepdim=True)
    return likelihood, states / torch.where(total > 0, total, 1)


def _smoothed_by_logs(problem: Problem) -> Smoothed:
    b, t, k = problem.log_emissions.shape
    likelihood, logs = _log_filtered(problem)
    states = np.zeros((b, t, k))
    transitions = np.zeros((b, t - 1 if problem.varies else 1, k, k))
    for row in range(b):
        if likelihood[row] == -np.inf:
            continue  # it has no posteriors
        one = _Sequence(problem, row)
        kernels.log_backward(
            one.emissions,
            one.transmat,
            one.log_transmat,
            logs[row, : one.length],
            states[row, : one.length],
            transitions[row],
        )
    counts = torch.from_numpy(transitions if problem.varies else transitions[:, 0])
    return Smoothed(likelihood, torch.from_numpy(states), counts)
