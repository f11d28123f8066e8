"""The log engine: a loop over frames in log space, in float64, with torch. Slow and always right.

It runs on any device, and autograd goes through it, also twice. Forbidden steps are -inf; so that
they give no NaN in a gradient, sums of nothing but -inf are taken apart (`log_sum`).

Axis letters: `b` sequences, `t` frames, `k` states (`i` from, `j` to).

Notebook: 11_hmm
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tfswa_lab.sequence.inputs import Problem, Smoothed, inside


def log_likelihood(problem: Problem, checkpoint_every: int | None = None) -> Tensor:
    """log p(x) `(b)`.

    Args:
        problem: a checked batch.
        checkpoint_every: frames of a piece; of each piece, only the start is kept for the backward
            pass, and the rest is computed again. √T pieces keep about 2 √T frames at the peak.

    Raises:
        ValueError: a piece has no frames.
    """
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ValueError(f"checkpoint_every is {checkpoint_every}, expected 1 frame or more")
    frames = _Frames(problem)
    last = frames.start + frames.emissions[0]
    size = checkpoint_every or len(frames.emissions)
    for first in range(1, len(frames.emissions), size):
        stop = min(first + size, len(frames.emissions))
        inputs = (last, frames.emissions[first:stop], frames.steps(first, stop))
        valid = frames.valid[first:stop]
        if checkpoint_every is None:
            last = _advance(*inputs, valid)
        else:
            last = checkpoint(_advance, *inputs, valid, use_reentrant=False)
    return log_sum(last, -1)


def filtered(problem: Problem) -> tuple[Tensor, Tensor]:
    """log p(x) `(b)`, and p(z_t | x_1 … x_t) `(b, t, k)`."""
    frames = _Frames(problem)
    logs = _forward(frames)
    states = _normalised(logs).movedim(0, 1) * frames.valid.movedim(0, 1)
    return log_sum(logs[-1], -1), states


def smoothed(problem: Problem) -> Smoothed:
    """The posteriors, and the expected transitions."""
    frames = _Frames(problem)
    logs = _forward(frames)
    likelihood = log_sum(logs[-1], -1)
    size = len(logs)
    later = torch.zeros_like(logs[0])
    states, counts = [_normalised(logs[-1] + later)], []
    for t in range(size - 2, -1, -1):
        step = frames.steps(t + 1, t + 2)[0]
        seen = frames.emissions[t + 1] + later
        pairs = logs[t][:, :, None] + step + seen[:, None]
        there = frames.valid[t + 1]
        total = log_sum(pairs.flatten(1), -1)[:, None, None]
        known = there[..., None] & (total > -torch.inf)
        counts.append(torch.where(known, (pairs - total).exp(), 0))
        later = torch.where(there, log_sum(step + seen[:, None], -1), later)
        later = later - later.amax(-1, keepdim=True).clamp(min=-1e300)
        states.append(_normalised(logs[t] + later))
    gamma = torch.stack(states[::-1], 1) * frames.valid.movedim(0, 1)
    empty = gamma.new_zeros(len(gamma), 0, *problem.transmat.shape[-2:])
    transitions = torch.stack(counts[::-1], 1) if counts else empty
    return Smoothed(likelihood, gamma, transitions if problem.varies else transitions.sum(1))


def viterbi(problem: Problem) -> tuple[Tensor, Tensor]:
    """The most probable states `(b, t)`, and log p(states, x) `(b)`."""
    frames = _Frames(problem)
    score, origins = frames.start + frames.emissions[0], []
    for t in range(1, len(frames.emissions)):
        best, origin = (score[:, :, None] + frames.steps(t, t + 1)[0]).max(1)
        there = frames.valid[t]
        score = torch.where(there, best + frames.emissions[t], score)
        itself = torch.arange(score.shape[1], device=score.device)
        origins.append(torch.where(there, origin, itself))
    total, state = score.max(-1)
    path = [state]
    for origin in reversed(origins):
        path.append(origin.gather(1, path[-1][:, None])[:, 0])
    there = frames.valid[..., 0].T
    return torch.where(there, torch.stack(path[::-1], 1), -1), total


class _Frames:
    """A problem in log space, frames first, padding neutral."""

    def __init__(self, problem: Problem):
        emissions = problem.log_emissions
        there = inside(problem.lengths, emissions.shape[1], emissions.device)
        self.valid = there.T[..., None]  # (t, b, 1)
        clean = torch.where(there[..., None], emissions, 0)
        self.emissions = clean.to(torch.float64).movedim(1, 0)
        self.start = log_of(problem.startprob.to(torch.float64))
        self.start = self.start.expand(len(emissions), -1)
        logs = log_of(problem.transmat.to(torch.float64))
        self.transitions = logs.movedim(1, 0) if problem.varies else logs[None, None]

    def steps(self, first: int, stop: int) -> Tensor:
        """log transmat of the steps that lead to frames first … stop - 1, `(t, b or 1, k, k)`."""
        if len(self.transitions) == 1 and self.transitions.shape[1] == 1:
            return self.transitions.expand(stop - first, -1, -1, -1)
        return self.transitions[first - 1 : stop - 1]


def _advance(last: Tensor, emissions: Tensor, steps: Tensor, valid: Tensor) -> Tensor:
    """log p(z_t, x_1 … x_t) of a piece's last frame, from that of the frame before it."""
    for seen, step, there in zip(emissions, steps, valid, strict=True):
        last = torch.where(there, log_sum(last[:, :, None] + step, 1) + seen, last)
    return last


def _forward(frames: _Frames) -> Tensor:
    """log p(z_t, x_1 … x_t) of every frame `(t, b, k)`."""
    logs = [frames.start + frames.emissions[0]]
    for t in range(1, len(frames.emissions)):
        piece = slice(t, t + 1)
        logs.append(
            _advance(logs[-1], frames.emissions[piece], frames.steps(t, t + 1), frames.valid[piece])
        )
    return torch.stack(logs)


def log_sum(logs: Tensor, dim: int) -> Tensor:
    """log Σ exp, with gradients of 0 where all is -inf."""
    top = logs.detach().amax(dim, keepdim=True)
    top = torch.where(top == -torch.inf, 0, top)
    total = (logs - top).exp().sum(dim)
    return log_of(total) + top.squeeze(dim)


def log_of(probability: Tensor) -> Tensor:
    """The logarithm; -inf at 0, with a gradient of 0 there."""
    positive = probability > 0
    return torch.where(positive, torch.where(positive, probability, 1).log(), -torch.inf)


def _normalised(logs: Tensor) -> Tensor:
    """Probabilities along the last axis; zeros where all is -inf."""
    total = log_sum(logs, -1)[..., None]
    return torch.where(total > -torch.inf, (logs - total).exp(), 0)
