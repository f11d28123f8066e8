"""Hide bands and times from the network while it trains.

Axis letters: `b` batch, `c` channels of the network's input, `t` frames, `f` bins.

Notebook: 07_training
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor, nn

from tfswa_lab.data.augment.mixing import check_prob, settings_of, toss


class SpectrogramMasking:
    """Hide a random band of bins and a random run of frames from the network.

    Only the network's input is masked. The network's outputs still act on the whole mixture, and
    mixture and targets stay as they are, so the network has to infer the hidden part from its
    surroundings. Hidden values become 0, the mean of normalised features.

    Args:
        max_bins: a band is narrower than this.
        max_frames: a run is shorter than this.
        max_share: both are at most this share of their axis, so that a small map is never hidden
            completely.
        apply_prob: probability that a part of an item is hidden.

    Raises:
        ValueError: an argument makes no sense.

    Source: Park et al., "SpecAugment", Interspeech 2019, without its time warping. Widths and
    places are distributed as in `torchaudio.functional.mask_along_axis_iid`.

    >>> masking = SpectrogramMasking()
    >>> masking(torch.ones(4, 2, 300, 1025), torch.Generator().manual_seed(0)).shape
    torch.Size([4, 2, 300, 1025])
    """

    def __init__(
        self,
        max_bins: int = 80,
        max_frames: int = 40,
        max_share: float = 0.25,
        apply_prob: float = 1.0,
    ):
        if min(max_bins, max_frames) < 0:
            raise ValueError(f"max_bins={max_bins}, max_frames={max_frames}: 0 or more (0 is off)")
        self.max_bins = max_bins
        self.max_frames = max_frames
        self.max_share = check_prob("max_share", max_share)
        self.apply_prob = check_prob("apply_prob", apply_prob)

    def __call__(self, features: Tensor, generator: Generator) -> Tensor:
        """Features `(b, c, t, f)` with a part set to 0, the same in all channels of an item."""
        items, _, frames, bins = features.shape
        band = self._span(items, bins, self.max_bins, generator)
        run = self._span(items, frames, self.max_frames, generator)
        hidden = band[:, None, :] | run[:, :, None]  # (b, t, f)
        hidden &= toss((items, 1, 1), self.apply_prob, generator)
        return features.masked_fill(hidden[:, None].to(features.device), 0.0)

    def __repr__(self) -> str:
        """Class and settings, which a checkpoint stores."""
        return settings_of(self)

    def _span(self, items: int, size: int, widest: int, generator: Generator) -> Tensor:
        """A random interval of an axis per item: `(b, size)`, true inside."""
        widest = min(widest, int(size * self.max_share))
        width = torch.rand(items, 1, generator=generator) * widest
        start = (torch.rand(items, 1, generator=generator) * (size - width)).long()
        place = torch.arange(size)
        return (place >= start) & (place < start + width.long())

    @contextmanager
    def applied(self, network: nn.Module, generator: Generator) -> Iterator[None]:
        """While this is open, `network` sees masked features whenever it is in training mode.

        >>> from tfswa_lab.models.separator import build_separator
        >>> from tfswa_lab.models.tfswa_unet import SIZES
        >>> separator = build_separator(("vocals", "other"), **SIZES["tiny"])
        >>> with SpectrogramMasking().applied(separator.model, torch.Generator()):
        ...     estimates = separator(torch.randn(1, 2, 9000))
        """

        def hide(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            return (self(inputs[0], generator), *inputs[1:]) if module.training else None

        handle = network.register_forward_pre_hook(hide)
        try:
            yield
        finally:
            handle.remove()
