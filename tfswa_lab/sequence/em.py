"""Expectation–maximisation: the loop, its settings and its history, for every model of this room.

Notebook: 11_hmm
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# What an objective may lose to rounding, relative to its size.
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-9}


@dataclass(frozen=True)
class EM:
    """How `fit` runs.

    Attributes:
        iterations: at most so many.
        tolerance: stop when an iteration gains less log-likelihood than this, all frames together.
        update: letters of what is estimated: `s` startprob, `t` transmat, `m` means, `c`
            covariances, `w` weights of mixtures, `e` symbols, `d` durations. The rest is frozen.
        variance_floor: no variance (eigenvalue of a covariance) is ever smaller.
        startprob_prior: Dirichlet parameter, a number or `(k)`; 1 is no prior.
        transmat_prior: the same for each row, a number, `(k)` or `(k, k)`.
        sticky: added to the diagonal of `transmat_prior`, for states that last.
        restarts: how many starts; the best one is kept.
        initialise: start from data (k-means++) instead of the model's parameters.
    """

    iterations: int = 100
    tolerance: float = 1e-2
    update: str = "stmcwed"
    variance_floor: float = 1e-3
    startprob_prior: float | Tensor = 1.0
    transmat_prior: float | Tensor = 1.0
    sticky: float = 0.0
    restarts: int = 1
    initialise: bool = True

    def __post_init__(self):
        if self.iterations < 1 or self.restarts < 1:
            raise ValueError(
                f"iterations is {self.iterations} and restarts {self.restarts}, expected 1 or more"
            )
        if not self.variance_floor > 0:
            raise ValueError(f"variance_floor is {self.variance_floor}, expected more than 0")
        if not set(self.update) <= set("stmcwed"):
            raise ValueError(f"update is {self.update!r}, expected letters of 'stmcwed'")
        for name in ("startprob_prior", "transmat_prior"):
            if not bool((torch.as_tensor(getattr(self, name)) >= 1).all()):
                raise ValueError(f"{name} is below 1: such a prior has no maximum to find")
        if self.sticky < 0:
            raise ValueError(f"sticky is {self.sticky}, expected 0 or more")


@dataclass(frozen=True)
class History:
    """What a fit did.

    Attributes:
        log_likelihoods: before each M step and after the last, all sequences together.
        converged: whether the gain fell below the tolerance.
        of_restarts: the last log-likelihood of each start.
    """

    log_likelihoods: list[float]
    converged: bool
    of_restarts: list[float]

    def __str__(self):
        first, last = self.log_likelihoods[0], self.log_likelihoods[-1]
        end = "converged" if self.converged else "not converged"
        return f"EM: {first:.6g} → {last:.6g} in {len(self.log_likelihoods) - 1} steps, {end}"


class Estimated(Protocol):
    """What a model needs so that it can be fitted."""

    def expect(self, x: Tensor, lengths: Tensor) -> tuple[float, object]:
        """The log-likelihood, and what `maximise` needs."""

    def maximise(self, x: Tensor, lengths: Tensor, expected: object, settings: EM) -> None:
        """The M step."""

    def log_prior(self, settings: EM) -> float:
        """The logarithm of the priors' density, up to a constant."""

    def start(self, x: Tensor, lengths: Tensor, settings: EM, seed: int) -> None:
        """Start values from data."""


@torch.no_grad()
def fit(model: Estimated, x: Tensor, lengths: Tensor, settings: EM, seed: int) -> History:
    """Fit a model to sequences; of several starts, the best is kept.

    Raises:
        ValueError: a sequence has probability 0.
        RuntimeError: the objective fell by more than rounding.
    """
    runs = []
    before = deepcopy(model.state_dict())
    try:
        for restart in range(settings.restarts):
            model.load_state_dict(before)
            if settings.initialise:
                model.start(x, lengths, settings, seed + restart)
            history, converged = _run(model, x, lengths, settings)
            runs.append((history, converged, deepcopy(model.state_dict())))
    except BaseException:
        model.load_state_dict(before)  # a fit that fails changes nothing
        raise
    history, converged, state = max(runs, key=lambda run: run[0][-1])
    model.load_state_dict(state)
    return History(history, converged, [run[0][-1] for run in runs])


def _run(model: Estimated, x: Tensor, lengths: Tensor, settings: EM) -> tuple[list[float], bool]:
    """One start: the log-likelihoods, and whether they converged."""
    if "c" in settings.update:
        model.emissions.lift(settings.variance_floor)
    dtype = next(model.parameters()).dtype
    history, converged, objective = [], False, None
    for iteration in range(settings.iterations + 1):
        likelihood, expected = model.expect(x, lengths)
        history.append(likelihood)
        before, objective = objective, likelihood + model.log_prior(settings)
        if before is not None:
            gain = objective - before
            if not gain >= -ROUNDING[dtype] * (1 + abs(objective)):
                raise RuntimeError(
                    f"EM lost {-gain:.3g} of its objective in step {iteration}, more than rounding "
                    f"explains: {before:.9g} → {objective:.9g}; in float32, try model.double()"
                )
            converged = gain < settings.tolerance
        if converged or iteration == settings.iterations:
            break
        model.maximise(x, lengths, expected, settings)
    return history, converged
