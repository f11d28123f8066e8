"""Hidden Markov models whose emissions, and if wanted transitions, come from networks.

Axis letters: `b` sequences, `t` frames, `k` states.

Notebook: 11_hmm
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tfswa_lab.sequence import inference
from tfswa_lab.sequence.emissions import set_distribution
from tfswa_lab.sequence.inference import Decoded, Posteriors
from tfswa_lab.sequence.inputs import as_batch, check_range, checked_lengths, inside


def scaled_likelihoods(log_posteriors: Tensor, priors: Tensor) -> Tensor:
    """Log emissions `(b, t, k)` of a classifier: log p(z | x_t) - log p(z), up to log p(x_t).

    Args:
        log_posteriors: `(…, k)`, log softmax of a network.
        priors: `(k)`, how often each state occurs in its training data.

    Raises:
        ValueError: a prior is not positive.

    Source: Bourlard and Morgan, "Connectionist Speech Recognition", 1994.
    """
    priors = torch.as_tensor(priors).to(log_posteriors)
    wrong = (~(priors > 0)).nonzero()
    if len(wrong):
        raise ValueError(
            f"the prior of state {int(wrong[0])} is {float(priors[wrong[0]]):.6g}: a state that "
            "never occurs in training has no scaled likelihood"
        )
    return log_posteriors - priors.log()


class NeuralHMM(nn.Module):
    """A network's outputs as emissions, trained by the exact likelihood.

    Args:
        network: maps `x` `(b, t, …)` to `(b, t, k)`: log emissions, or logits if `priors` is given.
        num_states: k.
        transitions: maps a context `(b, t - 1, …)` to logits `(b, t - 1, k, k)`; without it, one
            matrix is learned.
        priors: `(k)`; with it the network is a classifier, and its posteriors, divided by the
            priors, are the emissions.
    """

    def __init__(
        self,
        network: nn.Module,
        num_states: int,
        transitions: nn.Module | None = None,
        priors: Tensor | None = None,
    ):
        super().__init__()
        self.network, self.transitions = network, transitions
        self.startprob_logits = nn.Parameter(torch.full((num_states,), -math.log(num_states)))
        if transitions is None:
            self.transmat_logits = nn.Parameter(torch.zeros(num_states, num_states))
        self.register_buffer("priors", None if priors is None else torch.as_tensor(priors))

    @property
    def startprob(self) -> Tensor:
        """p(z_1) `(k)`."""
        return self.startprob_logits.softmax(-1)

    @startprob.setter
    def startprob(self, value: Tensor) -> None:
        set_distribution("startprob", self.startprob_logits, value)

    def transmat(self, context: Tensor | None = None) -> Tensor:
        """p(z_{t+1} | z_t): `(k, k)`, or `(b, t - 1, k, k)` from the context.

        Raises:
            ValueError: a context is missing, or not used.
        """
        if (context is None) != (self.transitions is None):
            raise ValueError(
                "the transitions come from a context, and none is given"
                if context is None
                else "a context is given, and this model has no network for transitions"
            )
        logits = self.transmat_logits if context is None else self.transitions(context)
        return logits.softmax(-1)

    def log_emissions(self, x: Tensor) -> Tensor:
        """What the network says of each frame, `(b, t, k)`."""
        outputs = self.network(x)
        k = len(self.startprob_logits)
        if outputs.shape[-1] != k or outputs.ndim not in (2, 3):
            raise ValueError(
                f"the network gives {tuple(outputs.shape)}, expected (sequences, frames, {k})"
            )
        if self.priors is None:
            return outputs
        return scaled_likelihoods(outputs.log_softmax(-1), self.priors)

    def score(
        self, x: Tensor, lengths: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """The log-likelihood of each sequence `(b)`, with gradients to all parameters."""
        return self._infer(inference.log_likelihood, x, lengths, context)

    def posteriors(
        self, x: Tensor, lengths: Tensor | None = None, context: Tensor | None = None
    ) -> Posteriors:
        """See `inference.posteriors`."""
        return self._infer(inference.posteriors, x, lengths, context)

    def viterbi(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        context: Tensor | None = None,
        *,
        k: int = 1,
    ) -> Decoded:
        """See `inference.viterbi`."""
        return self._infer(inference.viterbi, x, lengths, context, k=k)

    def _infer(self, function, x, lengths, context, **options):
        emissions = self.log_emissions(x)
        return function(emissions, self.startprob, self.transmat(context), lengths, **options)

    def log_posterior(
        self,
        x: Tensor,
        states: Tensor,
        lengths: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """log p(states | x) `(b)` of given paths `(b, t)`: the objective where labels are known.

        It needs no normalised emissions: what they lack cancels.

        Raises:
            ValueError: shapes that do not match, or a state that does not exist.
        """
        emissions, batched = as_batch(self.log_emissions(x))
        b, t, k = emissions.shape
        lengths = checked_lengths(lengths, b, t)
        there = inside(lengths, t, emissions.device)
        states = torch.as_tensor(states, device=emissions.device).view(-1, t)
        check_range("state", states, there, k)
        states = torch.where(there, states, 0)
        transmat = self.transmat(context)
        # The frames inside are picked before the sum: padding may hold NaN.
        seen = emissions.gather(2, states[..., None])[..., 0][there]
        rows = torch.arange(b, device=states.device)[:, None].expand(b, t)[there]
        path = self.startprob[states[:, 0]].log().index_add(0, rows, seen)
        steps = there[:, 1:]
        before, after = states[:, :-1][steps], states[:, 1:][steps]
        if transmat.ndim == 4:
            chances = transmat[steps][torch.arange(len(before)), before, after]
        else:
            chances = transmat[before, after]
        path = path.index_add(0, steps.nonzero()[:, 0], chances.log())
        whole = inference.log_likelihood(emissions, self.startprob, transmat, lengths)
        result = path - whole
        return result if batched else result[0]
