"""Hidden semi-Markov models: each segment of a state has a duration with a law of its own.

A hidden Markov model forgets how long it has been in a state, so its durations are geometric: the
shortest is the most probable. Here `durations` `(k, d)` gives p(duration) of each state; index
d - 1 holds duration d. Functions of log emissions, on the CPU, in O(T · K · (K + D)); they promise
what `tfswa_lab.sequence` says.

The last segment ends with the sequence. With `right_censored`, it may go on behind it, and counts
p(duration ≥ what was seen).

Axis letters: `b` sequences, `t` frames, `k` states, `d` durations, `n` samples.

Source: Yu, "Hidden semi-Markov models", 2010.

Notebook: 11_hmm
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tfswa_lab.sequence import hsmm_batch_kernels as batch_kernels
from tfswa_lab.sequence import hsmm_kernels as kernels
from tfswa_lab.sequence.compiled_engine import double_array
from tfswa_lab.sequence.inference import by_probability
from tfswa_lab.sequence.inputs import ROW_SUM_TOLERANCE, Problem, check_distributions, checked


class Posteriors(NamedTuple):
    """What the frames say about states and segments.

    Attributes:
        states: `(b, t, k)`, p(z_t = k | x).
        transitions: `(b, k, k)`, the expected number of steps from one segment to the next.
        durations: `(b, k, d)`, the expected number of segments of each duration; a censored one
            counts for all durations that it may still get.
        log_likelihood: `(b)`.
    """

    states: Tensor
    transitions: Tensor
    durations: Tensor
    log_likelihood: Tensor


class Decoded(NamedTuple):
    """The most probable segmentation.

    Attributes:
        states: `(b, t)`, -1 in padding.
        log_probability: `(b)`, log p(segments, x).
        segments: for each sequence `(n, 2)`, state and duration; a censored one has what was seen.
    """

    states: Tensor
    log_probability: Tensor
    segments: list[Tensor]


def log_likelihood(
    log_emissions: Tensor,
    startprob: Tensor,
    transmat: Tensor,
    durations: Tensor,
    lengths: Tensor | None = None,
    *,
    right_censored: bool = False,
    survival: Tensor | None = None,
) -> Tensor:
    """The logarithm of the probability of each sequence; -inf if no segmentation fits.

    Its gradient is given by the posteriors, as in `inference.log_likelihood`.

    Args:
        log_emissions: `(b, t, k)` or `(t, k)`.
        startprob: `(k)`, of the first segment's state.
        transmat: `(k, k)`, from one segment to the next; the diagonal is usually 0.
        durations: `(k, d)`, p(duration).
        lengths: `(b)`.
        right_censored: whether the last segment may go on behind the end.
        survival: `(k, d)`, p(duration ≥ d), for laws that are longer than `durations`; rows of
            `durations` need not sum to one then.

    Returns:
        `(b)`, or one number without the axis `b`.

    Raises:
        ValueError: a shape, length, probability or emission that cannot be.
    """
    problem, laws, batched = _checked(
        log_emissions, startprob, transmat, durations, lengths, right_censored, survival
    )
    if survival is not None and laws.durations.requires_grad:
        raise ValueError("durations have no gradient where survival is given: detach them")
    result = _LogLikelihood.apply(*problem, *laws)
    result = result.to(problem.log_emissions)
    return result if batched else result[0]


class _LogLikelihood(torch.autograd.Function):
    """The forward pass, with the smoother as its gradient."""

    @staticmethod
    def forward(ctx, log_emissions, startprob, transmat, lengths, durations, survival, censored):
        problem = Problem(log_emissions, startprob, transmat, lengths)
        ctx.save_for_backward(*problem, durations, survival)
        ctx.censored = censored
        return _log_likelihoods(problem.detached(), _Laws(durations, survival, censored))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        # A censored segment counts for all durations d that it may get, with p(d) / survival, and
        # divided by p(d) that is the derivative through the survival as well.
        *fields, durations, survival = ctx.saved_tensors
        problem = Problem(*fields).detached()
        laws = _Laws(durations, survival, ctx.censored)
        wanted = (gradient != 0).cpu()
        found = _smoothed(problem, laws, wanted.tolist())
        weight = gradient.cpu().to(torch.float64)[:, None, None]
        states = found.states * weight
        counts = (states[:, 0], found.transitions * weight, found.durations * weight)
        given = (problem.startprob, problem.transmat, durations)
        to_start, to_steps, to_durations = map(by_probability, counts, given)
        to_emissions = states.to(problem.log_emissions)
        return to_emissions, to_start, to_steps, None, to_durations, None, None


def posteriors(
    log_emissions: Tensor,
    startprob: Tensor,
    transmat: Tensor,
    durations: Tensor,
    lengths: Tensor | None = None,
    *,
    right_censored: bool = False,
    survival: Tensor | None = None,
) -> Posteriors:
    """The probability of each state in each frame, and the expected segments, given all frames.

    Args and errors: as `log_likelihood`. The results carry no gradient.

    Raises:
        ValueError: no segmentation of a sequence fits.
    """
    problem, laws, batched = _checked(
        log_emissions, startprob, transmat, durations, lengths, right_censored, survival
    )
    found = _smoothed(problem.detached(), laws)
    found = Posteriors(*(tensor.to(problem.log_emissions) for tensor in found))
    return found if batched else Posteriors(*(tensor[0] for tensor in found))


def smooth(
    log_emissions: Tensor,
    startprob: Tensor,
    transmat: Tensor,
    durations: Tensor,
    lengths: Tensor | None = None,
    *,
    right_censored: bool = False,
) -> Posteriors:
    """The posteriors of a batch in float64 on the CPU, for EM.

    Args and errors: as `posteriors`.
    """
    problem, laws, _ = _checked(
        log_emissions, startprob, transmat, durations, lengths, right_censored, None
    )
    return _smoothed(problem.detached(), laws)


def viterbi(
    log_emissions: Tensor,
    startprob: Tensor,
    transmat: Tensor,
    durations: Tensor,
    lengths: Tensor | None = None,
    *,
    right_censored: bool = False,
    survival: Tensor | None = None,
) -> Decoded:
    """The most probable segmentation.

    Args and errors: as `posteriors`.
    """
    problem, laws, batched = _checked(
        log_emissions, startprob, transmat, durations, lengths, right_censored, survival
    )
    states = torch.full(problem.log_emissions.shape[:2], -1)
    scores, segments = [], []
    for row, one in enumerate(_sequences(problem, laws)):
        _refuse_impossible(one, row)
        path, cut, weight = one.trace_back(one.best(), np.empty((0, 2)))
        states[row, : one.length] = torch.from_numpy(path)
        segments.append(torch.from_numpy(cut))
        scores.append(weight + one.offset)
    emissions = problem.log_emissions
    found = Decoded(
        states.to(emissions.device),
        torch.tensor(scores, dtype=torch.float64).to(emissions),
        segments,
    )
    return found if batched else Decoded(found.states[0], found.log_probability[0], segments[:1])


def sample_paths(
    log_emissions: Tensor,
    startprob: Tensor,
    transmat: Tensor,
    durations: Tensor,
    lengths: Tensor | None = None,
    *,
    num_samples: int = 1,
    right_censored: bool = False,
    survival: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Whole paths `(b, n, t)` drawn from p(z | x); -1 in padding.

    Args and errors: as `posteriors`; `generator` is one of the CPU.
    """
    problem, laws, batched = _checked(
        log_emissions, startprob, transmat, durations, lengths, right_censored, survival
    )
    b, t, _ = problem.log_emissions.shape
    paths = torch.full((b, num_samples, t), -1)
    for row, one in enumerate(_sequences(problem, laws)):
        _refuse_impossible(one, row)
        for sample in range(num_samples):
            uniforms = torch.rand(one.length, 2, generator=generator, dtype=torch.float64)
            path, _, _ = one.trace_back(one.logs, uniforms.numpy())
            paths[row, sample, : one.length] = torch.from_numpy(path)
    paths = paths.to(problem.log_emissions.device)
    return paths if batched else paths[0]


# Inputs ----------------------------------------------------------------------------------------


class _Laws(NamedTuple):
    """Durations `(k, d)`, their survival `(k, d)`, and whether the last segment may go on."""

    durations: Tensor
    survival: Tensor
    censored: bool


def _checked(
    log_emissions, startprob, transmat, durations, lengths, censored, survival
) -> tuple[Problem, _Laws, bool]:
    problem, batched = checked(log_emissions, startprob, transmat, lengths)
    k = problem.log_emissions.shape[-1]
    if problem.varies:
        raise ValueError("transmat must be (k, k): transitions of segments do not change with time")
    if problem.startprob.ndim == 2:
        raise ValueError("startprob must be (k): segments start alike in all sequences")
    durations = torch.as_tensor(durations)
    if durations.ndim != 2 or durations.shape[0] != k or not durations.shape[1]:
        raise ValueError(
            f"durations have shape {tuple(durations.shape)}, expected ({k}, longest duration)"
        )
    durations = durations.to(problem.log_emissions.device)
    if survival is None:
        check_distributions("durations", durations)
        survival = survival_of(durations)
    survival = torch.as_tensor(survival).to(durations)
    if survival.shape != durations.shape or not bool(((survival >= 0) & (survival <= 1.001)).all()):
        raise ValueError(
            f"survival has shape {tuple(survival.shape)}, expected probabilities of shape "
            f"{tuple(durations.shape)}"
        )
    wrong = ~((durations >= 0) & (durations <= survival + ROW_SUM_TOLERANCE)).detach()
    if bool(wrong.any()):
        k, d = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"durations[{k}, {d}] is {float(durations[k, d]):.6g} and survival "
            f"{float(survival[k, d]):.6g}, expected 0 ≤ p(duration) ≤ p(duration ≥ d)"
        )
    return problem, _Laws(durations, survival.detach(), censored), batched


def survival_of(durations: Tensor) -> Tensor:
    """p(duration ≥ d) `(k, d)`."""
    return durations.flip(-1).cumsum(-1).flip(-1)


# Sequences side by side ------------------------------------------------------------------------

TOGETHER = 32  # sequences, so that the starts within reach stay in the cache
MORE_STARTS = 32  # frames after which the starts within reach move to the front again
FEWEST = 16  # sequences from which on this is faster than one after the other


def _log_likelihoods(problem: Problem, laws: _Laws) -> Tensor:
    """The log-likelihoods `(b)`, side by side where that is safe."""
    tables = _tables(problem, laws)
    emissions, lengths = problem.log_emissions.cpu(), problem.lengths
    found = torch.full((len(emissions),), torch.nan, dtype=torch.float64)
    if _together_is_safe(tables):
        for first in range(0, len(emissions) - FEWEST + 1, TOGETHER):
            rows = slice(first, first + TOGETHER)
            found[rows] = _together(emissions[rows], lengths[rows], tables)
    for row in found.isnan().nonzero()[:, 0].tolist():
        seen = double_array(emissions[row, : lengths[row]])
        found[row] = _Sequence(seen, tables).log_likelihood
    return found


def _together_is_safe(tables: _Tables) -> bool:
    """Whether no probability is so small that a product could underflow; 0 is exact."""
    given = (np.exp(tables.start), tables.transmat, tables.durations)
    return not any(np.any((rows > 0) & (rows < batch_kernels.SMALLEST)) for rows in given)


def _together(emissions: Tensor, lengths: Tensor, tables: _Tables) -> Tensor:
    """The log-likelihoods `(b)` of some sequences; NaN for those that are not safe."""
    frames = int(lengths.max())
    logs = emissions[:, :frames].permute(1, 2, 0).contiguous().numpy()
    _, states, sequences = logs.shape
    last = np.exp(tables.log_survival[:, ::-1]) if tables.censored else tables.reverse
    laws = [np.pad(rows, ((0, 0), (-rows.shape[1] % 4, 0))) for rows in (tables.reverse, last)]
    plain = np.zeros((states, laws[0].shape[1] + MORE_STARTS, sequences))
    scale, best, safe = np.ones((frames, sequences)), np.zeros(sequences), np.ones(sequences)
    lengths = lengths.numpy().astype(float)
    model = (tables.transmat, np.exp(tables.start), *laws, tables.censored)
    batch_kernels.forward(logs, lengths, *model, plain, scale, best, safe)
    scale[(np.arange(frames)[:, None] >= lengths) | (scale <= 0)] = 1
    return torch.from_numpy(np.where(safe > 0, np.log(scale).sum(0) + best, np.nan))


# One sequence at a time ------------------------------------------------------------------------


class _Tables(NamedTuple):
    """Probabilities and logarithms of a model in float64, in the orders that the kernels read."""

    start: np.ndarray
    transmat: np.ndarray
    from_to: np.ndarray  # logarithms
    to_from: np.ndarray
    durations: np.ndarray
    log_durations: np.ndarray
    reverse: np.ndarray
    log_reverse: np.ndarray
    log_survival: np.ndarray
    censored: bool


def _tables(problem: Problem, laws: _Laws) -> _Tables:
    transmat, durations = double_array(problem.transmat), double_array(laws.durations)
    with np.errstate(divide="ignore"):
        logs, log_durations = np.log(transmat), np.log(durations)
        return _Tables(
            np.log(double_array(problem.startprob)),
            transmat,
            logs,
            np.ascontiguousarray(logs.T),
            durations,
            log_durations,
            np.ascontiguousarray(durations[:, ::-1]),
            np.ascontiguousarray(log_durations[:, ::-1]),
            np.log(double_array(laws.survival)),
            laws.censored,
        )


def _sequences(problem: Problem, laws: _Laws) -> list[_Sequence]:
    tables = _tables(problem, laws)
    emissions = problem.log_emissions.detach().cpu()
    return [
        _Sequence(double_array(emissions[row, :length]), tables)
        for row, length in enumerate(problem.lengths.tolist())
    ]


class _Sequence:
    """One sequence without padding, after its forward pass."""

    def __init__(self, emissions: np.ndarray, tables: _Tables):
        self.length, states = emissions.shape
        self.tables = tables
        self.before = np.empty((self.length + 1, states))
        self.possible_from = np.empty((self.length, states), np.int64)
        frames = (self.before, self.possible_from)
        seen = np.empty((self.length, states))
        self.offset = kernels.cumulated(emissions, *frames, seen)
        self.weights = [np.empty((states, self.length)) for _ in range(4)]
        laws = (tables.start, tables.reverse, tables.log_reverse)
        kernels.forward(seen, *frames, tables.transmat, tables.to_from, *laws, *self.weights)
        survival = (tables.log_survival, tables.censored)
        self.relative = kernels.log_likelihood(*frames, *self.weights, *survival)

    @cached_property
    def logs(self) -> tuple[np.ndarray, np.ndarray]:
        """Logarithms of the weights of entering and of ending `(k, t)`."""
        starts, start_shifts, ends, end_shifts = self.weights
        with np.errstate(divide="ignore"):
            return np.log(starts) + start_shifts, np.log(ends) + end_shifts

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """The same for the best way of entering and of ending."""
        tables, starts, ends = self.tables, *(np.empty_like(self.weights[0]) for _ in range(2))
        kernels.best_forward(
            self.before,
            self.possible_from,
            tables.to_from,
            tables.start,
            tables.log_reverse,
            starts,
            ends,
        )
        return starts, ends

    @property
    def log_likelihood(self) -> float:
        return self.relative + self.offset

    def smoothed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The posteriors `(t, k)`, expected transitions `(k, k)` and durations `(k, d)`."""
        tables = self.tables
        states = np.empty((self.length, len(tables.transmat)))
        transitions, counts = np.zeros_like(tables.transmat), np.zeros_like(tables.durations)
        kernels.backward(
            self.before,
            self.possible_from,
            tables.transmat,
            tables.from_to,
            tables.durations,
            tables.log_durations,
            tables.log_survival,
            tables.censored,
            self.relative,
            *self.logs,
            states,
            transitions,
            counts,
        )
        return states, transitions, counts

    def trace_back(
        self, logs: tuple[np.ndarray, np.ndarray], uniforms: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """A path `(t)`, its segments `(n, 2)` and log weight: the best, or drawn by `uniforms`."""
        tables = self.tables
        path = np.empty(self.length, np.int64)
        segments = np.empty((self.length, 2), np.int64)
        number, weight = kernels.trace_back(
            self.before,
            self.possible_from,
            tables.to_from,
            tables.log_reverse,
            tables.log_survival,
            tables.censored,
            *logs,
            uniforms,
            path,
            segments,
        )
        return path, segments[:number][::-1].copy(), weight


def _smoothed(problem: Problem, laws: _Laws, wanted: list[bool] | None = None) -> Posteriors:
    """The posteriors in float64 on the CPU; zeros for sequences that are not wanted."""
    b, t, k = problem.log_emissions.shape
    states = torch.zeros(b, t, k, dtype=torch.float64)
    transitions = torch.zeros(b, k, k, dtype=torch.float64)
    durations = torch.zeros(b, *laws.durations.shape, dtype=torch.float64)
    likelihood = torch.zeros(b, dtype=torch.float64)
    for row, one in enumerate(_sequences(problem, laws)):
        likelihood[row] = one.log_likelihood
        if wanted is None or wanted[row]:
            _refuse_impossible(one, row)
            found = map(torch.from_numpy, one.smoothed())
            states[row, : one.length], transitions[row], durations[row] = found
    return Posteriors(states, transitions, durations, likelihood)


def _refuse_impossible(one: _Sequence, row: int) -> None:
    if one.relative > -np.inf:
        return
    possible = np.flatnonzero(one.tables.durations.any(0)) + 1
    censored = "" if one.tables.censored else "; the last segment may be cut: right_censored=True"
    raise ValueError(
        f"sequence {row} has probability 0: no segmentation of its {one.length} frames fits "
        f"durations of {possible[0]} to {possible[-1]} frames with these startprob, transmat and "
        f"log_emissions{censored}"
    )
