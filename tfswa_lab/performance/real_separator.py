"""A separator without complex numbers, so that all of it can be exported: waveform in, stems out.

Axis letters: `b` batch, `n` stems, `c` audio channels, `s` samples, `t` frames, `f` bins, and `ri`
the real and the imaginary part.

Notebook: 10_staged_pipelines
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tfswa_lab.models.separator import PARTS, Separator
from tfswa_lab.stft import RealSTFT


def magnitude_mask(output: Tensor, mixture: Tensor, scale: Tensor, stems: int) -> Tensor:
    """As `separator.magnitude_mask`, times the mixture."""
    return rearrange(output, "b (n c) t f -> b n c 1 f t", n=stems) * mixture[:, None]


def complex_mask(output: Tensor, mixture: Tensor, scale: Tensor, stems: int) -> Tensor:
    """As `separator.complex_mask`, times the mixture: a complex product, written out."""
    masks = rearrange(2 * output - 1, "b (n c ri) t f -> ri b n c f t", n=stems, ri=2)
    (mask_re, mask_im), (re, im) = masks, mixture[:, None].unbind(3)
    return torch.stack([mask_re * re - mask_im * im, mask_re * im + mask_im * re], dim=3)


def mapping(output: Tensor, mixture: Tensor, scale: Tensor, stems: int) -> Tensor:
    """As `separator.ComplexMapping`."""
    parts = rearrange(output, "b (n k) t f -> b n k t f", n=stems) * scale[:, None]
    return rearrange(parts, "b n (c ri) t f -> b n c ri f t", ri=2)


def magnitude_mapping(output: Tensor, mixture: Tensor, scale: Tensor, stems: int) -> Tensor:
    """As `separator.MagnitudeMapping`."""
    magnitudes = rearrange(output, "b (n c) t f -> b n c t f", n=stems) * scale[:, None]
    length = magnitude(mixture)[:, :, None]
    phase = mixture / torch.where(length == 0, 1.0, length)  # zero where the mixture is
    return magnitudes.transpose(-2, -1)[:, :, :, None] * phase[:, None]


def magnitude(parts: Tensor) -> Tensor:
    """Of `(b, c, 2, f, t)`: `(b, c, f, t)`."""
    return torch.linalg.vector_norm(parts, dim=2)


HEADS: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "magnitude": magnitude_mask,
    "complex": complex_mask,
    "mapping": mapping,
    "magnitude mapping": magnitude_mapping,
}


class RealSeparator(nn.Module):
    """What a separator computes, in real numbers.

    Args:
        separator: whose network and normalizer it shares.
    """

    def __init__(self, separator: Separator):
        super().__init__()
        self.stft, self.head = RealSTFT(separator.stft), HEADS[separator.mask]
        self.normalizer, self.model = separator.normalizer, separator.model
        self.stems, self.bins = len(separator.stems), separator.bins
        self.mixture_consistency = separator.mixture_consistency
        self.takes_parts = separator.input == PARTS

    def forward(self, mixture: Tensor) -> Tensor:
        """Mixture `(b, c, s)` to estimates `(b, n, c, s)`."""
        parts = self.stft.stft(mixture)
        seen = parts[..., : self.bins, :]
        normalised, statistics = self.normalizer(self._features(seen))
        scale = self.normalizer.scale(statistics)
        low = self.head(self.model(normalised), seen, scale, self.stems)
        low = F.pad(low, (0, 0, 0, parts.shape[-2] - low.shape[-2]))
        waveforms = self.stft.istft(low.flatten(1, 2), mixture.shape[-1])
        estimates = rearrange(waveforms, "b (n c) s -> b n c s", n=self.stems)
        if self.mixture_consistency:
            missing = mixture - estimates.sum(1)
            estimates = estimates + missing[:, None] / self.stems
        return estimates

    def _features(self, parts: Tensor) -> Tensor:
        if self.takes_parts:
            return rearrange(parts, "b c ri f t -> b (c ri) t f")
        return rearrange(magnitude(parts), "b c f t -> b c t f")
