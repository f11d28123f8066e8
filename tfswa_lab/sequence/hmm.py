"""Hidden Markov models as modules: Gaussian, mixture of Gaussians, symbols.

All of them score, decode, smooth, sample and are fitted, by EM, by gradient or from labels. `x` is
`(b, t, d)` with `lengths` `(b)`, a single sequence `(t, d)`, or a list of sequences.
Axis letters: `b` sequences, `t` frames, `d` features, `k` states.

Notebook: 11_hmm
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tfswa_lab.sequence import em, inference
from tfswa_lab.sequence.em import EM, History
from tfswa_lab.sequence.emissions import (
    CategoricalEmissions,
    Emissions,
    GaussianEmissions,
    MixtureEmissions,
    set_distribution,
)
from tfswa_lab.sequence.inference import Decoded, Filtered, Posteriors
from tfswa_lab.sequence.inputs import check_range, check_sizes, checked, checked_lengths, inside
from tfswa_lab.sequence.padding import pad_sequences

# What other packages call our arguments.
OTHER_NAMES = {
    "n_components": "num_states",
    "n_states": "num_states",
    "states": "num_states",
    "obs_dim": "feature_dim",
    "observation_dim": "feature_dim",
    "n_features": "feature_dim",
    "input_dim": "feature_dim",
    "n_mix": "num_components",
    "num_mixtures": "num_components",
    "n_mixtures": "num_components",
    "num_observations": "num_symbols",
    "n_symbols": "num_symbols",
}
# Which letter of `EM.update` stands for which parameter of the emissions.
LETTERS = {
    "means": "m",
    "log_scale": "c",
    "log_variances": "c",
    "weight_logits": "w",
    "emission_logits": "e",
}


class Batch(NamedTuple):
    """Sequences as one padded tensor.

    Attributes:
        x: `(b, t, …)`.
        lengths: `(b)`, on the CPU.
        batched: whether they had a batch axis, or were a list.
    """

    x: Tensor
    lengths: Tensor
    batched: bool


class HMM(nn.Module):
    """A hidden Markov model with any emissions.

    Args:
        emissions: log densities of its frames.

    Attributes:
        startprob: `(k)`, can be set; hard zeros stay.
        transmat: `(k, k)`, row i holds p(z_{t+1} = j | z_t = i).
    """

    frame_axes = 1  # axes of a frame

    def __init__(self, emissions: Emissions):
        super().__init__()
        k = emissions.num_states
        self.emissions = emissions
        self.startprob_logits = nn.Parameter(torch.full((k,), -math.log(k)))
        self.transmat_logits = nn.Parameter(torch.full((k, k), -math.log(k)))

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(getattr(type(self), name, None), property):  # also for a Parameter
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @classmethod
    def refuse(cls, others: dict) -> None:
        """Refuse arguments that do not exist, and name the right one where it is known."""
        for name in others:
            right = OTHER_NAMES.get(name)
            hint = f": use {right}" if right else ""
            raise TypeError(f"{cls.__name__} has no argument {name!r}{hint}")

    @property
    def num_states(self) -> int:
        """The number of states."""
        return self.emissions.num_states

    @property
    def startprob(self) -> Tensor:
        """p(z_1) `(k)`."""
        return self.startprob_logits.softmax(-1)

    @startprob.setter
    def startprob(self, value: Tensor) -> None:
        set_distribution("startprob", self.startprob_logits, value)

    @property
    def transmat(self) -> Tensor:
        """p(z_{t+1} | z_t) `(k, k)`."""
        return self.transmat_logits.softmax(-1)

    @transmat.setter
    def transmat(self, value: Tensor) -> None:
        set_distribution("transmat", self.transmat_logits, value)

    # Inference -------------------------------------------------------------------------------

    def log_emissions(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """log p(x_t | z_t = k) `(b, t, k)`."""
        batch = self._batch(x, lengths)
        logs = self.emissions(batch.x, batch.lengths)
        return logs if batch.batched else logs[0]

    def score(self, x: Tensor, lengths: Tensor | None = None, *, method: str = "auto") -> Tensor:
        """The log-likelihood of each sequence `(b)`, with gradients to all parameters."""
        return self._infer(inference.log_likelihood, x, lengths, method=method)

    def posteriors(
        self, x: Tensor, lengths: Tensor | None = None, *, method: str = "auto"
    ) -> Posteriors:
        """See `inference.posteriors`."""
        return self._infer(inference.posteriors, x, lengths, method=method)

    def filter(self, x: Tensor, lengths: Tensor | None = None, *, method: str = "auto") -> Filtered:
        """See `inference.filter`."""
        return self._infer(inference.filter, x, lengths, method=method)

    def viterbi(
        self, x: Tensor, lengths: Tensor | None = None, *, k: int = 1, method: str = "auto"
    ) -> Decoded:
        """See `inference.viterbi`."""
        return self._infer(inference.viterbi, x, lengths, k=k, method=method)

    def sample_paths(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `inference.sample_paths`."""
        return self._infer(
            inference.sample_paths, x, lengths, num_samples=num_samples, generator=generator
        )

    def _infer(self, function, x, lengths, **options):
        batch = self._batch(x, lengths)
        logs = self.emissions(batch.x, batch.lengths)
        if not batch.batched:
            return function(logs[0], self.startprob, self.transmat, **options)
        return function(logs, self.startprob, self.transmat, batch.lengths, **options)

    @torch.no_grad()
    def sample(
        self, num_sequences: int, num_frames: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw sequences from the model: frames `(b, t, d)` and states `(b, t)`."""
        rows = self.startprob.expand(num_sequences, -1)
        states = []
        for _ in range(num_frames):
            states.append(rows.multinomial(1, generator=generator)[:, 0])
            rows = self.transmat[states[-1]]
        states = torch.stack(states, 1)
        return self.emissions.sample(states, generator), states

    def _batch(self, x: Tensor | Sequence[Tensor], lengths: Tensor | None) -> Batch:
        if isinstance(x, (list, tuple)):
            if lengths is not None:
                raise ValueError("x is a list of sequences, which have their lengths already")
            padded, lengths = pad_sequences(x)
            return Batch(padded, lengths, True)
        x = torch.as_tensor(x)
        batched = x.ndim >= self.frame_axes + 2
        x = x if batched else x[None]
        if x.ndim < 2 or 0 in x.shape[:2]:
            raise ValueError(f"x has shape {tuple(x.shape)}: it has no frames")
        return Batch(x, checked_lengths(lengths, x.shape[0], x.shape[1]), batched)

    # Estimation ------------------------------------------------------------------------------

    def fit(
        self,
        x: Tensor | Sequence[Tensor],
        lengths: Tensor | None = None,
        settings: EM | None = None,
        *,
        seed: int = 0,
    ) -> History:
        """Maximise the likelihood by EM (Baum–Welch), from k-means++ or from the parameters.

        A state, component or feature without visits keeps its parameters.

        Raises:
            ValueError: a sequence has probability 0.
            RuntimeError: the objective fell, which EM cannot do.

        Source: Baum et al., 1970; Dempster, Laird, Rubin, 1977.
        """
        batch = self._batch(x, lengths)
        return em.fit(self, batch.x, batch.lengths, settings or EM(), seed)

    def fit_by_gradient(
        self,
        x: Tensor | Sequence[Tensor],
        lengths: Tensor | None = None,
        *,
        steps: int = 200,
        learning_rate: float = 0.05,
    ) -> list[float]:
        """Maximise the likelihood by Adam; returns the log-likelihood before each step."""
        batch = self._batch(x, lengths)
        optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)
        frames = int(batch.lengths.sum())
        history = []
        for _ in range(steps):
            optimizer.zero_grad()
            likelihood = self.score(batch.x, batch.lengths).sum()
            (-likelihood / frames).backward()
            optimizer.step()
            history.append(float(likelihood.detach()))
        return history

    @torch.no_grad()
    def fit_labelled(
        self,
        x: Tensor | Sequence[Tensor],
        states: Tensor | Sequence[Tensor],
        lengths: Tensor | None = None,
        *,
        pseudo_count: float = 0.0,
        variance_floor: float = 1e-3,
    ) -> None:
        """Set the parameters from given states: counts, and moments of each state's frames.

        Args:
            x: sequences.
            states: `(b, t)` whole numbers, anything in padding; or a list.
            lengths: `(b)`.
            pseudo_count: added to each count of a start or a step.
            variance_floor: the smallest variance.

        Raises:
            ValueError: a state that does not exist, or shapes that do not match.
        """
        batch = self._batch(x, lengths)
        if isinstance(states, (list, tuple)):
            states = pad_sequences(states, padding=-1)[0]
        states = torch.as_tensor(states)
        states = states if batch.batched else states[None]
        valid = inside(batch.lengths, batch.x.shape[1])
        self._check_states(states, valid)
        chosen = torch.where(valid, states.cpu(), 0)
        weights = nn.functional.one_hot(chosen, self.num_states).double() * valid[..., None]
        starts = weights[:, 0].sum(0) + pseudo_count
        steps = weights[:, :-1].flatten(0, 1).T @ weights[:, 1:].flatten(0, 1) + pseudo_count
        set_from_counts(self.startprob_logits, starts)
        set_from_counts(self.transmat_logits, steps)
        weights = weights.to(self.startprob_logits)
        self.emissions.update(batch.x, batch.lengths, weights, variance_floor, "mcwe")

    def _check_states(self, states: Tensor, valid: Tensor) -> None:
        if states.shape != valid.shape or states.is_floating_point():
            raise ValueError(
                f"states have shape {tuple(states.shape)} and dtype {states.dtype}, expected "
                f"whole numbers of shape {tuple(valid.shape)}"
            )
        check_range("state", states.cpu(), valid, self.num_states)

    # What `em.fit` needs ---------------------------------------------------------------------

    def expect(self, x: Tensor, lengths: Tensor) -> tuple[float, object]:
        """The E step."""
        logs = self.emissions(x, lengths)
        problem, _ = checked(logs, self.startprob, self.transmat, lengths)
        expected = inference.smooth(problem)
        return float(expected.log_likelihood.sum()), expected

    def maximise(self, x: Tensor, lengths: Tensor, expected: object, settings: EM) -> None:
        """The M step."""
        starts = expected.states[:, 0].double().sum(0)
        steps = expected.transitions.double().sum(0)
        start_prior, step_prior = self._priors(settings)
        if "s" in settings.update:
            set_from_counts(self.startprob_logits, starts, start_prior - 1)
        if "t" in settings.update:
            set_from_counts(self.transmat_logits, steps, step_prior - 1)
        parts = settings.update
        self.emissions.update(x, lengths, expected.states, settings.variance_floor, parts)

    def log_prior(self, settings: EM) -> float:
        """The logarithm of the Dirichlet densities, up to a constant."""
        start_prior, step_prior = self._priors(settings)
        start = torch.xlogy(start_prior - 1, self.startprob.double()).sum()
        return float(start + torch.xlogy(step_prior - 1, self.transmat.double()).sum())

    def start(self, x: Tensor, lengths: Tensor, settings: EM, seed: int) -> None:
        """Start values: emissions from data; what is frozen is kept."""
        kept = {
            name: value.clone()
            for name, value in self.emissions.state_dict().items()
            if LETTERS[name] not in settings.update
        }
        self.emissions.initialise(x, lengths, settings.variance_floor, seed)
        self.emissions.load_state_dict(kept, strict=False)

    def _priors(self, settings: EM) -> tuple[Tensor, Tensor]:
        k, logits = self.num_states, self.transmat_logits
        eye = torch.eye(k, dtype=torch.float64, device=logits.device)
        start = torch.as_tensor(settings.startprob_prior, dtype=torch.float64).to(logits.device)
        steps = torch.as_tensor(settings.transmat_prior, dtype=torch.float64).to(logits.device)
        return start.expand(k), steps.expand(k, k) + settings.sticky * eye

    # Criteria --------------------------------------------------------------------------------

    @property
    def num_parameters(self) -> int:
        """Free parameters: start, transitions and emissions; hard zeros count as free."""
        k = self.num_states
        return (k - 1) + k * (k - 1) + self.emissions.num_parameters

    @torch.no_grad()
    def aic(self, x: Tensor | Sequence[Tensor], lengths: Tensor | None = None) -> float:
        """Akaike's criterion, the smaller the better."""
        return 2 * self.num_parameters - 2 * float(self.score(x, lengths).double().sum())

    @torch.no_grad()
    def bic(self, x: Tensor | Sequence[Tensor], lengths: Tensor | None = None) -> float:
        """Schwarz's criterion, the smaller the better; the data are all frames."""
        frames = int(self._batch(x, lengths).lengths.sum())
        fit = 2 * float(self.score(x, lengths).double().sum())
        return self.num_parameters * math.log(frames) - fit


def set_from_counts(logits: Tensor, counts: Tensor, extra: Tensor | float = 0.0) -> None:
    """Rows proportional to counts + extra; a row without counts keeps its probabilities.

    `extra` is not given to what is forbidden: a hard zero stays one.
    """
    allowed = logits > -torch.inf
    seen = counts.sum(-1, keepdim=True) > 0
    counts = counts + torch.where(allowed, torch.as_tensor(extra, device=counts.device), 0)
    rows = counts / torch.where(seen, counts.sum(-1, keepdim=True), 1)
    logits.copy_(torch.where(seen, rows.log(), logits.double()))


# The models ------------------------------------------------------------------------------------


class _GaussianStates(HMM):
    """What the models with Gaussians share: their means and covariances can be set."""

    @property
    def means(self) -> Tensor:
        """Means `(k, d)`; of a mixture `(k, c, d)`."""
        return self.emissions.means

    @means.setter
    def means(self, value: Tensor) -> None:
        _set("means", self.emissions.means, value)

    @property
    def covariances(self) -> Tensor:
        """Variances `(k, d)` or `(k)`, or matrices `(k, d, d)` or `(d, d)`, by covariance type.

        Of a mixture, variances `(k, c, d)`.
        """
        return self.emissions.covariances

    @covariances.setter
    def covariances(self, value: Tensor) -> None:
        self.emissions.covariances = value


class GaussianHMM(_GaussianStates):
    """An HMM whose states emit from one Gaussian each.

    Args:
        num_states: k.
        feature_dim: d.
        covariance_type: `diag` (missing features may be NaN), `spherical`, `full` or `tied`.

    >>> model = GaussianHMM(num_states=2, feature_dim=3)
    >>> model.score(torch.zeros(4, 10, 3)).shape
    torch.Size([4])
    """

    def __init__(
        self, num_states: int = 0, feature_dim: int = 0, covariance_type: str = "diag", **others
    ):
        self.refuse(others)
        check_sizes(num_states=num_states, feature_dim=feature_dim)
        super().__init__(GaussianEmissions(num_states, feature_dim, covariance_type))
        self.sizes = {
            "num_states": num_states,
            "feature_dim": feature_dim,
            "covariance_type": covariance_type,
        }


class MixtureGaussianHMM(_GaussianStates):
    """An HMM whose states emit from a mixture of Gaussians with diagonal covariance.

    Args:
        num_states: k.
        num_components: c, Gaussians for each state.
        feature_dim: d.
    """

    def __init__(
        self, num_states: int = 0, num_components: int = 0, feature_dim: int = 0, **others
    ):
        self.refuse(others)
        check_sizes(num_states=num_states, num_components=num_components, feature_dim=feature_dim)
        super().__init__(MixtureEmissions(num_states, num_components, feature_dim))
        self.sizes = {
            "num_states": num_states,
            "num_components": num_components,
            "feature_dim": feature_dim,
        }

    @property
    def weights(self) -> Tensor:
        """Weights of the components `(k, c)`."""
        return self.emissions.weights

    @weights.setter
    def weights(self, value: Tensor) -> None:
        self.emissions.weights = value


class CategoricalHMM(HMM):
    """An HMM whose states emit symbols; `x` holds whole numbers, `(b, t)`.

    Args:
        num_states: k.
        num_symbols: v.
    """

    frame_axes = 0

    def __init__(self, num_states: int = 0, num_symbols: int = 0, **others):
        self.refuse(others)
        check_sizes(num_states=num_states, num_symbols=num_symbols)
        super().__init__(CategoricalEmissions(num_states, num_symbols))
        self.sizes = {"num_states": num_states, "num_symbols": num_symbols}

    @property
    def emissionprob(self) -> Tensor:
        """p(symbol | state) `(k, v)`."""
        return self.emissions.emissionprob

    @emissionprob.setter
    def emissionprob(self, value: Tensor) -> None:
        self.emissions.emissionprob = value


def _set(name: str, parameter: Tensor, value: Tensor) -> None:
    value = torch.as_tensor(value).detach().to(parameter)
    if value.shape != parameter.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, expected {tuple(parameter.shape)}"
        )
    with torch.no_grad():
        parameter.copy_(value)
