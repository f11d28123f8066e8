"""The TFSWA block, and the two convolutions that change resolution between blocks.

Axis letters: `b` batch, `c` channels, `t` frames, `f` frequency bins.

Notebook: 02_attention_blocks
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tfswa_lab.models.attention import (
    FrequencySequenceAttention,
    ShiftedWindowAttention,
    TemporalSequenceAttention,
)


class TFSWABlock(nn.Module):
    """Three attentions in parallel, fused: along time, along frequency, inside windows.

    Project, attend three ways, concatenate, fuse, and add to the input (and, in the first block
    of a decoder stage, to the encoder's map).

    Args:
        dim: c.
        num_heads: heads of each attention.
        window_size: cells per window side.
        shift_size: 0 for W-MSA, half a window for SW-MSA.

    Source: the parallel variant of Yao et al., EURASIP J. Adv. Signal Process. 2025:39; the
    published serial module is `tfswa_resunet.TFSWAModule`.

    >>> TFSWABlock(dim=16, num_heads=2)(torch.zeros(1, 16, 20, 30)).shape
    torch.Size([1, 16, 20, 30])
    """

    def __init__(self, dim: int, num_heads: int = 8, window_size: int = 8, shift_size: int = 0):
        super().__init__()
        self.input_proj = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim))
        self.tsa = TemporalSequenceAttention(dim, num_heads)
        self.fsa = FrequencySequenceAttention(dim, num_heads)
        self.swa = ShiftedWindowAttention(dim, num_heads, window_size, shift_size)
        self.fusion = nn.Sequential(nn.Conv2d(3 * dim, dim, 1), nn.BatchNorm2d(dim), nn.GELU())

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """`(b, c, t, f)` to the same shape; `skip` has that shape too."""
        projected = self.input_proj(x)
        views = torch.cat([self.tsa(projected), self.fsa(projected), self.swa(projected)], dim=1)
        x = x + self.fusion(views)
        return x if skip is None else x + skip


class DownsampleBlock(nn.Sequential):
    """Halve time and frequency: `(b, c_in, t, f)` to `(b, c_out, t/2, f/2)`.

    Notebook: 03_tfswa_unet
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.GELU(),
        )


class UpsampleBlock(nn.Sequential):
    """Double time and frequency: `(b, c_in, t, f)` to `(b, c_out, 2t, 2f)`.

    Notebook: 03_tfswa_unet
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(
            nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.GELU(),
        )
