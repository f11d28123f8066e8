"""Contenders of `hmm.py`: plain loops in torch, and hmmlearn, pomegranate and dynamax.

Each builder returns functions by task (`score`, `posteriors`, `Viterbi`, `EM step`) that compute
and return what `hmm.py` compares: all log-likelihoods added up, `(b, t, k)`, `(b, t)`, and the new
means `(k, d)`. Axis letters: `b` sequences, `t` frames, `k` states, `d` features.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tfswa_lab.sequence.exchange import to_hmmlearn
from tfswa_lab.sequence.hmm import GaussianHMM

Tasks = dict[str, Callable]


# Loops in torch --------------------------------------------------------------------------------


def loop_score(emissions: Tensor, start: Tensor, transmat: Tensor) -> Tensor:
    """The scaled forward loop `(b)`, a frame at a time."""
    best = emissions.amax(-1, keepdim=True)
    seen = (emissions - best).exp().movedim(1, 0).contiguous()
    now, total = start * seen[0], best[..., 0].sum(1)
    for t in range(len(seen)):
        now = now @ transmat * seen[t] if t else now
        scale = now.sum(-1, keepdim=True)
        now, total = now / scale, total + scale.log()[:, 0]
    return total


def loop_posteriors(emissions: Tensor, start: Tensor, transmat: Tensor) -> Tensor:
    """Forward and backward `(b, t, k)`, a frame at a time."""
    seen = (emissions - emissions.amax(-1, keepdim=True)).exp().movedim(1, 0).contiguous()
    filtered, scales, now = torch.empty_like(seen), [], start * seen[0]
    for t in range(len(seen)):
        now = now @ transmat * seen[t] if t else now
        scales.append(now.sum(-1, keepdim=True))
        now = filtered[t] = now / scales[t]
    later = torch.ones_like(now)
    for t in range(len(seen) - 2, -1, -1):
        later = (later * seen[t + 1]) @ transmat.T / scales[t + 1]
        filtered[t] *= later
    return (filtered / filtered.sum(-1, keepdim=True)).movedim(0, 1)


def loop_viterbi(emissions: Tensor, start: Tensor, transmat: Tensor) -> Tensor:
    """Max and gather `(b, t)`, a frame at a time."""
    steps, score, origins = transmat.log(), start.log() + emissions[:, 0], []
    for t in range(1, emissions.shape[1]):
        best, origin = (score[:, :, None] + steps).max(1)
        origins.append(origin)
        score = best + emissions[:, t]
    path = [score.argmax(-1)]
    for origin in reversed(origins):
        path.append(origin.gather(1, path[-1][:, None])[:, 0])
    return torch.stack(path[::-1], 1)


LOOPS = {"score": loop_score, "posteriors": loop_posteriors, "Viterbi": loop_viterbi}


class DurationLoop:
    """Explicit durations in log space: one reduction over all durations in each frame.

    Cumulated emissions make the sum over a segment a difference, so a frame is one operation on
    `(b, d, k)`, with `d` durations.
    """

    def __init__(self, emissions: Tensor, start: Tensor, transmat: Tensor, durations: Tensor):
        b, _, k = emissions.shape
        self.longest = durations.shape[1]
        self.before = torch.cat([emissions.new_zeros(b, 1, k), emissions.cumsum(1)], 1)
        self.start, self.steps = start.log(), transmat.log()
        self.laws = durations.log().flip(1).T  # (d, k), the longest first

    def entered(self) -> list[Tensor]:
        """Columns `(b, k)` of log p(a segment starts here) minus what was seen before."""
        b, _, k = self.before.shape
        never = self.before.new_full((b, k), -torch.inf)
        return [never] * (self.longest - 1) + [self.start.expand(b, k)]

    def score(self) -> Tensor:
        """The log-likelihood `(b)`."""
        columns = self.entered()
        for t in range(1, self.before.shape[1]):
            window = torch.stack(columns[-self.longest :], 1)
            ends = (window + self.laws).logsumexp(1) + self.before[:, t]
            entered = (ends[:, :, None] + self.steps).logsumexp(1)
            columns.append(entered - self.before[:, t])
        return ends.logsumexp(-1)

    def score_in_place(self) -> Tensor:
        """The same with one array that is written to, which is faster and has no gradient."""
        b, t_size, k = self.before.shape
        columns = self.before.new_full((b, t_size + self.longest, k), -torch.inf)
        columns[:, self.longest] = self.start
        for t in range(1, t_size):
            ends = (columns[:, t : t + self.longest] + self.laws).logsumexp(1) + self.before[:, t]
            entered = (ends[:, :, None] + self.steps).logsumexp(1)
            columns[:, self.longest + t] = entered - self.before[:, t]
        return ends.logsumexp(-1)

    def viterbi(self) -> Tensor:
        """The most probable states `(b, t)`."""
        b, t_size, k = self.before.shape
        columns = self.before.new_full((b, t_size + self.longest, k), -torch.inf)
        columns[:, self.longest] = self.start
        lengths, origins = ([None] * t_size for _ in range(2))
        for t in range(1, t_size):
            best, lengths[t] = (columns[:, t : t + self.longest] + self.laws).max(1)
            ends = best + self.before[:, t]
            entered, origins[t] = (ends[:, :, None] + self.steps).max(1)
            columns[:, self.longest + t] = entered - self.before[:, t]
        lengths, origins = torch.stack(lengths[1:]).numpy(), torch.stack(origins[1:]).numpy()
        path = np.empty((b, t_size - 1), np.int64)
        for row, state in enumerate(ends.argmax(-1).tolist()):
            t = t_size - 1
            while t > 0:
                duration = self.longest - lengths[t - 1, row, state]
                path[row, t - duration : t] = state
                t -= duration
                state = origins[t - 1, row, state]
        return torch.from_numpy(path)


def duration_loop_posteriors(emissions: Tensor, *model: Tensor) -> Tensor:
    """The gradient of the loop's score by autograd `(b, t, k)`."""
    emissions = emissions.detach().requires_grad_()
    with torch.enable_grad():
        total = DurationLoop(emissions, *model).score().sum()
    return torch.autograd.grad(total, emissions)[0]


def duration_loops(*given: Tensor) -> Tasks:
    """The loops by task; `given` is emissions, start, transmat and durations."""
    return {
        "score": lambda: DurationLoop(*given).score_in_place(),
        "posteriors": partial(duration_loop_posteriors, *given),
        "Viterbi": lambda: DurationLoop(*given).viterbi(),
    }


# From features ---------------------------------------------------------------------------------


def hmmlearn_model(model: GaussianHMM, x: Tensor, implementation: str) -> Tasks:
    """hmmlearn, float64; it takes all sequences one behind the other."""
    peer = to_hmmlearn(model)
    peer.set_params(implementation=implementation, n_iter=1, init_params="", covars_prior=0)
    rows, lengths = x.flatten(0, 1).double().numpy(), [x.shape[1]] * len(x)
    shape = x.shape[:2]
    return {
        "score": lambda: peer.score(rows, lengths),
        "posteriors": lambda: peer.predict_proba(rows, lengths).reshape(*shape, -1),
        "Viterbi": lambda: peer.predict(rows, lengths).reshape(shape),
        "EM step": lambda: deepcopy(peer).fit(rows, lengths).means_,
    }


def pomegranate_model(model: GaussianHMM, x: Tensor) -> Tasks:
    """pomegranate, float32; a path may end in any state."""
    from pomegranate.distributions import Normal
    from pomegranate.hmm import DenseHMM

    pairs = zip(model.means.detach(), model.covariances.detach(), strict=True)
    laws = [Normal(mean, variance, covariance_type="diag") for mean, variance in pairs]
    ends = torch.ones(model.num_states)
    peer = DenseHMM(laws, model.transmat.detach(), model.startprob.detach(), ends)

    def em_step():
        new = deepcopy(peer)
        new.summarize(x)
        new.from_summaries()
        return torch.stack([law.means for law in new.distributions])

    return {
        "score": lambda: peer.log_probability(x).sum(),
        "posteriors": lambda: peer.predict_proba(x),
        "Viterbi": lambda: peer.viterbi(x),
        "EM step": em_step,
    }


def dynamax_model(model: GaussianHMM, x: Tensor) -> Tasks:
    """dynamax, float32, jitted, with emissions and moments as matrix products of our own."""
    import jax
    import jax.numpy as jnp
    from dynamax.hidden_markov_model import hmm_smoother

    precision, mean = 1 / model.covariances.detach(), model.means.detach()
    weights = jnp.asarray(torch.cat([precision, -2 * mean * precision], 1).numpy().T)
    constant = (mean**2 * precision).sum(1) + (2 * torch.pi / precision).log().sum(1)
    constant = jnp.asarray(constant.numpy())
    start, move = (jnp.asarray(p.detach().numpy()) for p in (model.startprob, model.transmat))
    data = jnp.asarray(x.numpy())

    def both(x):
        return jnp.concatenate([x * x, x], -1)

    def emissions(x):
        return -(both(x) @ weights + constant) / 2

    def em_step(x):
        found = jax.vmap(lambda log: hmm_smoother(start, move, log))(emissions(x))
        states = found.smoothed_probs
        moments = jnp.einsum("btk,btd->kd", states, both(x)) / states.sum((0, 1))[:, None]
        squares, means = jnp.split(moments, 2, axis=1)
        steps = found.trans_probs.sum(0)
        return means, squares - means**2, steps / steps.sum(1, keepdims=True), states[:, 0].mean(0)

    recursions = dynamax_recursions(start, move)
    jitted = {
        name: jax.jit(lambda x, run=run: run(emissions(x))) for name, run in recursions.items()
    }
    jitted["EM step"] = jax.jit(em_step)
    tasks = {name: partial(_finished, run, data) for name, run in jitted.items()}
    return tasks | {
        "score": lambda: np.asarray(tasks["score"]()).sum(dtype=np.float64),
        "EM step": lambda: tasks["EM step"]()[0],
    }


def _finished(run: Callable, data: object) -> object:
    """A result of jax, waited for."""
    import jax

    return jax.block_until_ready(run(data))


def dynamax_recursions(start: object, move: object) -> Tasks:
    """Functions of log emissions `(b, t, k)`, not jitted."""
    import jax
    from dynamax.hidden_markov_model import hmm_filter, hmm_posterior_mode, hmm_smoother

    functions = {
        "score": lambda log: hmm_filter(start, move, log).marginal_loglik,
        "posteriors": lambda log: hmm_smoother(start, move, log).smoothed_probs,
        "Viterbi": lambda log: hmm_posterior_mode(start, move, log),
    }
    return {name: jax.vmap(function) for name, function in functions.items()}


# From log emissions ----------------------------------------------------------------------------


def dynamax_kernels(emissions: Tensor, start: Tensor, move: Tensor) -> Tasks:
    """dynamax, jitted, float32."""
    import jax
    import jax.numpy as jnp

    logs, start, move = (jnp.asarray(array.numpy()) for array in (emissions, start, move))
    recursions = dynamax_recursions(start, move)
    return {name: partial(_finished, jax.jit(run), logs) for name, run in recursions.items()}


def hmmlearn_kernels(emissions: Tensor, start: Tensor, move: Tensor) -> Tasks:
    """hmmlearn's compiled recursions, float64, one sequence after the other."""
    from hmmlearn import _hmmc

    logs, start, move = (array.double().numpy() for array in (emissions, start, move))

    def posteriors(log):
        seen = np.exp(log)
        _, forward, scale = _hmmc.forward_scaling(start, move, seen)
        both = forward * _hmmc.backward_scaling(start, move, seen, scale)
        return both / both.sum(1, keepdims=True)

    def score():
        return np.array([_hmmc.forward_scaling(start, move, np.exp(log))[0] for log in logs])

    return {
        "score": score,
        "posteriors": lambda: np.stack([posteriors(log) for log in logs]),
        "Viterbi": lambda: np.stack([_hmmc.viterbi(start, move, log)[1] for log in logs]),
    }


MODELS = {  # by name: the package, and its tasks from features
    "hmmlearn, scaling": ("hmmlearn", partial(hmmlearn_model, implementation="scaling")),
    "hmmlearn, log": ("hmmlearn", partial(hmmlearn_model, implementation="log")),
    "pomegranate": ("pomegranate", pomegranate_model),
    "dynamax": ("dynamax", dynamax_model),
}
KERNELS = {
    "dynamax": ("dynamax", dynamax_kernels),
    "hmmlearn's kernels": ("hmmlearn", hmmlearn_kernels),
}
