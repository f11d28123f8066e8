"""The separator: a network between a spectrogram and its inverse, waveforms on both ends.

A head says what the network is given and how its outputs become spectrograms: `HEADS` has all.

Axis letters: `b` batch, `n` stems, `c` audio channels, `s` samples, `t` frames, `f` bins.

Notebook: 03_tfswa_unet
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tfswa_lab.models.tfswa_unet import TFSWAUNet
from tfswa_lab.stft import LevelNormalizer, RMSNormalizer, SpectrogramNormalizer, STFTProcessor


class Input(NamedTuple):
    """One view of the mixture's complex spectrogram that a network can be given."""

    name: str
    channels: int  # of the view, for each audio channel
    view: Callable[[Tensor], Tensor]  # from (b, c, f, t) to (b, c·channels, t, f)


MAGNITUDES = Input("magnitudes", 1, STFTProcessor.to_magnitudes)
PARTS = Input("real and imaginary parts", 2, STFTProcessor.to_model_input)


def magnitude_mask(output: Tensor, stems: int) -> Tensor:
    """Real masks `(b, n, c, f, t)` in (0, 1) from `(b, n·c, t, f)`; the mixture keeps its phase."""
    return rearrange(output, "b (n c) t f -> b n c f t", n=stems)


def complex_mask(output: Tensor, stems: int) -> Tensor:
    """Complex masks `(b, n, c, f, t)` from `(b, n·c·2, t, f)`, each part in (-1, 1)."""
    return STFTProcessor.from_model_output(2 * output - 1).unflatten(1, (stems, -1))


@dataclass(frozen=True)
class MaskHead:
    """The network's outputs become masks, and each stem is the mixture times its mask.

    Args:
        outputs: numbers that the network gives for each stem and audio channel.
        masks: turns outputs and the number of stems into masks `(b, n, c, f, t)`.
    """

    outputs: int
    masks: Callable[[Tensor, int], Tensor]

    inputs = (MAGNITUDES, PARTS)  # what the network may be given, the default first
    normalizer = SpectrogramNormalizer

    def spectrograms(self, output: Tensor, mixture: Tensor, scale: Tensor, stems: int) -> Tensor:
        """Complex spectrograms `(b, n, c, f, t)` of the stems.

        Args:
            output: of the network, `(b, n·c·outputs, t, f)`.
            mixture: complex, `(b, c, f, t)`.
            scale: by which the normalizer divided the network's input; masks have no unit.
            stems: n.
        """
        return self.masks(output, stems) * mixture[:, None]


class ComplexMapping:
    """The outputs are the real and imaginary parts of the stems, on the scale of the input."""

    outputs = 2
    inputs = (PARTS,)
    normalizer = LevelNormalizer  # subtracting a mean per bin would remove a steady tone
    masks = None

    def spectrograms(self, output: Tensor, mixture: Tensor, scale: Tensor, stems: int) -> Tensor:
        """As `MaskHead.spectrograms`. The mean is not added back, because it is the mixture's."""
        parts = output.unflatten(1, (stems, -1)) * scale[:, None]  # (b, n, 2c, t, f)
        return STFTProcessor.from_model_output(parts.flatten(1, 2)).unflatten(1, (stems, -1))


class MagnitudeMapping:
    """The outputs are the stems' magnitudes, on the scale of the input; the phase is the mixture's.

    Source: Yao et al., EURASIP J. Adv. Signal Process. 2025:39, Sec. 3.
    """

    outputs = 1
    inputs = (MAGNITUDES,)
    normalizer = RMSNormalizer  # only divides: zero stays zero, on both sides of the network
    masks = None

    def spectrograms(self, output: Tensor, mixture: Tensor, scale: Tensor, stems: int) -> Tensor:
        """As `MaskHead.spectrograms`; where the mixture is zero, so are the stems."""
        magnitudes = output.unflatten(1, (stems, -1)) * scale[:, None]  # (b, n, c, t, f)
        return magnitudes.mT * mixture.sgn()[:, None]


HEADS = {
    "magnitude": MaskHead(1, magnitude_mask),
    "complex": MaskHead(2, complex_mask),
    "mapping": ComplexMapping(),
    "magnitude mapping": MagnitudeMapping(),
}
MASKS = tuple(name for name, head in HEADS.items() if head.masks)


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


def head_named(mask: str) -> MaskHead | ComplexMapping | MagnitudeMapping:
    """The head of that name.

    Raises:
        ValueError: there is none.
    """
    if mask not in HEADS:
        raise ValueError(f"mask={mask!r} is unknown; choose one of {', '.join(HEADS)}")
    return HEADS[mask]


def output_channels(stems: tuple[str, ...], mask: str, audio_channels: int = 2) -> int:
    """How many outputs a network needs: its head's, for each stem and audio channel.

    >>> output_channels(("vocals", "other"), "complex")
    8

    Raises:
        ValueError: the head is unknown, or the stems cannot be names of files.
    """
    return head_named(mask).outputs * audio_channels * len(check_stems(stems))


class Separator(nn.Module):
    """Waveform of a mixture in, waveforms of its stems out.

    The network is given the normalised magnitudes of the mixture (1 input channel per audio
    channel) or its real and imaginary parts (2), and the head makes the stems' spectrograms of
    its outputs.

    Args:
        model: maps `(b, i, t, f)` to `(b, output_channels(stems, mask, audio_channels), t, f)`,
            where i is `audio_channels` or twice that. Its attribute `sizes` holds `in_channels`
            and `out_channels`; `separator_heads` names the heads that its outputs suit. Without
            `separator_heads` they are masks, so between 0 and 1.
        stft: the transform on both ends.
        stems: names of the outputs, in order.
        mask: the name of the head. "magnitude" and "complex" are masks on the mixture; "mapping"
            takes the outputs for real and imaginary parts, "magnitude mapping" for magnitudes.
        mixture_consistency: add an equal share of the rest (mixture − sum of estimates) to each
            estimate, so that they sum to the mixture.
        sample_rate: in Hz; remembered for those who read files.
        audio_channels: 2 for stereo, 1 for mono.
        bins: the network sees the lowest bins only, and the others are silent in every estimate;
            None for all. A singing voice has little above 4 kHz, and half the bins are half the
            work.
        normalizer: scales the network's input; by default each bin of each example on its own
            (`SpectrogramNormalizer`) for masks, and the whole example for mappings: by its
            deviation (`LevelNormalizer`), or its root mean square for magnitudes
            (`RMSNormalizer`).

    Raises:
        ValueError: the network's channels do not fit the stems and the head, its outputs suit
            other heads, it has no `sizes`, consistency is asked of a single stem, there are fewer
            bins, or a stem's name cannot be the name of a file.

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
        self.head = head_named(mask)
        self.normalizer = self.head.normalizer() if normalizer is None else normalizer
        self.model = model
        self._check_outputs()
        self.input = self._fitting_input()
        if bins is not None and not 1 <= bins <= stft.n_fft // 2 + 1:
            raise ValueError(f"bins={bins}: n_fft={stft.n_fft} has 1 to {stft.n_fft // 2 + 1}")

    def _check_outputs(self) -> None:
        needed = output_channels(self.stems, self.mask, self.audio_channels)
        name = type(self.model).__name__
        if not hasattr(self.model, "sizes"):
            raise ValueError(f"{name} has no `sizes` attribute, so its channels are unknown")
        heads = getattr(self.model, "separator_heads", MASKS)
        if self.mask not in heads:
            choices = " or ".join(map(repr, heads))
            raise ValueError(
                f"mask={self.mask!r} does not suit the outputs of {name}; choose {choices}"
            )
        if self.model.sizes["out_channels"] != needed:
            raise ValueError(
                f"{len(self.stems)} stems with mask={self.mask!r} need out_channels={needed}, "
                f"the model has {self.model.sizes['out_channels']}"
            )
        if self.mixture_consistency and len(self.stems) < 2:
            raise ValueError("mixture_consistency would turn a single stem into the mixture")

    def _fitting_input(self) -> Input:
        channels, given = self.audio_channels, self.model.sizes["in_channels"]
        inputs = {channels * kind.channels: kind for kind in self.head.inputs}
        if given not in inputs:
            choices = " or ".join(f"{count} ({kind.name})" for count, kind in inputs.items())
            raise ValueError(
                f"a mixture of {channels} channels feeds in_channels={choices}, "
                f"the model has {given}"
            )
        return inputs[given]

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
        output, scale = self._network(spectrogram)
        seen = spectrogram[..., : self.bins, :]
        low = self.head.spectrograms(output, seen, scale, len(self.stems))
        return self._with_silent_bins(low)

    def masks(self, spectrogram: Tensor) -> Tensor:
        """Masks `(b, n, c, f, t)` for a mixture's complex spectrogram `(b, c, f, t)`.

        Raises:
            ValueError: the head makes no masks.
        """
        if self.head.masks is None:
            raise ValueError(f"mask={self.mask!r} makes no masks; ask for spectrograms")
        output, _ = self._network(spectrogram)
        return self._with_silent_bins(self.head.masks(output, len(self.stems)))

    def _network(self, spectrogram: Tensor) -> tuple[Tensor, Tensor]:
        """The network's output `(b, o, t, f)`, and the scale of its input."""
        features = self.input.view(spectrogram[..., : self.bins, :])
        normalised, statistics = self.normalizer(features)
        # Mixed precision ends here: complex numbers are made of float32 parts.
        output = self.model(normalised).to(features.dtype)
        return output, self.normalizer.scale(statistics)

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
        in_channels: `audio_channels` for magnitudes, twice that for real and imaginary parts; by
            default the first that the head takes.
        architecture: the network's class: `TFSWAUNet`, `MaskResUNet`, with `mask="mapping"`
            `TFLocoformer`, or with `mask="magnitude mapping"` `TFSWAResUNet`.
        sizes: further arguments of that class, e.g. `**tfswa_unet.SIZES["small"]`.

    All others are those of `Separator` and `STFTProcessor`.

    Raises:
        ValueError: sizes, stems or head make no sense.

    >>> import torch
    >>> from tfswa_lab.models.tfswa_unet import SIZES
    >>> build_separator(("vocals", "other"), **SIZES["tiny"])(torch.randn(1, 2, 9000)).shape
    torch.Size([1, 2, 2, 9000])
    """
    inputs = in_channels or audio_channels * head_named(mask).inputs[0].channels
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
