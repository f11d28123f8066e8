"""All paths of a small hidden Markov model, one by one, in float64."""

import itertools
from typing import NamedTuple

import torch


class Enumerated(NamedTuple):
    """What follows from all paths of one sequence."""

    log_likelihood: torch.Tensor
    states: torch.Tensor  # (t, k)
    transitions: torch.Tensor  # (k, k)
    filtered: torch.Tensor  # (t, k)
    scores: list  # of all possible paths, best first
    paths: list
    probabilities: torch.Tensor  # of the paths, given the frames


def enumerate_paths(log_emissions, startprob, transmat):
    """`(t, k)`, `(k)`, and `(k, k)` or `(t - 1, k, k)`; None if no path is possible."""
    emissions, start = log_emissions.double(), startprob.double().log()
    frames, states = emissions.shape
    steps = transmat.double().log()
    if steps.ndim == 2:
        steps = steps.expand(frames - 1, states, states)
    scored = []
    for path in itertools.product(range(states), repeat=frames):
        score = start[path[0]] + emissions[0, path[0]]
        for t in range(1, frames):
            score = score + steps[t - 1, path[t - 1], path[t]] + emissions[t, path[t]]
        if score > -torch.inf:
            scored.append((float(score), path))
    if not scored:
        return None
    scored.sort(key=lambda pair: (-pair[0], pair[1]))
    scores = torch.tensor([score for score, _ in scored], dtype=torch.float64)
    paths = [path for _, path in scored]
    total = scores.logsumexp(0)
    probabilities = (scores - total).exp()
    posterior = torch.zeros(frames, states, dtype=torch.float64)
    transitions = torch.zeros(states, states, dtype=torch.float64)
    for path, probability in zip(paths, probabilities, strict=True):
        for t in range(frames):
            posterior[t, path[t]] += probability
            if t:
                transitions[path[t - 1], path[t]] += probability
    return Enumerated(
        total,
        posterior,
        transitions,
        _filtered(emissions, start, steps),
        scores,
        paths,
        probabilities,
    )


def _filtered(emissions, start, steps):
    rows, now = [], start + emissions[0]
    for t in range(len(emissions)):
        if t:
            now = (now[:, None] + steps[t - 1]).logsumexp(0) + emissions[t]
        rows.append(now.softmax(0))
    return torch.stack(rows)


def random_problem(seed, dtype=torch.float64, varies=False, spread=1.0, batch=4):
    """A batch with zeros in a third of all entries, unequal lengths and NaN in the padding."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    states, frames = int(2 + 3 * rand(1)), int(1 + 6 * rand(1))
    shape = (batch, frames - 1, states, states) if varies else (states, states)
    transmat = rand(*shape) * (rand(*shape) > 1 / 3)
    transmat = torch.where(transmat.sum(-1, keepdim=True) > 0, transmat, 1.0)
    startprob = rand(states) * (rand(states) > 1 / 3)
    startprob[0] += 0.1
    emissions = spread * torch.randn(batch, frames, states, generator=generator).double()
    emissions[rand(batch, frames, states) < 0.1] = -torch.inf
    lengths = (1 + rand(batch) * frames).long()
    for row, length in enumerate(lengths.tolist()):
        emissions[row, length:] = torch.nan
    return (
        emissions.to(dtype),
        (startprob / startprob.sum()).to(dtype),
        (transmat / transmat.sum(-1, keepdim=True)).to(dtype),
        lengths,
    )
