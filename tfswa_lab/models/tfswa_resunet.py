"""The TFSWA-ResUNet as published: attention in the bottleneck, residual convolutions around it.

Axis letters: `b` batch, `c` channels, `t` frames, `f` frequency bins, `l` tokens.

Source: Yao, Su, Yang, Zhang, Wu, "TFSWA-ResUNet", EURASIP J. Adv. Signal Process. 2025:39,
Sec. 3 and Figs. 1–3. Where the paper is silent, the choice is the one that meets its parameter
count of 44.3 M: an MLP ratio of 2, and a shortcut convolution in every residual module.

Notebook: 03_tfswa_unet
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tfswa_lab.models.attention import MultiHeadAttention, ShiftedWindowAttention, mlp
from tfswa_lab.models.symbolic import round_up

SUB_BANDS = 4
CHANNELS = (32, 64, 128, 256, 384)


class SequenceBlock(nn.Module):
    """LayerNorm, attention without a residual, then an MLP with one (Fig. 3b); on `(b, l, c)`."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = MultiHeadAttention(dim, num_heads)
        self.mlp = mlp(dim, mlp_ratio)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens `(b, l, c)` to tokens of the same shape."""
        attended = self.attention(self.norm(tokens))
        return attended + self.mlp(attended)


class TFSWAModule(nn.Module):
    """TSA, then FSA, then a pair of Swin blocks as a residual branch (Fig. 3a).

    >>> TFSWAModule(dim=16, num_heads=2)(torch.zeros(1, 16, 10, 8)).shape
    torch.Size([1, 16, 10, 8])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        window_size: tuple[int, int] = (5, 4),
        mlp_ratio: int = 2,
    ):
        super().__init__()
        shift = (window_size[0] // 2, window_size[1] // 2)
        self.tsa = SequenceBlock(dim, num_heads, mlp_ratio)
        self.fsa = SequenceBlock(dim, num_heads, mlp_ratio)
        self.swin = nn.Sequential(
            ShiftedWindowAttention(dim, num_heads, window_size, 0, mlp_ratio),
            ShiftedWindowAttention(dim, num_heads, window_size, shift, mlp_ratio),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(b, c, t, f)` to the same shape."""
        t, f = x.shape[2:]
        tokens = self.tsa(rearrange(x, "b c t f -> (b f) t c"))
        tokens = self.fsa(rearrange(tokens, "(b f) t c -> (b t) f c", f=f))
        x = rearrange(tokens, "(b t) f c -> b c t f", t=t)
        return x + self.swin(x)


class ResidualConvModule(nn.Module):
    """Twice batch norm, GELU, 3×3 convolution, beside a 1×1 shortcut."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.GELU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.GELU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, c_in, t, f)` to `(b, c_out, t, f)`."""
        return self.shortcut(x) + self.body(x)


def conv_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Four residual modules; the first one changes the number of channels."""
    first = ResidualConvModule(in_channels, out_channels)
    rest = [ResidualConvModule(out_channels, out_channels) for _ in range(3)]
    return nn.Sequential(first, *rest)


class TFSWAResUNet(nn.Module):
    """Magnitudes of the mixture in, magnitudes of the stems out.

    The band is cut into four equal sub-bands, stacked as channels. The paper trains one model for
    each stem and feeds 1,024 of the 1,025 bins of a 2,048-point transform; here any number of bins
    is padded to a multiple of 128 (and frames to one of 32), and the padding is cut off again. In
    a `Separator`, the head "magnitude mapping" gives the stems the mixture's phase.

    Args:
        in_channels: audio channels of the magnitude spectrogram.
        out_channels: as many for each stem, see `separator.output_channels`.
        channels: width of each stage of the encoder; the frames of a stage are halved in the next.
        num_heads: heads of every attention.
        num_tfswa: TFSWA modules in the bottleneck.
        mlp_ratio: hidden width of every MLP in units of its channels.
    """

    separator_heads = ("magnitude mapping",)

    def __init__(
        self,
        in_channels: int = 2,
        out_channels: int = 2,
        channels: tuple[int, ...] = CHANNELS,
        num_heads: int = 4,
        num_tfswa: int = 4,
        mlp_ratio: int = 2,
    ):
        super().__init__()
        self.sizes = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": tuple(channels),
            "num_heads": num_heads,
            "num_tfswa": num_tfswa,
            "mlp_ratio": mlp_ratio,
        }
        down = pairwise((in_channels * SUB_BANDS, *channels))
        up = pairwise((*channels[::-1], out_channels * SUB_BANDS))
        self.encoder = nn.ModuleList(conv_block(before, after) for before, after in down)
        self.bottleneck = nn.Sequential(
            *(TFSWAModule(channels[-1], num_heads, mlp_ratio=mlp_ratio) for _ in range(num_tfswa))
        )
        # twice the channels: those from below, and the skip connection's beside them
        self.decoder = nn.ModuleList(conv_block(2 * below, after) for below, after in up)

    def forward(self, magnitude: Tensor) -> Tensor:
        """Magnitudes `(b, in_channels, t, f)` to `(b, out_channels, t, f)`, none negative."""
        t, f = magnitude.shape[2:]
        multiple = 2 ** len(self.encoder)
        bins, frames = round_up(f, SUB_BANDS * multiple), round_up(t, multiple)
        x = F.pad(magnitude, (0, bins - f, 0, frames - t))
        x = rearrange(x, "b c t (k f) -> b (c k) t f", k=SUB_BANDS)
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.bottleneck(x)
        for block in self.decoder:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skips.pop()], dim=1))
        x = rearrange(x, "b (c k) t f -> b c t (k f)", k=SUB_BANDS)
        return x[:, :, :t, :f].relu()
