"""The separator: a network between a spectrogram and its inverse, waveforms on both ends.

Axis letters: `b` batch, `n` stems, `c` audio channels, `s` samples, `t` frames, `f` bins.

Notebook: 03_tfswa_unet
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tfswa_lab.models.tfswa_unet import TFSWAUNet
from tfswa_lab.stft import LevelNormalizer, SpectrogramNormalizer, Statistics, STFTProcessor


def magnitude_mask(output: Tensor, stems: int) -> Tensor:
    """Real masks `(b, n, c, f, t)` in (0, 1) from `(b, n·c, t, f)`; the mixture keeps its phase."""
    return rearrange(output, "b (n c) t f -> b n c f t", n=stems)


def complex_mask(output: Tensor, stems: int) -> Tensor:
    """Complex masks `(b, n, c, f, t)` from `(b, n·c·2, t, f)`, each part in (-1, 1)."""
    parts = rearrange(2 * output - 1, "b (n c ri) t f -> b n c f t ri", n=stems, ri=2)
    return torch.view_as_complex(parts.contiguous())


# kind of mask: (network outputs per stem and audio channel, how they become masks)
MASKS = {"magnitude": (1, magnitude_mask), "complex": (2, complex_mask)}

MAPPING = "mapping"  # no mask: the network's outputs are the stems' spectrograms themselves


def check_stems(stems: Sequence[str]) -> tuple[str, ...]:
    """The names of the stems, if they can also be names of files.

    Raises:
        ValueError: a single string, none, one twice, or one with anything but letters, digits,
            spaces, dots, dashes and underscores in it.
    """
    if isinstance(stems, str):
        raise ValueError(f"stems={stems!r} is a string; write ({stems!r},)")
    stems = tuple(stems)
    if not stems or len(set(stems)) < len(stems):
        raise ValueError(f"stems={stems}: name one or more stems, each once")
    for stem in stems:
        if not isinstance(stem, str) or not re.fullmatch(r"\w[\w .-]*", stem):
            raise ValueError(f"stem {stem!r} cannot be the name of a file; use letters and digits")
    return stems


def output_channels(stems: tuple[str, ...], mask: str, audio_channels: int = 2) -> int:
    """How many outputs a network needs: one a stem and audio channel for magnitude masks, else two.

    >>> output_channels(("vocals", "other"), "complex")
    8

    Raises:
        ValueError: the kind of mask is unknown.
    """
    outputs = {kind: count for kind, (count, _) in MASKS.items()} | {MAPPING: 2}
    if mask not in outputs:
        raise ValueError(f"mask={mask!r} is unknown; choose one of {', '.join(outputs)}")
    return outputs[mask] * audio_channels * len(check_stems(stems))


class Separator(nn.Module):
    """Waveform of a mixture in, waveforms of its stems out.

    The network sees the mixture's magnitudes (1 input channel per audio channel) or its real and
    imaginary parts (2), normalised; its outputs, which end in the network's own sigmoid,
    are masks per stem and audio channel on the mixture's complex spectrogram. A network that
    maps sees real and imaginary parts and gives those of each stem, on the same scale.

    Args:
        model: maps `(b, i, t, f)` to `(b, output_channels(stems, mask, audio_channels), t, f)` in
            (0, 1), where i is `audio_channels` or twice that, and tells its `sizes`; if it maps,
            to any numbers, and says so by `maps_spectra = True`.
        stft: the transform on both ends.
        stems: names of the outputs, in order.
        mask: "magnitude" or "complex", or "mapping" for none.
        mixture_consistency: spread what the estimates miss of the mixture evenly over them, so
            that they sum to it.
        sample_rate: in Hz; remembered for those who read files.
        audio_channels: 2 for stereo, 1 for mono.
        bins: the network sees and masks the lowest bins only, and the others are silent in every
            estimate; None for all. A singing voice has little above 4 kHz, and half the bins are
            half the work.
        normalizer: scales what the network sees; by default each bin of each example on its own
            (`SpectrogramNormalizer`) for masks, and the whole example (`LevelNormalizer`) for
            mappings, which could not give back a steady tone: it may be all mean of its bin.

    Raises:
        ValueError: the network's channels fit neither stems nor mask, it maps where masks are
            asked for or the other way round, it tells no sizes (as `TFSWAResUNet`, which maps
            magnitudes), consistency is asked of a single stem, there are not so many bins, or a
            name cannot be that of a file.

    Source: mixture consistency after Wisdom et al., ICASSP 2019, eq. 5.
    """

    def __init__(
        self,
        model: nn.Module,
        stft: STFTProcessor,
        stems: tuple[str, ...],
        mask: str = "magnitude",
        mixture_consistency: bool = False,
        sample_rate: int = 44_100,
        audio_channels: int = 2,
        bins: int | None = None,
        normalizer: nn.Module | None = None,
    ):
        super().__init__()
        self.stems = check_stems(stems)
        self.mask = mask
        self.mixture_consistency = mixture_consistency
        self.sample_rate = sample_rate
        self.audio_channels = audio_channels
        self.bins = bins
        self.stft = stft
        default = LevelNormalizer if mask == MAPPING else SpectrogramNormalizer
        self.normalizer = default() if normalizer is None else normalizer
        self.model = model
        self._check_channels()
        if bins is not None and not 1 <= bins <= stft.n_fft // 2 + 1:
            raise ValueError(f"bins={bins}: n_fft={stft.n_fft} has 1 to {stft.n_fft // 2 + 1}")

    def _check_channels(self) -> None:
        needed = output_channels(self.stems, self.mask, self.audio_channels)
        sizes = getattr(self.model, "sizes", None)
        if sizes is None:
            raise ValueError(f"{type(self.model).__name__} tells no sizes: it makes no masks")
        maps = getattr(self.model, "maps_spectra", False)
        if maps != (self.mask == MAPPING):
            what = f"makes no masks; choose {MAPPING!r}" if maps else "makes masks"
            name = type(self.model).__name__
            raise ValueError(f"mask={self.mask!r} does not fit {name}, which {what}")
        if sizes["out_channels"] != needed:
            raise ValueError(
                f"{len(self.stems)} stems with mask={self.mask!r} need out_channels={needed}, "
                f"the model has {sizes['out_channels']}"
            )
        channels = self.audio_channels
        inputs = {channels: "magnitudes", 2 * channels: "real and imaginary parts"}
        if maps:
            del inputs[channels]
        if sizes["in_channels"] not in inputs:
            choices = " or ".join(f"{count} ({what})" for count, what in inputs.items())
            raise ValueError(
                f"a mixture of {channels} channels feeds in_channels={choices}, "
                f"the model has {sizes['in_channels']}"
            )
        if self.mixture_consistency and len(self.stems) < 2:
            raise ValueError("mixture_consistency would turn a single stem into the mixture")

    def forward(self, mixture: Tensor) -> Tensor:
        """Mixture `(b, c, s)` to estimates `(b, n, c, s)`."""
        if mixture.ndim != 3 or mixture.shape[1] != self.audio_channels:
            raise ValueError(
                f"expected a mixture (b, {self.audio_channels}, samples), "
                f"got {tuple(mixture.shape)}"
            )
        spectrogram = self.stft(mixture)
        estimates = self.stft.istft(self.spectrograms(spectrogram), mixture.shape[-1])
        if self.mixture_consistency:
            missing = mixture - estimates.sum(1)
            estimates = estimates + missing[:, None] / len(self.stems)
        return estimates

    def spectrograms(self, spectrogram: Tensor) -> Tensor:
        """The stems' complex spectrograms `(b, n, c, f, t)` from the mixture's `(b, c, f, t)`."""
        if self.mask == MAPPING:
            return self._mapped(spectrogram)
        return self.masks(spectrogram) * spectrogram[:, None]

    def masks(self, spectrogram: Tensor) -> Tensor:
        """Masks `(b, n, c, f, t)` for a mixture's complex spectrogram `(b, c, f, t)`.

        Raises:
            ValueError: the network maps.
        """
        if self.mask == MAPPING:
            raise ValueError("a network that maps makes no masks; ask for spectrograms")
        output, _ = self._network(spectrogram)
        masks = MASKS[self.mask][1](output, len(self.stems))
        return self._with_silent_bins(masks)

    def _mapped(self, spectrogram: Tensor) -> Tensor:
        output, (_, std) = self._network(spectrogram)
        # Only the level comes back: the mean is the mixture's and no stem's.
        level = Statistics(torch.zeros_like(std[:, None]), std[:, None])
        output = rearrange(output, "b (n c) t f -> b n c t f", n=len(self.stems))
        output = self.normalizer.denormalize(output, level)
        parts = rearrange(output, "b n (c ri) t f -> b n c f t ri", ri=2)
        return self._with_silent_bins(torch.view_as_complex(parts.contiguous()))

    def _network(self, spectrogram: Tensor) -> tuple[Tensor, Statistics]:
        """The network's output `(b, o, t, f)`, and the statistics of what it saw."""
        seen = spectrogram[..., : self.bins, :]
        if self.model.sizes["in_channels"] == self.audio_channels:
            features = rearrange(seen.abs(), "b c f t -> b c t f")
        else:
            features = self.stft.to_model_input(seen)
        normalised, statistics = self.normalizer(features)
        # Mixed precision ends here: complex numbers are made of whole floats.
        return self.model(normalised).to(features.dtype), statistics

    def _with_silent_bins(self, low: Tensor) -> Tensor:
        """Zeros above the bins that the network sees: `(…, bins, t)` to `(…, f, t)`."""
        return F.pad(low, (0, 0, 0, self.stft.n_fft // 2 + 1 - low.shape[-2]))


def build_separator(
    stems: tuple[str, ...],
    mask: str = "magnitude",
    in_channels: int | None = None,
    n_fft: int = 2048,
    hop_length: int = 512,
    mixture_consistency: bool = False,
    sample_rate: int = 44_100,
    audio_channels: int = 2,
    bins: int | None = None,
    normalizer: nn.Module | None = None,
    architecture: Callable[..., nn.Module] = TFSWAUNet,
    **sizes,
) -> Separator:
    """A separator around a fresh network whose output channels follow from the stems.

    Args:
        in_channels: `audio_channels` for magnitudes, the default of masks, or twice that for real
            and imaginary parts, the default of mappings.
        architecture: the network's class: `TFSWAUNet`, `MaskResUNet` or, with `mask="mapping"`,
            `TFLocoformer`.
        sizes: what else that class takes, e.g. `**SMALL`.

    All others are those of `Separator` and `STFTProcessor`.

    Raises:
        ValueError: sizes, stems or kind of mask make no sense.

    >>> from tfswa_lab.models.tfswa_unet import TINY
    >>> build_separator(("vocals", "other"), **TINY)(torch.randn(1, 2, 9000)).shape
    torch.Size([1, 2, 2, 9000])
    """
    inputs = in_channels or audio_channels * (2 if mask == MAPPING else 1)
    outputs = output_channels(stems, mask, audio_channels)
    return Separator(
        architecture(inputs, outputs, **sizes),
        STFTProcessor(n_fft, hop_length),
        stems,
        mask,
        mixture_consistency,
        sample_rate,
        audio_channels,
        bins,
        normalizer,
    )
