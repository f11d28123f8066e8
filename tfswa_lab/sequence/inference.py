"""Inference in hidden Markov models: functions of log emissions, for any model and any network.

All take `log_emissions` `(b, t, k)`, `startprob` `(k)`, `transmat` `(k, k)` or `(b, t - 1, k, k)`
and `lengths` `(b)`; without the axis `b`, results have none. What they promise stands in
`tfswa_lab.sequence`. Axis letters: `b` sequences, `t` frames, `k` states, `n` paths.

Notebook: 11_hmm
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from tfswa_lab.sequence import compiled_engine, log_engine, tensor_engine
from tfswa_lab.sequence.inputs import Problem, Smoothed, checked, inside, replace_rows

METHODS = ("auto", "compiled", "tensor", "log")


class Posteriors(NamedTuple):
    """What the frames say about the states.

    Attributes:
        states: `(b, t, k)`, p(z_t = k | x_1 … x_T).
        transitions: `(b, k, k)`, the expected number of steps from one state to another.
        log_likelihood: `(b)`.
    """

    states: Tensor
    transitions: Tensor
    log_likelihood: Tensor


class Decoded(NamedTuple):
    """The most probable path, or the n best.

    Attributes:
        states: `(b, t)`, or `(b, n, t)` for the n best; -1 in padding.
        log_probability: `(b)` or `(b, n)`, log p(states, x); -inf behind the last path there is.
    """

    states: Tensor
    log_probability: Tensor


class Filtered(NamedTuple):
    """What is known at each frame without the frames that follow.

    Attributes:
        states: `(b, t, k)`, p(z_t = k | x_1 … x_t).
        log_likelihood: `(b)`.
    """

    states: Tensor
    log_likelihood: Tensor


def log_likelihood(
    log_emissions: Tensor,
    startprob: Tensor,
    transmat: Tensor,
    lengths: Tensor | None = None,
    *,
    method: str = "auto",
    checkpoint_every: int | None = None,
) -> Tensor:
    """The logarithm of the probability of each sequence; -inf if no path is possible.

    Its gradient is given by the posteriors: with respect to the log emissions p(z_t = k | x), to
    a probability its expected count divided by it (0 at a hard zero, which stays forbidden).

    Args:
        log_emissions: `(b, t, k)` or `(t, k)`, log p(x_t | z_t = k).
        startprob: `(k)`, p(z_1 = k).
        transmat: `(k, k)`, p(z_{t+1} = j | z_t = i) in row i; or `(b, t - 1, k, k)`.
        lengths: `(b)`, the frames of each sequence; what follows may be anything.
        method: `auto`, or an engine: `compiled` (a CPU), `tensor` (torch, any device) or `log`.
        checkpoint_every: for `log` only: store the recursion at every so many frames, and compute
            the rest again in the backward pass, which autograd does here (also twice).

    Returns:
        `(b)`, or one number without the axis `b`.

    Raises:
        ValueError: a shape, length, probability or emission that cannot be.

    Source: Rabiner, "A Tutorial on Hidden Markov Models", 1989, section III.

    >>> emissions = torch.tensor([[0.9, 0.2], [0.1, 0.8]]).log()
    >>> move = torch.tensor([[0.7, 0.3], [0.4, 0.6]])
    >>> round(float(log_likelihood(emissions, torch.tensor([0.5, 0.5]), move).exp()), 4)
    0.1915
    """
    problem, batched = checked(log_emissions, startprob, transmat, lengths)
    if checkpoint_every is not None:
        if method != "log":
            raise ValueError(
                "checkpoint_every needs method='log': the other engines store nothing for the "
                "backward pass, they compute the posteriors in it"
            )
        result = log_engine.log_likelihood(problem, checkpoint_every)
    else:
        engine = _engine(method, problem)
        if engine is tensor_engine and torch.compiler.is_compiling():
            result = engine.log_likelihood(problem)
        else:
            result = _LogLikelihood.apply(*problem, engine)
    result = result.to(problem.log_emissions.dtype)
    return result if batched else result[0]


class _LogLikelihood(torch.autograd.Function):
    """The forward pass, with the smoother as its gradient."""

    @staticmethod
    def forward(ctx, log_emissions, startprob, transmat, lengths, engine):
        problem = Problem(log_emissions, startprob, transmat, lengths)
        ctx.save_for_backward(*problem)
        ctx.engine = engine
        return _run(engine, "log_likelihood", problem.detached())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        problem = Problem(*ctx.saved_tensors).detached()
        result = _run(ctx.engine, "smoothed", problem)
        wanted = gradient != 0
        _refuse_impossible(problem, torch.where(wanted.cpu(), result.log_likelihood.cpu(), 0.0))
        possible = wanted & (result.log_likelihood > -torch.inf)
        weight = torch.where(possible, gradient, 0).to(result.states)
        states = result.states * weight[:, None, None]
        shape = (-1,) + (1,) * (result.transitions.ndim - 1)
        transitions = result.transitions * weight.view(shape).to(result.transitions)
        return (
            states.to(problem.log_emissions.dtype),
            by_probability(states[:, 0], problem.startprob),
            by_probability(transitions, problem.transmat),
            None,
            None,
        )


def by_probability(counts: Tensor, probability: Tensor) -> Tensor:
    """Expected counts, of all sequences or each, divided by their probability; 0 at a hard zero."""
    counts = counts.to(probability)
    if counts.ndim > probability.ndim:
        counts = counts.sum(0)
    ratio = counts / torch.where(probability > 0, probability, 1)
    return ratio.clamp(max=torch.finfo(probability.dtype).max)


def posteriors(
    log_emissions: Tensor,
    startprob: Tensor,
    transmat: Tensor,
    lengths: Tensor | None = None,
    *,
    method: str = "auto",
) -> Posteriors:
    """The probability of each state in each frame, given the whole sequence (forward-backward).

    Args and errors: as `log_likelihood`. The results carry no gradient.

    Raises:
        ValueError: a sequence has probability 0; the first frame that no path reaches is named.
    """
    problem, batched = checked(log_emissions, startprob, transmat, lengths)
    problem = problem.detached()
    result = smooth(problem, method)
    transitions = result.transitions.sum(1) if problem.varies else result.transitions
    return _as_given(
        Posteriors(result.states, transitions, result.log_likelihood), problem, batched
    )


def smooth(problem: Problem, method: str = "auto") -> Smoothed:
    """The posteriors of a checked batch, with the log-likelihood in float64.

    Raises:
        ValueError: a sequence has probability 0.
    """
    result = _run(_engine(method, problem), "smoothed", problem)
    _refuse_impossible(problem, result.log_likelihood)
    return result


def filter(
    log_emissions: Tensor,
    startprob: Tensor,
    transmat: Tensor,
    lengths: Tensor | None = None,
    *,
    method: str = "auto",
) -> Filtered:
    """The probability of each state in each frame, given the frames so far.

    Args and errors: as `posteriors`.
    """
    problem, batched = checked(log_emissions, startprob, transmat, lengths)
    problem = problem.detached()
    likelihood, states = _run(_engine(method, problem), "filtered", problem)
    _refuse_impossible(problem, likelihood)
    return _as_given(Filtered(states, likelihood), problem, batched)


def viterbi(
    log_emissions: Tensor,
    startprob: Tensor,
    transmat: Tensor,
    lengths: Tensor | None = None,
    *,
    k: int = 1,
    method: str = "auto",
) -> Decoded:
    """The most probable path through the states, or the k best different ones.

    Args and errors: as `posteriors`. More than one path is always searched by the compiled engine.

    Source: Viterbi, 1967; Seshadri and Sundberg, "List Viterbi Decoding Algorithms", 1994.
    """
    problem, batched = checked(log_emissions, startprob, transmat, lengths)
    problem = problem.detached()
    if k < 1:
        raise ValueError(f"k is {k}, expected at least one path")
    engine = _engine(method, problem)
    if k == 1:
        states, scores = engine.viterbi(problem)
    else:
        states, scores = compiled_engine.best_paths(_on_cpu(problem), k)
    if not torch.compiler.is_compiling():
        _refuse_impossible(problem, scores if k == 1 else scores[:, 0])
    return _as_given(Decoded(states, scores), problem, batched)


def sample_paths(
    log_emissions: Tensor,
    startprob: Tensor,
    transmat: Tensor,
    lengths: Tensor | None = None,
    *,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Whole paths drawn from p(z_1 … z_T | x), by sampling backwards.

    Args and errors: as `posteriors`; `generator` is one of the CPU.

    Returns:
        `(b, num_samples, t)`, -1 in padding.
    """
    problem, batched = checked(log_emissions, startprob, transmat, lengths)
    problem = _on_cpu(problem.detached())
    _refuse_impossible(problem, compiled_engine.log_likelihood(problem))
    b, t, _ = problem.log_emissions.shape
    uniforms = torch.rand(b, num_samples, t, generator=generator, dtype=torch.float64)
    paths = compiled_engine.sample_paths(problem, uniforms).to(log_emissions.device)
    return paths if batched else paths[0]


# Engines ---------------------------------------------------------------------------------------


def _engine(method: str, problem: Problem) -> ModuleType:
    """The engine of a method; `auto` takes the compiled one on a CPU."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    on_cpu = problem.log_emissions.device.type == "cpu"
    if method == "compiled" and not on_cpu:
        raise ValueError(
            f"method='compiled' works on a CPU, log_emissions is on "
            f"{problem.log_emissions.device}: take 'auto' or 'tensor'"
        )
    if method == "log":
        return log_engine
    if method == "tensor" or torch.compiler.is_compiling() or not on_cpu:
        return tensor_engine
    return compiled_engine


def _run(engine: ModuleType, function: str, problem: Problem):
    """Call an engine; what scaling would get wrong goes through the log engine."""
    run = getattr(engine, function)
    if engine is not tensor_engine or torch.compiler.is_compiling():
        return run(problem)
    unsafe = _unsafe(problem)
    if not bool(unsafe.any()):
        return run(problem)
    by_logs = getattr(log_engine, function)
    if bool(unsafe.all()):
        return by_logs(problem)
    which = unsafe.nonzero()[:, 0]
    results, rest = run(problem), by_logs(problem.select(which))
    if isinstance(results, Tensor):
        results[which] = rest.to(results)
    else:
        replace_rows(results, which, rest)
    return results


def _unsafe(problem: Problem) -> Tensor:
    """Sequences `(b)` in which scaling could round away a state that matters."""
    emissions = problem.log_emissions
    smallest = compiled_engine.SAFE[emissions.dtype]
    tiny = problem.transmat < smallest
    tiny = tiny.flatten(1).any(1) if problem.varies else tiny.any()
    tops = emissions.amax(-1)
    there = inside(problem.lengths, emissions.shape[1], emissions.device)
    dead = ((tops == -torch.inf) & there).any(1)
    first = (problem.startprob * (emissions[:, 0] - tops[:, :1]).exp()).sum(-1)
    far = ~(first >= compiled_engine.SMALLEST_SCALE[emissions.dtype])
    return tiny | dead | far


def _on_cpu(problem: Problem) -> Problem:
    return Problem(*(tensor.cpu() for tensor in problem))


def _refuse_impossible(problem: Problem, log_likelihood: Tensor) -> None:
    """Refuse sequences of probability 0.

    Raises:
        ValueError: names the first of them, and the first frame that no path reaches.
    """
    impossible = (log_likelihood == -torch.inf).nonzero()
    if len(impossible):
        row = int(impossible[0])
        frame = compiled_engine.first_impossible_frame(_on_cpu(problem), row)
        raise ValueError(
            f"sequence {row} has probability 0: no path reaches frame {frame} with these "
            "startprob, transmat and log_emissions"
        )


def _as_given(results: NamedTuple, problem: Problem, batched: bool) -> NamedTuple:
    """Results in the dtype, on the device and with the axes of the input."""
    emissions = problem.log_emissions
    there = (
        tensor.to(emissions.device, emissions.dtype if tensor.is_floating_point() else None)
        for tensor in results
    )
    return type(results)(*(tensor if batched else tensor[0] for tensor in there))
