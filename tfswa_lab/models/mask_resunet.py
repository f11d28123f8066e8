"""A residual U-Net that makes masks: the TFSWA-ResUNet's parts, few enough to train on a CPU.

Axis letters: `b` batch, `c` channels, `t` frames, `f` frequency bins, `k` sub-bands.

Notebook: 07_training
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tfswa_lab.models.symbolic import at_least, round_up
from tfswa_lab.models.tfswa_resunet import ResidualConvModule, TFSWAModule


class MaskResUNet(nn.Module):
    """Spectrogram in, masks in (0, 1) out: convolutions around a bottleneck with attention.

    As in the TFSWA-ResUNet the band is cut into sub-bands that are stacked as channels, and only
    the bottleneck, which has few cells, has attention. Three things differ: each stage has one
    residual module in place of four, the head makes masks, and the first halving is of frequency
    only, because a long window leaves few frames.

    Args:
        in_channels: of the spectrogram, as for `TFSWAUNet`.
        out_channels: see `separator.output_channels`.
        channels: width of each stage.
        bottleneck: width of the lowest.
        num_tfswa: TFSWA modules in the bottleneck.
        num_heads: heads of every attention; must divide `bottleneck`.
        sub_bands: equal parts of the band.

    Raises:
        ValueError: a size is not positive, or heads that do not divide.

    Source: the parts are those of Yao et al., "TFSWA-ResUNet", EURASIP J. Adv. Signal Process.
    2025:39; sizes and head are ours.

    >>> MaskResUNet(in_channels=2, out_channels=4)(torch.zeros(1, 2, 9, 129)).shape
    torch.Size([1, 4, 9, 129])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: tuple[int, ...] = (24, 32, 48, 64),
        bottleneck: int = 80,
        num_tfswa: int = 1,
        num_heads: int = 4,
        sub_bands: int = 4,
    ):
        super().__init__()
        if min(in_channels, out_channels, bottleneck, num_heads, sub_bands, *channels) < 1:
            raise ValueError("channels, bottleneck, num_heads and sub_bands must be at least 1")
        self.sizes = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": tuple(channels),
            "bottleneck": bottleneck,
            "num_tfswa": num_tfswa,
            "num_heads": num_heads,
            "sub_bands": sub_bands,
        }
        self.halvings = [(1, 2), *[(2, 2)] * (len(channels) - 1)]
        self.stem = nn.Conv2d(in_channels * sub_bands, channels[0], 3, padding=1)
        before = (channels[0], *channels)
        self.encoder = nn.ModuleList(map(ResidualConvModule, before, channels))
        self.bottleneck = nn.Sequential(
            ResidualConvModule(channels[-1], bottleneck),
            *(TFSWAModule(bottleneck, num_heads) for _ in range(num_tfswa)),
            ResidualConvModule(bottleneck, bottleneck),
        )
        up = (bottleneck, *channels[::-1])
        # the channels from below, and the skip connection's beside them
        self.decoder = nn.ModuleList(
            ResidualConvModule(below + width, width) for below, width in pairwise(up)
        )
        self.head = nn.Sequential(
            nn.BatchNorm2d(channels[0]),
            nn.GELU(),
            nn.Conv2d(channels[0], out_channels * sub_bands, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(b, in_channels, t, f)` to `(b, out_channels, t, f)`."""
        bands = self.sizes["sub_bands"]
        t, f = x.shape[2:]
        levels = len(self.halvings)
        lowest = 1 << levels - 1  # frames of the input in one at the bottom
        # at least two frames at the bottom, so that batch norm has a variance
        frames = at_least(2, round_up(t, lowest) // lowest) * lowest
        x = F.pad(x, (0, round_up(f, bands << levels) - f, 0, frames - t))
        x = self.stem(rearrange(x, "b c t (k f) -> b (c k) t f", k=bands))
        skips = []
        for block, halving in zip(self.encoder, self.halvings, strict=True):
            x = block(x)
            skips.append(x)
            x = F.avg_pool2d(x, halving)
        x = self.bottleneck(x)
        for block in self.decoder:
            skip = skips.pop()
            x = F.interpolate(x, skip.shape[2:])
            x = block(torch.cat([x, skip], dim=1))
        return rearrange(self.head(x), "b (c k) t f -> b c t (k f)", k=bands)[:, :, :t, :f]
