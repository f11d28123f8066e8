"""Laws of durations: any, Poisson, gamma, negative binomial, each normalised on its range.

Axis letters: `k` states, `d` durations; index d - 1 holds duration d.

Notebook: 11_hmm
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from tfswa_lab.sequence.inputs import check_sizes


class Durations(nn.Module):
    """Base class of a law p(duration) for each state, 0 outside `min_duration … max_duration`.

    Args:
        num_states: k.
        max_duration: d, the longest, in frames.
        min_duration: the shortest.

    Raises:
        ValueError: a size is no whole number from 1 on, or no duration is possible.
    """

    def __init__(self, num_states: int, max_duration: int, min_duration: int = 1):
        super().__init__()
        check_sizes(num_states=num_states, max_duration=max_duration, min_duration=min_duration)
        if min_duration > max_duration:
            raise ValueError(
                f"durations from {min_duration} to {max_duration} frames: expected "
                "1 ≤ min_duration ≤ max_duration"
            )
        self.num_states = num_states
        self.min_duration, self.max_duration = min_duration, max_duration
        self.numbers = nn.Parameter(self.start(max_duration - min_duration + 1))

    def start(self, size: int) -> Tensor:
        """Start values of `numbers` `(…, k)`, for so many durations."""
        raise NotImplementedError

    def log_weights(self, numbers: Tensor, over: Tensor) -> Tensor:
        """log p `(k, n)` up to a constant, for durations `over` `(n)` the shortest, from 0 on."""
        raise NotImplementedError

    @property
    def num_parameters(self) -> int:
        """Free parameters."""
        return self.numbers.numel()

    def forward(self) -> Tensor:
        """p(duration) `(k, d)`."""
        possible = self.log_weights(self.numbers, self._over(self.numbers)).softmax(-1)
        return nn.functional.pad(possible, (self.min_duration - 1, 0))

    def _over(self, like: Tensor) -> Tensor:
        return torch.arange(self.max_duration - self.min_duration + 1).to(like)

    def mean(self) -> Tensor:
        """The expected duration of each state `(k)`, in frames."""
        probabilities = self()
        return probabilities @ torch.arange(1, self.max_duration + 1).to(probabilities)

    @torch.no_grad()
    def fit(self, counts: Tensor) -> None:
        """Maximise Σ counts `(k, d)` · log p(duration); a state without counts keeps its law.

        Raises:
            ValueError: counts of a wrong shape, below 0 or not finite, or of durations below the
                shortest.
        """
        if counts.shape != (self.num_states, self.max_duration):
            raise ValueError(
                f"counts have shape {tuple(counts.shape)}, expected "
                f"({self.num_states}, {self.max_duration})"
            )
        wrong = ~((counts >= 0) & (counts < torch.inf))
        if bool(wrong.any()):
            place = wrong.nonzero()[0].tolist()
            raise ValueError(f"counts{place} is {counts[*place]}, expected a number from 0 on")
        if bool((counts[:, : self.min_duration - 1] > 0).any()):
            raise ValueError(f"there are counts below min_duration, {self.min_duration} frames")
        counts = counts[:, self.min_duration - 1 :].detach().cpu().double()
        for state in range(self.num_states):
            if float(counts[state].sum()) > 0:
                new = self._best(counts[state], self.numbers[..., state].cpu().double())
                self.numbers[..., state] = new.to(self.numbers)

    def _best(self, counts: Tensor, before: Tensor) -> Tensor:
        """The numbers of one state that fit its counts best, by L-BFGS; never worse than before."""
        over, share = self._over(counts), counts / counts.sum()

        def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
            numbers = torch.from_numpy(values).requires_grad_()
            with torch.enable_grad():
                logs = self.log_weights(numbers[:, None], over)[0].log_softmax(-1)
                total = -torch.where(share > 0, share * logs, 0).sum()
                (gradient,) = torch.autograd.grad(total, numbers)
            return float(total), gradient.numpy()

        bounds = [(-20.0, 20.0)] * len(before)  # logarithms; beyond, the law does not change
        exactly = {"ftol": 1e-15, "gtol": 1e-10}
        found = minimize(loss, before.numpy(), jac=True, bounds=bounds, options=exactly)
        return torch.from_numpy(found.x) if found.fun <= loss(before.numpy())[0] else before


class CategoricalDurations(Durations):
    """Any law: a probability for each duration."""

    @property
    def num_parameters(self) -> int:
        """Free parameters: one less than durations for each state, because they sum to one."""
        return self.num_states * (len(self.numbers) - 1)

    def start(self, size: int) -> Tensor:
        """All durations are as probable."""
        return torch.zeros(size, self.num_states)

    def log_weights(self, numbers: Tensor, over: Tensor) -> Tensor:
        """See `Durations.log_weights`."""
        return numbers.T

    def _best(self, counts: Tensor, before: Tensor) -> Tensor:
        return (counts / counts.sum()).log()


class PoissonDurations(Durations):
    """A Poisson law of the frames that a segment lasts longer than the shortest."""

    def start(self, size: int) -> Tensor:
        """The mean is a third of the range."""
        return torch.full((1, self.num_states), max(size / 3, 0.1)).log()

    def log_weights(self, numbers: Tensor, over: Tensor) -> Tensor:
        """See `Durations.log_weights`; the number is the logarithm of the rate."""
        return over * numbers[0][:, None] - torch.lgamma(over + 1)


class GammaDurations(Durations):
    """A gamma density of the duration in frames, read at whole numbers."""

    def start(self, size: int) -> Tensor:
        """The shape is 2, the mean a third of the longest."""
        rate = 2 / max(self.max_duration / 3, 1.0)
        return torch.tensor([2.0, rate]).log()[:, None].repeat(1, self.num_states)

    def log_weights(self, numbers: Tensor, over: Tensor) -> Tensor:
        """See `Durations.log_weights`; the numbers are the logarithms of shape and rate."""
        duration = over + self.min_duration
        shape, rate = numbers.exp()
        return (shape[:, None] - 1) * duration.log() - rate[:, None] * duration


class NegativeBinomialDurations(Durations):
    """A negative binomial law of the frames that a segment lasts longer than the shortest."""

    def start(self, size: int) -> Tensor:
        """Two successes, and a mean of a third of the range."""
        mean = max(size / 3, 0.1)
        numbers = torch.tensor([2.0, mean / 2]).log()
        return numbers[:, None].repeat(1, self.num_states)

    def log_weights(self, numbers: Tensor, over: Tensor) -> Tensor:
        """See `Durations.log_weights`; the numbers are log r and the log odds of going on."""
        r = numbers[0].exp()[:, None]
        go_on = nn.functional.logsigmoid(numbers[1])[:, None]
        return torch.lgamma(over + r) - torch.lgamma(r) - torch.lgamma(over + 1) + over * go_on


LAWS = {
    "categorical": CategoricalDurations,
    "poisson": PoissonDurations,
    "gamma": GammaDurations,
    "negative_binomial": NegativeBinomialDurations,
}
