"""Losses: how far estimates are from their targets.

Every loss maps estimates and targets `(b, n, c, s)` to one value per item and stem, `(b, n)`.
Items are averaged last, so the loss of a batch is the mean of the losses of its equal parts: two
processes with half a batch each take the same step as one process with the whole batch.

All of them compute in float32, also under autocast: the square of a sample at −76 dB is zero in
float16, and in bfloat16 a difference 60 dB below its terms is only rounding.

Axis letters: `b` batch, `n` stems, `c` channels, `s` samples, `f` frequency bins, `t` frames.

Notebook: 07_training
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tfswa_lab.models.separator import check_stems
from tfswa_lab.stft import STFTProcessor, check_waveform

MOST_CHANNELS = 64  # more than any recording of several stems has; a spectrogram has more bins
SILENT_POWER = 1e-8  # mean square, 80 dB below full scale: less counts as silence


class StemLoss(nn.Module):
    """The base of all losses: it checks shapes and computes in float32 under any autocast.

    A subclass defines `per_stem`, from `(b, n, c, s)` twice to `(b, n)`.
    """

    def forward(self, estimates: Tensor, targets: Tensor) -> Tensor:
        """Losses `(b, n)` of estimates and targets, both `(b, n, c, s)`.

        Raises:
            ValueError: these are not waveforms of this form, of real numbers and equal shapes.
        """
        _check_waveforms(estimates, targets)
        with torch.autocast(estimates.device.type, enabled=False):
            return self.per_stem(_float32(estimates), _float32(targets))

    def extra_repr(self) -> str:
        """Its numbers, which a checkpoint stores to recognise its run."""
        numbers = {name: x for name, x in vars(self).items() if type(x) is float}
        return ", ".join(f"{name}={x}" for name, x in numbers.items())

    def per_stem(self, estimates: Tensor, targets: Tensor) -> Tensor:
        """Losses `(b, n)` in full precision."""
        raise NotImplementedError


def _check_waveforms(estimates: Tensor, targets: Tensor) -> None:
    """Refuse spectrograms, whole numbers, and shapes that broadcasting would silently combine."""
    check_waveform("estimates", estimates)
    check_waveform("targets", targets)
    if estimates.shape != targets.shape or estimates.ndim != 4 or not estimates.numel():
        raise ValueError(
            f"estimates {tuple(estimates.shape)} and targets {tuple(targets.shape)} must have "
            "the same shape (batch, stems, channels, samples), none of them zero"
        )
    if estimates.shape[2] > MOST_CHANNELS:
        raise ValueError(
            f"{tuple(estimates.shape)} would be waveforms of {estimates.shape[2]} channels; if "
            "these are magnitudes, pass waveforms: a loss makes its own spectrograms"
        )


def _float32(x: Tensor) -> Tensor:
    """Float64 stays, so that derivatives can be checked by finite differences."""
    return x if x.dtype == torch.float64 else x.float()


class L1WaveformLoss(StemLoss):
    """Mean absolute difference of the samples: the simplest loss that depends on the phase.

    >>> L1WaveformLoss()(torch.zeros(1, 2, 2, 100), torch.full((1, 2, 2, 100), 0.25))
    tensor([[0.2500, 0.2500]])
    """

    def per_stem(self, estimates: Tensor, targets: Tensor) -> Tensor:
        """Mean over channels and samples."""
        return (estimates - targets).abs().mean((2, 3))


class L1SpectrogramLoss(StemLoss):
    """Mean absolute difference of the magnitudes at one resolution; the phase is ignored.

    The magnitudes are those of `STFTProcessor`, not normalised: a full-scale tone has n_fft / 4
    in its bin. Signals shorter than the window are padded with zeros.

    Args:
        n_fft: window length in samples.
        hop_length: distance of two frames in samples.

    Raises:
        ValueError: `STFTProcessor` refuses the sizes.

    >>> tone = torch.sin(torch.arange(44_100) / 5).expand(1, 1, 2, -1)
    >>> bool(L1SpectrogramLoss()(-tone, tone) == 0)
    True
    """

    def __init__(self, n_fft: int = 2048, hop_length: int = 512):
        super().__init__()
        self.stft = STFTProcessor(n_fft, hop_length)

    def per_stem(self, estimates: Tensor, targets: Tensor) -> Tensor:
        """Mean over channels, bins and frames."""
        difference = _magnitude(self.stft(estimates)) - _magnitude(self.stft(targets))
        return difference.abs().mean((2, 3, 4))


def _magnitude(spectrogram: Tensor) -> Tensor:
    """Magnitudes `(b, n, c, t, f)` of a complex `(b, n, c, f, t)`.

    The derivative at an exact zero is 0, where that of the root of a power would be NaN. The last
    axes are swapped because they lie so in memory: on a CPU a quarter less time than `abs()`.
    """
    return torch.linalg.vector_norm(torch.view_as_real(spectrogram.mT), dim=-1)


class MultiResolutionSTFTLoss(StemLoss):
    """Differences of magnitudes and of their logarithms at several resolutions, without phase.

    One window cannot be sharp in time and in frequency: an artefact that one window smears is
    clear in another. For each window, the mean absolute differences of the magnitudes and of their
    natural logarithms are added; the result is the mean over the windows, each with 3/4 overlap.

    The derivative of the logarithm, 1/magnitude, is large in silence. Magnitudes below `floor` are
    therefore raised to it before the logarithm. At 0.1 (in a window of 1024, 68 dB below a
    full-scale tone) both parts have gradients of similar size on music; at 1e-4, which is 16-bit
    rounding noise, the logarithm's is about a thousand times larger, and most of it lies
    above 16 kHz (`benchmarks/losses.py`).

    Args:
        n_ffts: window lengths in samples.
        floor: magnitudes below it count as this large in the logarithm.
        log_weight: weight of the logarithmic part; 0 leaves the magnitudes.

    Raises:
        ValueError: there is no window, one that `STFTProcessor` refuses, a floor that is not
            positive, or a negative weight.

    Source: Yamamoto et al., "Parallel WaveGAN", ICASSP 2020, with the plain magnitudes in place of
    the spectral convergence, which divides by the target and so has no value for silence.
    """

    def __init__(
        self,
        n_ffts: Sequence[int] = (2048, 1024, 512),
        floor: float = 0.1,
        log_weight: float = 1.0,
    ):
        super().__init__()
        if not n_ffts:
            raise ValueError(f"n_ffts={n_ffts!r} is empty; name at least one window length")
        if not 0 < floor < math.inf:
            raise ValueError(f"floor={floor} must be a positive magnitude: log(0) is -inf")
        _check_weight("log_weight", log_weight)
        self.stfts = nn.ModuleList(STFTProcessor(n_fft, n_fft // 4) for n_fft in n_ffts)
        self.floor = floor
        self.log_weight = log_weight

    def per_stem(self, estimates: Tensor, targets: Tensor) -> Tensor:
        """Mean over channels, bins and frames, then over the windows."""
        return sum(self._one(stft, estimates, targets) for stft in self.stfts) / len(self.stfts)

    def _one(self, stft: STFTProcessor, estimates: Tensor, targets: Tensor) -> Tensor:
        estimates, targets = _magnitude(stft(estimates)), _magnitude(stft(targets))
        linear = (estimates - targets).abs().mean((2, 3, 4))
        logarithmic = (self._log(estimates) - self._log(targets)).abs().mean((2, 3, 4))
        return linear + self.log_weight * logarithmic

    def _log(self, magnitude: Tensor) -> Tensor:
        return magnitude.clamp(min=self.floor).log()


class SDRLoss(StemLoss):
    """Signal-to-distortion ratio in dB, negated, with a soft ceiling.

    With s the target and e the error, their powers taken over all channels and samples:
    −10 log₁₀(s² / (e² + τ s²)), where τ = 10^(−ceiling_db / 10). The gradient of the bare ratio
    grows without bound as an estimate gets good, so that the easiest stem of a batch would dominate
    the step; near the ceiling the gradient vanishes.

    `SILENT_POWER` is added on both sides of the fraction. So a silent target has a loss of 0 for
    a silent estimate, and a positive one, which falls with its level, for any other.

    Args:
        ceiling_db: the SDR that a perfect estimate is given; `math.inf` for the bare ratio.

    Raises:
        ValueError: the ceiling is NaN.

    Source: Wisdom et al., "Unsupervised sound separation using mixture invariant training",
    NeurIPS 2020 (the thresholded SNR).

    >>> stem = torch.sin(torch.arange(1000.0)).expand(1, 1, 2, -1)
    >>> round(SDRLoss(math.inf)(0.5 * stem, stem).item(), 2)  # e = s / 2
    -6.02
    """

    def __init__(self, ceiling_db: float = 30.0):
        super().__init__()
        if math.isnan(ceiling_db):
            raise ValueError("ceiling_db=nan is no ceiling; use math.inf for none")
        self.tau = 10 ** (-ceiling_db / 10)

    def per_stem(self, estimates: Tensor, targets: Tensor) -> Tensor:
        """One ratio per stem: channels count together, so that the panning counts."""
        signal, error = _power(targets), _power(estimates - targets)
        ratio = (signal + SILENT_POWER) / (error + self.tau * signal + SILENT_POWER)
        return -10 * ratio.log10()


class SISDRLoss(SDRLoss):
    """The same after the target has been scaled to fit the estimate: gain does not count.

    All channels share one gain. For very quiet estimates it changes the loss a little, because of
    `SILENT_POWER`: by 0.04 dB for an estimate at −30 dB and a ceiling of 30 dB.

    Source: Le Roux et al., "SDR – half-baked or well done?", ICASSP 2019 (without ceiling).

    >>> stem = torch.sin(torch.arange(1000.0)).expand(1, 1, 2, -1)
    >>> round(SISDRLoss(ceiling_db=20)(0.5 * stem, stem).item(), 2)  # no error, so the ceiling
    -20.0
    """

    def per_stem(self, estimates: Tensor, targets: Tensor) -> Tensor:
        """The projection of the estimate on its target, against the rest of the estimate."""
        # A silent target is left as it is: whatever the estimate holds is error.
        gain = (estimates * targets).mean((2, 3)) / _power(targets).clamp(min=SILENT_POWER)
        return super().per_stem(estimates, gain[..., None, None] * targets)


def _power(waveform: Tensor) -> Tensor:
    """Mean square `(b, n)` over channels and samples."""
    return waveform.square().mean((2, 3))


def _check_weight(name: str, weight: float) -> None:
    """Refuse a weight that would reward errors, or be NaN."""
    if not 0 <= weight < math.inf:
        raise ValueError(f"{name}={weight} must be a finite number, 0 or more")


class SourceSeparationLoss(nn.Module):
    """A weighted sum of the losses above, and each stem's part of it for the curves.

    A loss of weight 0 is not computed. Weights have to make up for units: for music estimated at
    10 dB, the norms of the gradients are about as 1 (waveform) : 23 (L1) : 40 (multi-resolution) :
    410 (SDR) : 430 (SI-SDR) (`benchmarks/losses.py`), so waveform_weight=23 weighs as l1_weight=1.

    Args:
        stems: names of the stems, in the order of the tensors.
        l1_weight: of `L1SpectrogramLoss`.
        mrstft_weight: of `MultiResolutionSTFTLoss`.
        waveform_weight: of `L1WaveformLoss`.
        sdr_weight: of `SDRLoss`, which is in dB.
        si_sdr_weight: of `SISDRLoss`, which is in dB.
        stem_weights: weight of each stem in its loss's mean, 1 for those not named.
        n_fft: window of `L1SpectrogramLoss`, in samples.
        hop_length: its hop, in samples.

    Raises:
        ValueError: a weight is negative or NaN, all are zero, or one names an unknown stem.

    >>> loss = SourceSeparationLoss(("vocals", "other"), mrstft_weight=0, waveform_weight=2)
    >>> total, terms = loss(torch.zeros(3, 2, 2, 9000), torch.full((3, 2, 2, 9000), 0.25))
    >>> [f"{name} {value.item():.2f}" for name, value in terms.items() if "waveform" in name]
    ['vocals/waveform 0.25', 'other/waveform 0.25', 'waveform 0.25']
    """

    def __init__(
        self,
        stems: Sequence[str],
        l1_weight: float = 1.0,
        mrstft_weight: float = 1.0,
        waveform_weight: float = 0.0,
        sdr_weight: float = 0.0,
        si_sdr_weight: float = 0.0,
        stem_weights: Mapping[str, float] | None = None,
        n_fft: int = 2048,
        hop_length: int = 512,
    ):
        super().__init__()
        self.stems = check_stems(stems)
        weighted = {
            "l1": (l1_weight, L1SpectrogramLoss(n_fft, hop_length)),
            "mrstft": (mrstft_weight, MultiResolutionSTFTLoss()),
            "waveform": (waveform_weight, L1WaveformLoss()),
            "sdr": (sdr_weight, SDRLoss()),
            "si_sdr": (si_sdr_weight, SISDRLoss()),
        }
        self.weights = _positive({name: weight for name, (weight, _) in weighted.items()}, "loss")
        self.losses = nn.ModuleDict({name: weighted[name][1] for name in self.weights})
        self.shares = self._shares(stem_weights or {})

    def extra_repr(self) -> str:
        """Weights of losses and stems, which a checkpoint stores to recognise its run."""
        return f"weights={self.weights}, shares={self.shares}"

    def _shares(self, stem_weights: Mapping[str, float]) -> dict[str, float]:
        """The weights of all stems, summing to 1."""
        unknown = set(stem_weights) - set(self.stems)
        if unknown:
            raise ValueError(f"stem_weights name {sorted(unknown)}, the stems are {self.stems}")
        weights = dict.fromkeys(self.stems, 1.0) | dict(stem_weights)
        total = sum(_positive(weights, "stem").values())
        return {stem: weights[stem] / total for stem in self.stems}

    def forward(self, estimates: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to step on, and its parts to log.

        Args:
            estimates: `(b, n, c, s)`.
            targets: `(b, n, c, s)`.

        Returns:
            The weighted sum, a scalar, and its parts before their weights, detached scalars:
            `"vocals/l1"`, … over the batch, and `"l1"`, …, the weighted mean of these.

        Raises:
            ValueError: these are not waveforms of this form, of real numbers, equal shapes and
                these stems.
        """
        _check_waveforms(estimates, targets)
        if estimates.shape[1] != len(self.stems):
            raise ValueError(f"{tuple(estimates.shape)} does not hold the stems {self.stems}")
        total, terms = 0.0, {}
        for name, loss in self.losses.items():
            per_stem = dict(zip(self.stems, loss(estimates, targets).mean(0), strict=True))
            mean = sum(self.shares[stem] * value for stem, value in per_stem.items())
            total = total + self.weights[name] * mean
            terms |= {f"{stem}/{name}": value.detach() for stem, value in per_stem.items()}
            terms[name] = mean.detach()
        return total, terms


def _positive(weights: Mapping[str, float], of: str) -> dict[str, float]:
    """The weights that are not zero, of which there must be one."""
    for name, weight in weights.items():
        _check_weight(f"the {of} weight of {name}", weight)
    positive = {name: weight for name, weight in weights.items() if weight > 0}
    if not positive:
        raise ValueError(
            f"the {of} weights {dict(weights)} are all zero; there is nothing to learn"
        )
    return positive
