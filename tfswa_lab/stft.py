"""From waveforms to spectrograms and back, and the scaling of a network's input.

Axis letters: `b` batch, `c` channels, `s` samples, `f` frequency bins, `t` frames. `torch.stft`
gives `(…, f, t)`, the models take `(b, c, t, f)`: `to_magnitudes`, `to_model_input` and
`from_model_output` transpose.

Notebook: 01_sound_to_spectrogram
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def check_waveform(name: str, waveform: Tensor) -> None:
    """Refuse complex and whole numbers, which would lose their imaginary part or their scale.

    Raises:
        ValueError: names the type and what to pass.
    """
    if waveform.is_complex():
        raise ValueError(
            f"{name}: {waveform.dtype} is a spectrogram's type; pass the waveform, "
            "STFTProcessor.istft(spectrogram, length)"
        )
    if not waveform.is_floating_point():
        raise ValueError(
            f"{name}: {waveform.dtype} holds no samples in [-1, 1]; convert it to float32 and "
            "divide by full scale, 32768 for int16"
        )


class STFTProcessor(nn.Module):
    """Short-time Fourier transform with an exact inverse, over any leading dimensions.

    Frames are centred and the ends padded with zeros (not mirrored: mirroring needs more than
    `n_fft // 2` samples), so a signal of `s` samples has `1 + s // hop_length` frames for any
    `s >= 1`.

    Args:
        n_fft: window length in samples; `n_fft // 2 + 1` frequency bins.
        hop_length: distance between two frames in samples, at most `n_fft // 3`.

    Raises:
        ValueError: `n_fft` is odd, or the hop is so large that windows hardly cover some samples.

    Source: Griffin & Lim, "Signal estimation from modified short-time Fourier transform",
    IEEE TASSP 1984, eq. 6 (the inverse).

    >>> stft = STFTProcessor(n_fft=2048, hop_length=512)
    >>> stft(torch.zeros(2, 2, 44_100)).shape
    torch.Size([2, 2, 1025, 87])
    """

    def __init__(self, n_fft: int = 2048, hop_length: int = 512):
        super().__init__()
        if n_fft % 2:
            raise ValueError(f"n_fft={n_fft} must be even: the inverse assumes n_fft // 2 + 1 bins")
        if not 0 < hop_length <= n_fft // 3:
            raise ValueError(
                f"hop_length={hop_length} must lie between 1 and n_fft // 3 = {n_fft // 3}: "
                "with a longer hop, only the faded edge of a window covers the last samples"
            )
        self.n_fft = n_fft
        self.hop_length = hop_length

    def extra_repr(self) -> str:
        """Its sizes, as torch's layers show them."""
        return f"n_fft={self.n_fft}, hop_length={self.hop_length}"

    def forward(self, waveform: Tensor) -> Tensor:
        """Calling the processor is `stft`."""
        return self.stft(waveform)

    def stft(self, waveform: Tensor) -> Tensor:
        """Waveform `(…, s)` to complex spectrogram `(…, f, t)`.

        Raises:
            ValueError: the waveform is empty, complex or of whole numbers.
        """
        check_waveform("the input of stft", waveform)
        if waveform.shape[-1] == 0:
            raise ValueError(f"a waveform needs at least one sample, got {tuple(waveform.shape)}")
        spectrogram = torch.stft(
            waveform.reshape(-1, waveform.shape[-1]),
            self.n_fft,
            self.hop_length,
            window=self._window(waveform),
            pad_mode="constant",
            return_complex=True,
        )
        return spectrogram.reshape(*waveform.shape[:-1], *spectrogram.shape[-2:])

    def istft(self, spectrogram: Tensor, length: int) -> Tensor:
        """Complex spectrogram `(…, f, t)` to waveform `(…, s)` of exactly `length` samples.

        Raises:
            ValueError: the spectrogram is not complex, or not that of a signal of this length.
        """
        if not spectrogram.is_complex():
            raise ValueError(
                f"the input of istft: {spectrogram.dtype} has no phase; pass the complex "
                "spectrogram, not its magnitudes"
            )
        expected = (self.n_fft // 2 + 1, 1 + length // self.hop_length)
        if spectrogram.shape[-2:] != expected:
            raise ValueError(
                f"{length} samples have {expected} bins and frames with n_fft={self.n_fft} and "
                f"hop_length={self.hop_length}, the spectrogram has {(*spectrogram.shape[-2:],)}; "
                "check its hop, its axes, and the length"
            )
        leading = spectrogram.shape[:-2]
        waveform = torch.istft(
            spectrogram.reshape(-1, *spectrogram.shape[-2:]),
            self.n_fft,
            self.hop_length,
            window=self._window(spectrogram.real),
            length=length,
        )
        return waveform.reshape(*leading, length)

    def _window(self, like: Tensor) -> Tensor:
        return torch.hann_window(self.n_fft, dtype=like.dtype, device=like.device)

    @staticmethod
    def to_magnitudes(spectrogram: Tensor) -> Tensor:
        """Complex `(b, c, f, t)` to magnitudes `(b, c, t, f)`."""
        return rearrange(spectrogram.abs(), "b c f t -> b c t f")

    @staticmethod
    def to_model_input(spectrogram: Tensor) -> Tensor:
        """Complex `(b, c, f, t)` to real `(b, 2c, t, f)`: real and imaginary part per channel."""
        return rearrange(torch.view_as_real(spectrogram), "b c f t ri -> b (c ri) t f")

    @staticmethod
    def from_model_output(output: Tensor) -> Tensor:
        """Real `(b, 2c, t, f)` to complex `(b, c, f, t)`, the inverse of `to_model_input`."""
        pairs = rearrange(output, "b (c ri) t f -> b c f t ri", ri=2)
        return torch.view_as_complex(pairs.contiguous())

    def reconstruction_error(self, waveform: Tensor) -> float:
        """Relative error `‖istft(stft(x)) − x‖ / ‖x‖`: rounding, so print it as `1.3e-07`.

        Raises:
            ValueError: the waveform is silent, so the relative error is undefined.

        >>> x = torch.sin(torch.arange(10_000.0))
        >>> 0 < STFTProcessor().reconstruction_error(x) < 1e-6
        True
        """
        if not waveform.any():
            raise ValueError("a silent waveform has no relative error; measure on sound")
        returned = self.istft(self.stft(waveform), waveform.shape[-1])
        return ((returned - waveform).norm() / waveform.norm()).item()


GROUPS = 8  # of bins, which `RealSTFT` adds up before it adds the groups


class RealSTFT(nn.Module):
    """The transform of an `STFTProcessor` and its inverse without complex numbers, by convolutions.

    For programs that leave torch: complex operators cannot be exported (PyTorch issues 65666 and
    113067). It multiplies `n_fft` times as much as a fast transform. Only two tables of `n_fft`
    numbers are stored, and the kernels are made of them in each call.

    Args:
        stft: whose transform it is.

    >>> x = torch.randn(1, 2, 3000)
    >>> real = RealSTFT(STFTProcessor(512, 128))
    >>> real.stft(x).shape
    torch.Size([1, 2, 2, 257, 24])
    >>> torch.allclose(real.istft(real.stft(x), 3000), x, atol=1e-5)
    True
    """

    def __init__(self, stft: STFTProcessor):
        super().__init__()
        self.n_fft, self.hop_length = stft.n_fft, stft.hop_length
        # In float64, because float32 knows no angle of a long window to 1e-5.
        angles = torch.arange(self.n_fft, dtype=torch.float64) * (2 * torch.pi / self.n_fft)
        # A buffer, because exporters would store all that they can compute without one.
        self.register_buffer("positions", torch.arange(self.n_fft))
        self.register_buffer("cosine", angles.cos().float())
        self.register_buffer("sine", angles.sin().float())
        window = torch.hann_window(self.n_fft, dtype=torch.float64)
        self.register_buffer("window", window.float())
        share = torch.full((2, self.n_fft // 2 + 1), 2 / self.n_fft)  # with its negative frequency
        share[:, [0, -1]] /= 2  # which the lowest and the highest bin lack
        self.register_buffer("share", share.reshape(-1))

    def stft(self, waveform: Tensor) -> Tensor:
        """Waveform `(b, c, s)` to real and imaginary parts `(b, c, 2, f, t)`."""
        sound = rearrange(waveform, "b c s -> (b c) 1 s")
        kernels = self._waves() * self.window
        parts = F.conv1d(sound, kernels[:, None], stride=self.hop_length, padding=self.n_fft // 2)
        return rearrange(parts, "(b c) (ri f) t -> b c ri f t", c=waveform.shape[1], ri=2)

    def istft(self, parts: Tensor, length: int) -> Tensor:
        """Parts `(b, c, 2, f, t)` to the waveform `(b, c, s)` of exactly `length` samples."""
        flat = rearrange(parts, "b c ri f t -> (b c) (ri f) t")
        kernels = self._waves() * self.window * self.share[:, None]
        # In groups: float32 loses 2e-5 where thousands of equal numbers are added one by one.
        surplus = -len(self.share) % GROUPS
        flat, kernels = F.pad(flat, (0, 0, 0, surplus)), F.pad(kernels, (0, 0, 0, surplus))
        sound = self._overlap(flat, kernels, len(self.share) + surplus).sum(1, keepdim=True)
        envelope = self._overlap(torch.ones_like(flat[:1, :1]), self.window.square(), 1)
        start = self.n_fft // 2
        sound = sound[..., start : start + length]
        sound = sound / envelope[..., start : start + length]
        return rearrange(sound, "(b c) 1 s -> b c s", c=parts.shape[1])

    def _waves(self) -> Tensor:
        """What a frame is multiplied by for each real and each imaginary part, `(2f, n_fft)`."""
        bins = self.positions[: self.n_fft // 2 + 1, None]
        turns = bins * self.positions % self.n_fft
        return torch.cat([self.cosine[turns], -self.sine[turns]])

    def _overlap(self, frames: Tensor, kernels: Tensor, rows: int) -> Tensor:
        """Add up the kernels, weighted by `(b, rows, t)` and a hop apart: `(b, groups, s)`."""
        kernels = kernels.reshape(rows, 1, self.n_fft)  # a shape that exporters know
        return F.conv_transpose1d(frames, kernels, stride=self.hop_length, groups=min(rows, GROUPS))


class Statistics(NamedTuple):
    """Mean and standard deviation, both broadcastable to `(b, c, t, f)`."""

    mean: Tensor
    std: Tensor


class SpectrogramNormalizer(nn.Module):
    """Give every frequency bin zero mean and unit variance over each example's own frames.

    Music falls by tens of dB from bass to treble, so a convolution on raw bins learns mostly bass.

    Args:
        eps: added to the standard deviation, so that silence stays silent.

    >>> normalizer = SpectrogramNormalizer()
    >>> x = torch.rand(1, 2, 50, 9)
    >>> y, statistics = normalizer(x)
    >>> torch.allclose(normalizer.denormalize(y, statistics), x, atol=1e-6)
    True
    """

    def __init__(self, eps: float = 1e-5):
        super().__init__()
        self.eps = eps

    @property
    def settings(self) -> dict[str, float]:
        """The arguments that make another one like it."""
        return {"eps": self.eps}

    def statistics(self, x: Tensor) -> Statistics:
        """Statistics `(b, c, 1, f)` of `x` `(b, c, t, f)` over its frames."""
        return Statistics(x.mean(2, keepdim=True), x.std(2, keepdim=True, correction=0))

    def forward(self, x: Tensor) -> tuple[Tensor, Statistics]:
        """Normalised `x` `(b, c, t, f)` and the statistics for undoing it."""
        statistics = self.statistics(x)
        return (x - statistics.mean) / self.scale(statistics), statistics

    def scale(self, statistics: Statistics) -> Tensor:
        """The divisor of `forward`."""
        return statistics.std + self.eps

    def denormalize(self, y: Tensor, statistics: Statistics) -> Tensor:
        """Undo `forward`."""
        return y * self.scale(statistics) + statistics.mean


class LevelNormalizer(SpectrogramNormalizer):
    """Give each example zero mean and unit variance over all its bins and frames.

    Only the level changes. Bins keep their proportions, so silent ones stay silent, whereas
    `SpectrogramNormalizer` raises their noise to the level of the music.

    Args:
        eps: added to the standard deviation, so that silence stays silent.

    Notebook: 07_training

    >>> loud = LevelNormalizer()(100 * torch.randn(2, 1, 50, 9))[0]
    >>> bool(loud.std() < 1.1)
    True
    """

    def statistics(self, x: Tensor) -> Statistics:
        """Statistics `(b, 1, 1, 1)` of `x` `(b, c, t, f)`."""
        axes = (1, 2, 3)
        return Statistics(x.mean(axes, keepdim=True), x.std(axes, keepdim=True, correction=0))


class RMSNormalizer(SpectrogramNormalizer):
    """Divide all of an example by its root mean square, so that zeros and signs stay.

    For magnitudes, which are not negative before the network or after it.

    Args:
        eps: added to the root mean square, so that silence stays silent.

    >>> RMSNormalizer()(torch.tensor([0.0, 3.0, 4.0, 0.0]).view(1, 1, 2, 2))[0].flatten()
    tensor([0.0000, 1.2000, 1.6000, 0.0000])
    """

    def statistics(self, x: Tensor) -> Statistics:
        """Mean 0 and root mean square, both `(b, 1, 1, 1)`, of `x` `(b, c, t, f)`."""
        rms = torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True) / x[0].numel() ** 0.5
        return Statistics(torch.zeros_like(rms), rms)


class RunningSpectrogramNormalizer(SpectrogramNormalizer):
    """Normalise every bin over batch and frames, with running statistics for evaluation.

    In training mode the batch is normalised by its own statistics, which also move the running
    ones (exponential average, as in batch normalisation); in evaluation mode the running ones
    are used. They are buffers, so `state_dict` carries them. Where `over_processes` averages a
    tensor over several processes with equal shares of a batch, the statistics are of all of them;
    a run on several devices sets it.

    Args:
        channels: c.
        bins: f.
        momentum: weight of the newest batch.
        eps: added to the standard deviation.

    Raises:
        ValueError: a size is below 1, or the momentum not between 0 and 1; when called with other
            channels or bins, or with values that are not finite (which would stay in the running
            statistics).
    """

    over_processes: Callable[[Tensor], Tensor] | None = None

    def __init__(self, channels: int, bins: int, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__(eps)
        if min(channels, bins) < 1 or not 0 <= momentum <= 1:
            raise ValueError(
                f"channels={channels}, bins={bins}, momentum={momentum}: at least 1 channel and "
                "1 bin, and a weight from 0 to 1"
            )
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(1, channels, 1, bins))
        self.register_buffer("running_var", torch.ones(1, channels, 1, bins))

    @property
    def settings(self) -> dict[str, float]:
        """The arguments that make another one like it, but for its statistics."""
        _, channels, _, bins = self.running_mean.shape
        return {"channels": channels, "bins": bins, "momentum": self.momentum, "eps": self.eps}

    def statistics(self, x: Tensor) -> Statistics:
        """Statistics `(1, c, 1, f)`: of this batch in training, running ones in evaluation."""
        _, channels, _, bins = self.running_mean.shape
        if x.shape[1] != channels or x.shape[3] != bins:
            raise ValueError(f"expected (b, {channels}, t, {bins}), got {tuple(x.shape)}")
        if not self.training:
            return Statistics(self.running_mean, self.running_var.sqrt())
        mean = self._mean(x)
        variance = self._mean((x - mean).square())
        if not (mean.isfinite().all() and variance.isfinite().all()):
            raise ValueError("the batch holds NaN or infinite values; find them before training")
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
        return Statistics(mean, variance.sqrt())

    def _mean(self, x: Tensor) -> Tensor:
        """Mean `(1, c, 1, f)` over batch and frames, of all processes."""
        mean = x.mean((0, 2), keepdim=True)
        return mean if self.over_processes is None else self.over_processes(mean)
