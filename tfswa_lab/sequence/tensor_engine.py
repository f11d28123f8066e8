"""The tensor engine: blocks and a tree, in pure torch, for any device.

A loop over T frames costs a GPU T launches, and Python T calls. Here time is cut into blocks of
`S` steps. First, S steps multiply the matrices of all blocks at once. Then a tree of log₂ levels
combines the blocks, so that each knows what reaches its start. Last, S steps fill in the frames of
all blocks at once. Nothing depends on values, so that `torch.compile` and `torch.export` can trace.

Scaling is as in `compiled_engine.py`; `inference.py` hands what it would get wrong to the log
engine. With more than `MOST_STATES` states, the products cost more than they save, and there is
one block.

Axis letters: `b` sequences, `t` frames, `n` blocks, `s` steps of a block, `k` states (`i`, `j`).

Source: Hassan, Särkkä, García-Fernández, "Temporal Parallelization of Inference in Hidden Markov
Models", 2021.

Notebook: 11_hmm
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from tfswa_lab.sequence.compiled_engine import LOWEST
from tfswa_lab.sequence.inputs import Problem, Smoothed, inside

MOST_STATES = 16  # with which blocks are multiplied
NORMALISE_EVERY = 4  # steps


def log_likelihood(problem: Problem) -> Tensor:
    """log p(x) `(b)`, float64."""
    blocks = _Blocks(problem)
    if blocks.number == 1:
        return _Forward(blocks, None).log_likelihood
    return _starts(blocks, _products(blocks))[1]


def filtered(problem: Problem) -> tuple[Tensor, Tensor]:
    """log p(x) `(b)`, and p(z_t | x_1 … x_t) `(b, t, k)`."""
    blocks = _Blocks(problem)
    forward = _Forward(blocks, _products(blocks))
    return forward.log_likelihood, _distribution(forward.states) * blocks.there


def smoothed(problem: Problem) -> Smoothed:
    """The posteriors, and the expected transitions."""
    blocks = _Blocks(problem)
    products = _products(blocks)
    forward, later = _Forward(blocks, products), _backward(blocks, products)
    states = _distribution(forward.states * later) * blocks.there
    seen = blocks.emissions[:, 1:] * later[:, 1:]
    transmat = problem.transmat.to(seen.dtype)
    before = forward.states[:, :-1]
    after = (transmat @ seen[..., None])[..., 0] if problem.varies else seen @ transmat.mT
    total = (before * after).sum(-1, keepdim=True)
    share = torch.where(blocks.there[:, 1:] & (total > 0), before / total, 0)
    if problem.varies:
        counts = share[..., None] * transmat * seen[..., None, :]
    else:
        counts = (share.mT @ seen) * transmat
    return Smoothed(forward.log_likelihood, states, counts)


def viterbi(problem: Problem) -> tuple[Tensor, Tensor]:
    """The most probable states `(b, t)`, and log p(states, x) `(b)`."""
    scores = _best_scores(problem)
    there = inside(problem.lengths, scores.shape[1], scores.device)
    steps = problem.transmat.to(scores.dtype).log()
    origins = (scores[:, :-1, :, None] + steps).argmax(2)  # (b, t - 1, k), the best state before
    itself = torch.arange(scores.shape[-1], device=scores.device)
    origins = torch.where(there[:, 1:, None], origins, itself)
    path = _follow(origins, scores[:, -1].argmax(-1))
    return torch.where(there, path, -1), _path_score(problem, path, there)


# Blocks ----------------------------------------------------------------------------------------


class _Blocks:
    """A problem cut into blocks of steps; the step into frame t belongs to frame t."""

    def __init__(self, problem: Problem):
        logs = problem.log_emissions
        dtype = logs.dtype
        _, t, k = logs.shape
        valid = inside(problem.lengths, t, logs.device)
        self.there = valid[..., None]
        clean = torch.where(self.there, logs, 0)
        best = _top(clean)
        relative = (clean - best).clamp(min=LOWEST[dtype]).exp()
        self.emissions = torch.where(clean == -torch.inf, 0, relative)
        self.offset = best[..., 0].to(torch.float64).sum(-1)
        self.first = self.emissions[:, 0] * problem.startprob.to(dtype)
        self.frames = t
        self.number = 1 if k > MOST_STATES else -(-(t - 1) // _block_size(t)) or 1
        self.size = -(-(t - 1) // self.number) or 1
        self.seen = self.cut(self.emissions[:, 1:])
        self.valid = self.cut(self.there[:, 1:])
        transmat = problem.transmat.to(dtype)
        self.transmats = self.cut(transmat) if problem.varies else [transmat] * self.size

    def normalises_after(self, step: int) -> bool:
        """Whether what a step gives is scaled."""
        return (step + 1) % NORMALISE_EVERY == 0 or step + 1 == self.size

    def cut(self, steps: Tensor) -> Tensor:
        """From `(b, t - 1, …)` to `(s, b, n, …)`; what is missing at the end is 0."""
        missing = self.number * self.size - steps.shape[1]
        padded = pad(steps, (0, 0) * (steps.ndim - 2) + (0, missing))
        return padded.unflatten(1, (self.number, self.size)).movedim(2, 0)

    def joined(self, first: Tensor, steps: list[Tensor]) -> Tensor:
        """From the first frame `(b, k)` and all steps, s times `(b, n, k)`, to `(b, t, k)`."""
        rest = torch.stack(steps, 2).flatten(1, 2)[:, : self.frames - 1]
        return torch.cat([first[:, None], rest], 1)


def _block_size(frames: int) -> int:
    """Steps of a block: few operators for short sequences, little memory for long ones."""
    return max(16, math.isqrt(frames) // 2)


def _scaled(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (last axis) divided by their sum, and the sum's logarithm; rows of zeros stay."""
    total = matrix.sum(-1, keepdim=True)
    return matrix / total.clamp(min=torch.finfo(matrix.dtype).tiny), total[..., 0].log()


def _top(logs: Tensor) -> Tensor:
    """The largest along the last axis; finite where all is -inf, so that a difference is -inf."""
    return logs.amax(-1, keepdim=True).clamp(min=torch.finfo(logs.dtype).min)


def _distribution(states: Tensor) -> Tensor:
    """Rows that sum to one; rows of zeros stay."""
    return states / states.sum(-1, keepdim=True).clamp(min=torch.finfo(states.dtype).tiny)


class _Product(NamedTuple):
    """Products of steps: `rows` `(b, n, k, k)` sum to one, times exp(`logs`) `(b, n, k)`.

    `logs` are float64: they grow with T, and posteriors depend on differences between rows.
    """

    rows: Tensor
    logs: Tensor

    def then(self, other: _Product) -> _Product:
        """This product times the other."""
        weights, top = other.weights()
        rows, logs = _scaled((self.rows * weights[..., None, :]) @ other.rows)
        return _Product(rows, self.logs + top + logs)

    def weights(self) -> tuple[Tensor, Tensor]:
        """exp(`logs`) relative to the largest, in the dtype of the rows, and that log."""
        top = _top(self.logs)
        return (self.logs - top).exp().to(self.rows.dtype), top


def _products(blocks: _Blocks) -> _Product | None:
    """The product of the steps of each block; None if there is one block."""
    if blocks.number == 1:
        return None
    b, k = blocks.first.shape
    rows = torch.eye(k, dtype=blocks.first.dtype, device=blocks.first.device)
    rows = rows.expand(b, blocks.number, k, k)
    logs = torch.zeros(b, blocks.number, k, dtype=torch.float64, device=rows.device)
    for s in range(blocks.size):
        step = (rows @ blocks.transmats[s]) * blocks.seen[s][..., None, :]
        rows = torch.where(blocks.valid[s][..., None], step, rows)
        if blocks.normalises_after(s):
            rows, more = _scaled(rows)
            logs = logs + more
    return _Product(rows, logs)


def _combined(products: _Product, *, from_the_start: bool) -> _Product:
    """The product of all blocks up to each one, or from each one on, in log₂ levels."""
    distance = 1
    while distance < products.rows.shape[1]:
        whole = _Product(products.rows[:, :-distance], products.logs[:, :-distance]).then(
            _Product(products.rows[:, distance:], products.logs[:, distance:])
        )
        if from_the_start:
            parts = [(done[:, :distance], new) for done, new in zip(products, whole, strict=True)]
        else:
            parts = [(new, done[:, -distance:]) for done, new in zip(products, whole, strict=True)]
        products = _Product(*(torch.cat(pair, 1) for pair in parts))
        distance *= 2
    return products


def _starts(blocks: _Blocks, products: _Product | None) -> tuple[Tensor, Tensor]:
    """What reaches the start of each block `(b, n, k)`, and log p(x) `(b)`."""
    first, scale = _scaled(blocks.first)
    if products is None:
        return first[:, None], blocks.offset + scale  # the caller adds the steps
    prefix = _combined(products, from_the_start=True)
    weights, top = prefix.weights()
    ends, more = _scaled(((first[:, None] * weights)[..., None, :] @ prefix.rows)[..., 0, :])
    total = blocks.offset + top[:, -1, 0] + (scale + more[:, -1])
    return torch.cat([first[:, None], ends[:, :-1]], 1), total


class _Forward:
    """Filtered states `(b, t, k)` up to a factor for each frame, and log p(x)."""

    def __init__(self, blocks: _Blocks, products: _Product | None):
        now, self.log_likelihood = _starts(blocks, products)
        first, logs, steps = now[:, 0], 0.0, []
        for s in range(blocks.size):
            step = (now[..., None, :] @ blocks.transmats[s])[..., 0, :] * blocks.seen[s]
            now = torch.where(blocks.valid[s], step, now)
            if blocks.normalises_after(s):
                now, more = _scaled(now)
                logs = logs + more.double() if products is None else logs
            steps.append(now)
        self.states = blocks.joined(first, steps)
        if products is None:
            self.log_likelihood = self.log_likelihood + logs[:, 0]


def _backward(blocks: _Blocks, products: _Product | None) -> Tensor:
    """p(x_{t+1} … x_T | z_t) `(b, t, k)` up to a factor for each frame."""
    now = torch.ones_like(blocks.first)[:, None].expand(-1, blocks.number, -1)
    if products is not None:
        later = _combined(products, from_the_start=False).weights()[0]  # rows sum to one
        now = torch.cat([later[:, 1:], now[:, -1:]], 1)
    steps = []
    for s in range(blocks.size - 1, -1, -1):
        steps.append(now)
        seen = (blocks.seen[s] * now)[..., None, :]
        before = (seen @ blocks.transmats[s].mT)[..., 0, :]
        now = torch.where(blocks.valid[s], before, now)
        if s % NORMALISE_EVERY == 0:
            now = _distribution(now)
    return blocks.joined(now[:, 0], steps[::-1])


# The best path ---------------------------------------------------------------------------------


def _best_scores(problem: Problem) -> Tensor:
    """The score of the best path to each state `(b, t, k)`, in float64: nothing is scaled."""
    blocks = _Blocks(problem)
    logs = torch.where(blocks.there, problem.log_emissions, 0).to(torch.float64)
    seen = blocks.cut(logs[:, 1:])
    steps = [transmat.to(torch.float64).log() for transmat in blocks.transmats]
    first = problem.startprob.to(torch.float64).log() + logs[:, 0]
    now = first[:, None]
    if blocks.number > 1:
        prefix = _best_products(blocks, seen, steps)
        distance = 1
        while distance < blocks.number:
            whole = _best_step(prefix[:, :-distance], prefix[:, distance:])
            prefix = torch.cat([prefix[:, :distance], whole], 1)
            distance *= 2
        ends = (now[..., None] + prefix).amax(-2)
        now = torch.cat([now, ends[:, :-1]], 1)
    scores = []
    for s in range(blocks.size):
        step = (now[..., None] + steps[s]).amax(-2) + seen[s]
        now = torch.where(blocks.valid[s], step, now)
        scores.append(now)
    return blocks.joined(first, scores)


def _best_products(blocks: _Blocks, seen: Tensor, steps: list[Tensor]) -> Tensor:
    """The best score from each state before a block to each one at its end `(b, n, k, k)`."""
    b, k = blocks.first.shape
    scores = torch.eye(k, dtype=torch.float64, device=blocks.first.device).log()
    scores = scores.expand(b, blocks.number, k, k)
    for s in range(blocks.size):
        step = _best_step(scores, steps[s]) + seen[s][..., None, :]
        scores = torch.where(blocks.valid[s][..., None], step, scores)
    return scores


def _best_step(before: Tensor, step: Tensor) -> Tensor:
    """The matrix product in which sums are maxima, and products are sums."""
    return (before[..., None] + step[..., None, :, :]).amax(-2)


def _follow(origins: Tensor, last: Tensor) -> Tensor:
    """The path `(b, t)` that ends in `last` `(b)`: pointers are doubled, in log₂ levels."""
    distance = 1
    while distance < origins.shape[1]:
        further = origins[:, :-distance].gather(2, origins[:, distance:])
        origins = torch.cat([further, origins[:, -distance:]], 1)
        distance *= 2
    states = origins.gather(2, last[:, None, None].expand(-1, origins.shape[1], 1))[..., 0]
    return torch.cat([states, last[:, None]], 1)


def _path_score(problem: Problem, path: Tensor, there: Tensor) -> Tensor:
    """log p(path, x) `(b)`, in float64."""
    seen = torch.where(there[..., None], problem.log_emissions, 0).to(torch.float64)
    total = seen.gather(2, path[..., None])[..., 0].sum(-1)
    start = problem.startprob.to(torch.float64).log().expand(path.shape[0], -1)
    total = total + start.gather(1, path[:, :1])[:, 0]
    steps = problem.transmat.to(torch.float64).log()
    before, after = path[:, :-1], path[:, 1:]
    if problem.varies:
        rows = steps.gather(2, before[..., None, None].expand(-1, -1, 1, steps.shape[-1]))[:, :, 0]
        taken = rows.gather(2, after[..., None])[..., 0]
    else:
        taken = steps[before, after]
    return total + torch.where(there[:, 1:], taken, 0).sum(-1)
