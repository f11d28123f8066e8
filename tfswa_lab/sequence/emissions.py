"""What a state emits: Gaussians, mixtures of Gaussians, symbols. Log densities and their M steps.

Axis letters: `b` sequences, `t` frames, `d` features, `k` states, `c` components, `v` symbols.

Notebook: 11_hmm
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from tfswa_lab.sequence import emission_kernels
from tfswa_lab.sequence.inputs import check_distributions, check_range, inside

COVARIANCE_TYPES = ("diag", "spherical", "full", "tied")
MOST_POINTS = 20_000  # that k-means looks at


class Emissions(nn.Module):
    """Base class: log densities of frames given states, and how they are estimated."""

    num_states: int
    num_parameters: int

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """log p(x_t | z_t = k) `(b, t, k)`; 0 where a frame is missing, anything in padding."""
        raise NotImplementedError

    def update(self, x: Tensor, lengths: Tensor, weights: Tensor, floor: float, parts: str) -> None:
        """The M step: maximise Σ weights `(b, t, k)` · log density; `parts` as in `EM.update`."""
        raise NotImplementedError

    def lift(self, floor: float) -> None:
        """Raise variances to the floor."""

    def initialise(self, x: Tensor, lengths: Tensor, floor: float, seed: int) -> None:
        """Start values from data."""
        raise NotImplementedError

    def sample(self, states: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw a frame for each state of `(…)`: `(…, d)`, or `(…)` symbols."""
        raise NotImplementedError


# Gaussians with diagonal covariance ------------------------------------------------------------


class Moments(NamedTuple):
    """Weighted sums of 1, x - mean and (x - mean)², each `(k, d)` in float64."""

    count: Tensor
    first: Tensor
    second: Tensor

    def mean(self, before: Tensor) -> Tensor:
        """New means; without weight, the mean before."""
        return before + self.first / torch.where(self.count > 0, self.count, 1)

    def variance(self, shift: Tensor) -> Tensor:
        """Variances around the mean before plus `shift`; NaN without weight."""
        return (self.second - 2 * shift * self.first + shift**2 * self.count) / self.count


class _DiagonalDensity(torch.autograd.Function):
    """log N(x; means, exp(log_variances)) by the compiled kernel; its gradient from the moments."""

    @staticmethod
    def forward(ctx, x, means, log_variances, lengths):
        ctx.save_for_backward(x, means, log_variances, lengths)
        b, t, _ = x.shape
        out = torch.empty(t, len(means), b, dtype=x.dtype)
        place = emission_kernels.log_density(
            _array(x),
            _array(means),
            _array((-log_variances).exp()),
            _array((log_variances + math.log(2 * math.pi)) / 2),
            lengths.numpy(),
            out.numpy(),
        )
        if place >= 0:
            raise ValueError(
                f"x is infinite in sequence {place // t}, frame {place % t}; "
                "a missing frame or feature is NaN"
            )
        return out.permute(2, 0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, means, log_variances, lengths = ctx.saved_tensors
        precision = (-log_variances).exp()
        sums = diagonal_moments(x, lengths, gradient, means)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = gradient @ (means * precision) - (gradient @ precision) * x
            there = inside(lengths, x.shape[1])[..., None] & ~x.isnan()
            to_x = torch.where(there, to_x, 0)
        return (
            to_x,
            (sums.first * precision).to(means.dtype),
            ((sums.second * precision - sums.count) / 2).to(means.dtype),
            None,
        )


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def diagonal_density(x: Tensor, means: Tensor, log_variances: Tensor, lengths: Tensor) -> Tensor:
    """log N(x; means, exp(log_variances)) `(b, t, k)`, missing features (NaN) left out.

    Args:
        x: `(b, t, d)`.
        means: `(k, d)`; `log_variances` as well.
        lengths: `(b)`, on the CPU.

    Raises:
        ValueError: a feature is infinite.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _DiagonalDensity.apply(x, means, log_variances, lengths)
    there = ~x.isnan() & inside(lengths, x.shape[1], x.device)[..., None]
    clean = torch.where(there, x, 0)
    half_logs = there.to(x.dtype) @ (log_variances + math.log(2 * math.pi)).T / 2
    distances = [
        (torch.where(there, clean - mean, 0) ** 2 @ (-log_variance).exp())
        for mean, log_variance in zip(means, log_variances, strict=True)
    ]
    return -torch.stack(distances, -1) / 2 - half_logs


def diagonal_moments(x: Tensor, lengths: Tensor, weights: Tensor, means: Tensor) -> Moments:
    """Weighted sums around `means` `(k, d)`; `weights` `(b, t, k)` may be negative."""
    sums = np.zeros((3, *means.shape))
    last = weights.detach().to("cpu", x.dtype).permute(1, 2, 0)
    emission_kernels.moments(
        _array(x.cpu()), _array(last), _array(means.cpu().to(x.dtype)), lengths.numpy(), *sums
    )
    return Moments(*torch.from_numpy(sums).to(means.device))


def _checked_features(x: Tensor, feature_dim: int, dtype: torch.dtype) -> Tensor:
    if x.ndim != 3 or x.shape[-1] != feature_dim or not x.is_floating_point():
        raise ValueError(
            f"x has shape {tuple(x.shape)} and dtype {x.dtype}, expected floats of shape "
            f"(sequences, frames, {feature_dim})"
        )
    return x.to(dtype)


class GaussianEmissions(Emissions):
    """One Gaussian for each state.

    Args:
        num_states: k.
        feature_dim: d.
        covariance_type: `diag` `(k, d)`, `spherical` `(k)`, `full` `(k, d, d)` or `tied` `(d, d)`.
    """

    def __init__(self, num_states: int, feature_dim: int, covariance_type: str = "diag"):
        super().__init__()
        if covariance_type not in COVARIANCE_TYPES:
            raise ValueError(
                f"covariance_type is {covariance_type!r}, expected one of {COVARIANCE_TYPES}"
            )
        self.num_states, self.feature_dim = num_states, feature_dim
        self.covariance_type = covariance_type
        self.means = nn.Parameter(torch.randn(num_states, feature_dim))
        shape = {
            "diag": (num_states, feature_dim),
            "spherical": (num_states,),
            "full": (num_states, feature_dim, feature_dim),
            "tied": (feature_dim, feature_dim),
        }[covariance_type]
        # Logarithms of variances, or a Cholesky factor with the logarithm of its diagonal.
        self.log_scale = nn.Parameter(torch.zeros(shape))

    @property
    def _by_feature(self) -> bool:
        return self.covariance_type in ("diag", "spherical")

    @property
    def num_parameters(self) -> int:
        """Free parameters: means and covariances."""
        k, d = self.means.shape
        triangle = d * (d + 1) // 2
        own = {"diag": k * d, "spherical": k, "full": k * triangle, "tied": triangle}
        return k * d + own[self.covariance_type]

    def _factor(self) -> Tensor:
        """The Cholesky factors `(k, d, d)` of full and tied covariances."""
        lower = self.log_scale.tril(-1) + torch.diag_embed(
            self.log_scale.diagonal(dim1=-2, dim2=-1).exp()
        )
        return lower.expand(self.num_states, -1, -1)

    @property
    def covariances(self) -> Tensor:
        """Variances or covariance matrices, in the shape of the covariance type."""
        if self._by_feature:
            return self.log_scale.exp()
        factor = self._factor()
        matrices = factor @ factor.mT
        return matrices[0] if self.covariance_type == "tied" else matrices

    @covariances.setter
    def covariances(self, value: Tensor) -> None:
        value = torch.as_tensor(value).to(self.log_scale)
        if value.shape != self.log_scale.shape:
            raise ValueError(
                f"covariances have shape {tuple(value.shape)}, expected "
                f"{tuple(self.log_scale.shape)} for covariance_type {self.covariance_type!r}"
            )
        with torch.no_grad():
            if self._by_feature:
                if not bool((value > 0).all()):
                    raise ValueError("a variance is not positive")
                self.log_scale.copy_(value.log())
            else:
                factor = torch.linalg.cholesky(value)
                logs = torch.diag_embed(factor.diagonal(dim1=-2, dim2=-1).log())
                self.log_scale.copy_(factor.tril(-1) + logs)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """See `Emissions.forward`. Single missing features need `diag` or `spherical`."""
        x = _checked_features(x, self.feature_dim, self.means.dtype)
        if self._by_feature:
            scale = self.log_scale
            logs = scale if scale.ndim == 2 else scale[:, None].expand_as(self.means)
            return diagonal_density(x, self.means, logs, lengths)
        x, there = self._whole_frames(x, lengths)
        factor = self._factor()
        logs = []
        for mean, lower in zip(self.means, factor, strict=True):
            distance = torch.linalg.solve_triangular(lower, (x - mean).mT, upper=False)
            logs.append(-(distance**2).sum(-2) / 2 - lower.diagonal().log().sum())
        density = torch.stack(logs, -1) - self.feature_dim * math.log(2 * math.pi) / 2
        return torch.where(there[..., None], density, 0)

    def _whole_frames(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Frames without gaps, 0 elsewhere, and where they are `(b, t)`."""
        valid = inside(lengths, x.shape[1], x.device)
        missing = x.isnan()
        partly = (missing.any(-1) & ~missing.all(-1) & valid).nonzero()
        if len(partly):
            b, t = partly[0].tolist()
            raise ValueError(
                f"sequence {b}, frame {t} has single missing features: covariance_type "
                f"{self.covariance_type!r} needs whole frames, take 'diag'"
            )
        infinite = (x.isinf().any(-1) & valid).nonzero()
        if len(infinite):
            b, t = infinite[0].tolist()
            raise ValueError(f"x is infinite in sequence {b}, frame {t}; a missing frame is NaN")
        there = valid & ~missing.any(-1)
        return torch.where(there[..., None], x, 0), there

    @torch.no_grad()
    def update(self, x: Tensor, lengths: Tensor, weights: Tensor, floor: float, parts: str) -> None:
        """See `Emissions.update`: `m` means, `c` covariances. Without weight nothing changes."""
        x = _checked_features(x, self.feature_dim, self.means.dtype)
        if not self._by_feature:
            self._update_matrices(x, lengths, weights, floor, parts)
            return
        sums = diagonal_moments(x, lengths, weights, self.means)
        update_diagonal(self.means, self.log_scale, sums, floor, parts)

    def _update_matrices(
        self, x: Tensor, lengths: Tensor, weights: Tensor, floor: float, parts: str
    ) -> None:
        x, there = self._whole_frames(x, lengths)
        weights = torch.where(there[..., None], weights, 0).double().flatten(0, 1)
        x = x.double().flatten(0, 1)
        count = weights.sum(0)
        safe = torch.where(count > 0, count, 1)[:, None]
        means = self.means.double()
        if "m" in parts:
            means = torch.where(count[:, None] > 0, weights.T @ x / safe, means)
        if "c" in parts:
            scatter = torch.stack(
                [
                    (x - mean).mT @ ((x - mean) * weight[:, None])
                    for mean, weight in zip(means, weights.T, strict=True)
                ]
            )
            if self.covariance_type == "tied":
                new = scatter.sum(0) / count.sum()
            else:
                old = self.covariances.double()
                new = torch.where(count[:, None, None] > 0, scatter / safe[..., None], old)
            self.covariances = _lifted(new, floor)
        self.means.copy_(means)

    @torch.no_grad()
    def lift(self, floor: float) -> None:
        """Raise variances, or eigenvalues of covariances, to the floor."""
        if self._by_feature:
            self.log_scale.clamp_(min=math.log(floor))
        else:
            self.covariances = _lifted(self.covariances.double(), floor)

    def initialise(self, x: Tensor, lengths: Tensor, floor: float, seed: int) -> None:
        """Means by k-means++, one covariance for all."""
        points = _whole_points(x, lengths)
        means = _centres(points, self.num_states, seed)
        variance = points.var(0).clamp(min=floor)
        value = {
            "diag": variance.expand(self.num_states, -1),
            "spherical": variance.mean().expand(self.num_states),
            "full": torch.diag(variance).expand(self.num_states, -1, -1),
            "tied": torch.diag(variance),
        }[self.covariance_type]
        self.covariances = value
        with torch.no_grad():
            self.means.copy_(means)

    @torch.no_grad()
    def sample(self, states: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Emissions.sample`."""
        noise = torch.randn(*states.shape, self.feature_dim, generator=generator).to(self.means)
        if self._by_feature:
            deviation = (self.log_scale / 2).exp()[states]
            return self.means[states] + noise * (
                deviation if deviation.ndim > states.ndim else deviation[..., None]
            )
        return self.means[states] + (self._factor()[states] @ noise[..., None])[..., 0]


def _lifted(matrices: Tensor, floor: float) -> Tensor:
    """Symmetric matrices with eigenvalues of at least `floor`."""
    values, vectors = torch.linalg.eigh((matrices + matrices.mT) / 2)
    # A margin for the rounding of the product, so that its eigenvalues do not fall below.
    return vectors * values.clamp(min=floor * (1 + 1e-9))[..., None, :] @ vectors.mT


def _whole_points(x: Tensor, lengths: Tensor) -> Tensor:
    """Frames without missing features, `(n, d)` in float64, at most `MOST_POINTS` evenly taken."""
    points = x[inside(lengths, x.shape[1], x.device)].detach().cpu().double()
    points = points[~points.isnan().any(-1)]
    if len(points) < 2:
        raise ValueError(
            f"{len(points)} frames without missing features are too few to start from: "
            "set the parameters and fit with initialise=False"
        )
    return points[:: max(1, len(points) // MOST_POINTS)]


def _centres(points: Tensor, number: int, seed: int) -> Tensor:
    """Centres `(number, d)` by k-means++; more than there are different points get noise."""
    different = len(torch.unique(points, dim=0))
    random = np.random.default_rng(seed)
    found, _ = kmeans2(
        points.numpy(), min(number, different), minit="++", rng=random, missing="warn"
    )
    centres = torch.from_numpy(found)
    extra = number - len(centres)
    if extra:
        noise = torch.from_numpy(random.standard_normal((extra, points.shape[1])))
        again = centres[torch.arange(extra) % len(centres)]
        centres = torch.cat([centres, again + noise * points.std(0).clamp(min=1e-3)])
    return centres


# Mixtures of Gaussians -------------------------------------------------------------------------


class MixtureEmissions(Emissions):
    """A mixture of Gaussians with diagonal covariance for each state.

    Args:
        num_states: k.
        num_components: c, Gaussians for each state.
        feature_dim: d.
    """

    def __init__(self, num_states: int, num_components: int, feature_dim: int):
        super().__init__()
        self.num_states, self.num_components = num_states, num_components
        self.feature_dim = feature_dim
        self.weight_logits = nn.Parameter(torch.zeros(num_states, num_components))
        self.means = nn.Parameter(torch.randn(num_states, num_components, feature_dim))
        self.log_variances = nn.Parameter(torch.zeros(num_states, num_components, feature_dim))

    @property
    def num_parameters(self) -> int:
        """Free parameters: weights, means and variances."""
        return 2 * self.means.numel() + self.num_states * (self.num_components - 1)

    @property
    def weights(self) -> Tensor:
        """Weights of the components `(k, c)`."""
        return self.weight_logits.softmax(-1)

    @weights.setter
    def weights(self, value: Tensor) -> None:
        set_distribution("weights", self.weight_logits, value)

    @property
    def covariances(self) -> Tensor:
        """Variances `(k, c, d)`."""
        return self.log_variances.exp()

    @covariances.setter
    def covariances(self, value: Tensor) -> None:
        with torch.no_grad():
            self.log_variances.copy_(torch.as_tensor(value).to(self.log_variances).log())

    def _components(self, x: Tensor, lengths: Tensor) -> Tensor:
        """log p(x_t, component | state) `(b, t, k, c)`."""
        x = _checked_features(x, self.feature_dim, self.means.dtype)
        flat = diagonal_density(
            x, self.means.flatten(0, 1), self.log_variances.flatten(0, 1), lengths
        )
        return flat.unflatten(-1, self.weight_logits.shape) + self.weight_logits.log_softmax(-1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """See `Emissions.forward`."""
        return _log_sum(self._components(x, lengths).unbind(-1))

    @torch.no_grad()
    def update(self, x: Tensor, lengths: Tensor, weights: Tensor, floor: float, parts: str) -> None:
        """See `Emissions.update`: `m` means, `c` variances, `w` weights of the components."""
        shares = weights[..., None] * self._components(x, lengths).softmax(-1)
        shares = torch.where(weights[..., None] > 0, shares, 0)
        x = _checked_features(x, self.feature_dim, self.means.dtype)
        means, logs = self.means.flatten(0, 1), self.log_variances.flatten(0, 1)
        sums = diagonal_moments(x, lengths, shares.flatten(-2), means)
        update_diagonal(means, logs, sums, floor, parts)
        if "w" in parts:
            count = shares.double().sum((0, 1))
            total = count.sum(-1, keepdim=True)
            new = (count / torch.where(total > 0, total, 1)).log()
            self.weight_logits.copy_(torch.where(total > 0, new, self.weight_logits.double()))

    @torch.no_grad()
    def lift(self, floor: float) -> None:
        """Raise variances to the floor."""
        self.log_variances.clamp_(min=math.log(floor))

    @torch.no_grad()
    def initialise(self, x: Tensor, lengths: Tensor, floor: float, seed: int) -> None:
        """Means of the states by k-means++, and again for the components inside each state."""
        points = _whole_points(x, lengths)
        centres = _centres(points, self.num_states, seed)
        nearest = torch.cdist(points, centres).argmin(1)
        for state in range(self.num_states):
            own = points[nearest == state]
            own = own if len(own) > 1 else points
            self.means[state].copy_(_centres(own, self.num_components, seed))
        self.log_variances.copy_(points.var(0).clamp(min=floor).log().expand_as(self.means))
        self.weight_logits.zero_()

    @torch.no_grad()
    def sample(self, states: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Emissions.sample`."""
        weights = self.weights[states].flatten(0, -2)
        component = weights.multinomial(1, generator=generator).view(states.shape)
        noise = torch.randn(*states.shape, self.feature_dim, generator=generator).to(self.means)
        return self.means[states, component] + noise * (
            (self.log_variances[states, component] / 2).exp()
        )


def _log_sum(parts: Sequence[Tensor]) -> Tensor:
    """log Σ exp(part), five times as fast as `logsumexp` over a short axis."""
    top = reduce(torch.maximum, parts).detach()
    top = torch.where(top > -torch.inf, top, 0)
    return sum((part - top).exp() for part in parts).log() + top


def update_diagonal(
    means: Tensor, log_variances: Tensor, sums: Moments, floor: float, parts: str
) -> None:
    """Write new means `(k, d)` and variances `(k, d)` or `(k)`; without weight, nothing changes."""
    before = means.double()
    new = sums.mean(before) if "m" in parts else before
    if "c" in parts:
        count, variance = sums.count, sums.variance(new - before)
        if log_variances.ndim < means.ndim:  # one variance for all features of a state
            variance = torch.where(count > 0, variance * count, 0).sum(-1)
            count = count.sum(-1)
            variance = variance / count
        logs = variance.clamp(min=floor).log()
        log_variances.copy_(torch.where(count > 0, logs, log_variances.double()))
    means.copy_(new)


# Symbols ---------------------------------------------------------------------------------------


class CategoricalEmissions(Emissions):
    """A distribution over symbols for each state.

    Args:
        num_states: k.
        num_symbols: v; symbols are whole numbers from 0 to v - 1.
    """

    def __init__(self, num_states: int, num_symbols: int):
        super().__init__()
        self.num_states, self.num_symbols = num_states, num_symbols
        self.emission_logits = nn.Parameter(torch.randn(num_states, num_symbols) / 10)

    @property
    def num_parameters(self) -> int:
        """Free parameters."""
        return self.num_states * (self.num_symbols - 1)

    @property
    def emissionprob(self) -> Tensor:
        """p(symbol | state) `(k, v)`."""
        return self.emission_logits.softmax(-1)

    @emissionprob.setter
    def emissionprob(self, value: Tensor) -> None:
        set_distribution("emissionprob", self.emission_logits, value)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """See `Emissions.forward`; `x` holds symbols `(b, t)`."""
        return self.emission_logits.log_softmax(-1).T[self._checked(x, lengths)]

    def _checked(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Symbols, 0 in padding."""
        if x.ndim != 2 or x.is_floating_point():
            raise ValueError(
                f"x has shape {tuple(x.shape)} and dtype {x.dtype}, expected whole numbers of "
                "shape (sequences, frames)"
            )
        valid = inside(lengths, x.shape[1], x.device)
        check_range("symbol", x, valid, self.num_symbols)
        return torch.where(valid, x, 0).long()

    @torch.no_grad()
    def update(self, x: Tensor, lengths: Tensor, weights: Tensor, floor: float, parts: str) -> None:
        """See `Emissions.update`: `e` the symbols' distributions."""
        if "e" not in parts:
            return
        count = torch.zeros(self.num_symbols, self.num_states, dtype=torch.float64)
        count = count.to(weights.device)
        symbols = self._checked(x, lengths)
        count.index_add_(0, symbols.flatten(), weights.double().flatten(0, 1))
        total = count.sum(0)[:, None]
        new = (count.T / torch.where(total > 0, total, 1)).log()
        self.emission_logits.copy_(torch.where(total > 0, new, self.emission_logits.double()))

    def initialise(self, x: Tensor, lengths: Tensor, floor: float, seed: int) -> None:
        """The frequencies of the symbols, each state disturbed at random."""
        symbols = self._checked(x, lengths)[inside(lengths, x.shape[1], x.device)]
        frequency = torch.bincount(symbols, minlength=self.num_symbols).double() + 1
        noise = torch.from_numpy(
            np.random.default_rng(seed).dirichlet(np.ones(self.num_symbols), self.num_states)
        )
        self.emissionprob = frequency.cpu() / frequency.sum().cpu() / 2 + noise / 2

    @torch.no_grad()
    def sample(self, states: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Emissions.sample`."""
        rows = self.emissionprob[states].flatten(0, -2)
        return rows.multinomial(1, generator=generator).view(states.shape)


def set_distribution(name: str, logits: Tensor, value: Tensor) -> None:
    """Write probabilities as their logarithms, after a check.

    Raises:
        ValueError: a wrong shape, or a row that is no distribution.
    """
    value = torch.as_tensor(value).detach().to(logits.device)
    if value.shape != logits.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(logits.shape)}")
    check_distributions(name, value)
    with torch.no_grad():
        logits.copy_(value.double().log())
