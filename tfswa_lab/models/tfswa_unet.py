"""The TFSWA-UNet: a U-Net whose every stage is a stack of TFSWA blocks.

Axis letters: `b` batch, `c` channels, `t` frames, `f` frequency bins.

Notebook: 03_tfswa_unet
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfswa_lab.models.checkpointing import checkpointed
from tfswa_lab.models.symbolic import at_least, round_up
from tfswa_lab.models.tfswa_block import DownsampleBlock, TFSWABlock, UpsampleBlock

# Arguments of TFSWAUNet. "tiny" and "small" keep attention heads at least 8 channels wide;
# "default", the published one, begins with 4, which CUDA's fused kernels refuse in bfloat16 where
# there is a mask: `num_heads=4` trains in half the memory then.
SIZES = {
    "tiny": {"dims": (16, 24, 32, 48), "depths": (1, 1, 1, 1), "num_heads": 2},
    "small": {"dims": (16, 32, 64, 128), "depths": (1, 1, 1, 1), "num_heads": 2},
    "default": {"dims": (32, 64, 128, 256), "depths": (2, 2, 6, 2), "num_heads": 8},
}


class TFSWAUNet(nn.Module):
    """Spectrogram in, one mask with values in (0, 1) for each output channel out.

    A 7×7 stem, three encoder stages, a bottleneck and three decoder stages that mirror the
    encoder's depths; the encoder's maps are added in the first block of each decoder stage.
    Blocks alternate between W-MSA and SW-MSA.

    Sizes that cannot be halved three times are padded at the end with up to 7 frames and bins of
    zeros, which the blocks treat as part of the map.

    There is no dropout, because the published description names none.

    Args:
        in_channels: of the spectrogram: 2 for stereo magnitudes, 4 for real and imaginary parts.
        out_channels: see `separator.output_channels`.
        dims: channels of the three encoder stages and the bottleneck.
        depths: blocks of the three encoder stages and the bottleneck.
        window_size: cells per window side.
        num_heads: heads of every attention; must divide every entry of `dims`.
        activation_checkpointing: recompute each block in the backward pass instead of keeping
            its activations.

    Raises:
        ValueError: not four levels, a size that is not positive, or heads that do not divide.

    Source: built from the published description of the parallel TFSWA-UNet.

    >>> TFSWAUNet().get_num_parameters()
    15404834
    """

    def __init__(
        self,
        in_channels: int = 2,
        out_channels: int = 2,
        dims: tuple[int, ...] = (32, 64, 128, 256),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        window_size: int = 8,
        num_heads: int = 8,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        if len(dims) != 4 or len(depths) != 4:
            raise ValueError(f"dims and depths need four entries each, got {dims} and {depths}")
        if min(in_channels, out_channels, window_size, num_heads, *dims, *depths) < 1:
            raise ValueError("channels, dims, depths, window_size and num_heads must be at least 1")
        self.sizes = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "dims": tuple(dims),
            "depths": tuple(depths),
            "window_size": window_size,
            "num_heads": num_heads,
        }
        self.activation_checkpointing = activation_checkpointing

        def stage(level: int) -> nn.ModuleList:
            shifts = [i % 2 * (window_size // 2) for i in range(depths[level])]
            blocks = [TFSWABlock(dims[level], num_heads, window_size, shift) for shift in shifts]
            return nn.ModuleList(blocks)

        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, dims[0], 7, padding=3), nn.BatchNorm2d(dims[0]), nn.GELU()
        )
        self.encoder = nn.ModuleList(stage(i) for i in range(3))
        self.down = nn.ModuleList(DownsampleBlock(dims[i], dims[i + 1]) for i in range(3))
        self.bottleneck = stage(3)
        self.up = nn.ModuleList(UpsampleBlock(dims[i + 1], dims[i]) for i in (2, 1, 0))
        self.decoder = nn.ModuleList(stage(i) for i in (2, 1, 0))
        self.head = nn.Sequential(
            nn.Conv2d(dims[0], dims[0], 3, padding=1),
            nn.BatchNorm2d(dims[0]),
            nn.GELU(),
            nn.Conv2d(dims[0], out_channels, 1),
            nn.Sigmoid(),
        )
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, in_channels, t, f)` to `(b, out_channels, t, f)`."""
        if x.ndim != 4 or x.shape[1] != self.sizes["in_channels"]:
            raise ValueError(
                f"expected (b, {self.sizes['in_channels']}, t, f), got {tuple(x.shape)}"
            )
        t, f = x.shape[2:]
        x = self.stem(pad_for_three_halvings(x))
        skips = []
        for blocks, down in zip(self.encoder, self.down, strict=True):
            x = self._run(blocks, x)
            skips.append(x)
            x = down(x)
        x = self._run(self.bottleneck, x)
        for up, blocks in zip(self.up, self.decoder, strict=True):
            x = self._run(blocks, up(x), skips.pop())
        return self.head(x)[:, :, :t, :f]

    def _run(self, blocks: nn.ModuleList, x: Tensor, skip: Tensor | None = None) -> Tensor:
        for block in blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpointed(block, x, skip)
            else:
                x = block(x, skip)
            skip = None  # only the first block of a stage takes it
        return x

    def get_num_parameters(self, trainable_only: bool = False) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    def get_model_info(self) -> dict:
        """Sizes, parameter and tensor counts, and the parameters' bytes."""
        parameters = list(self.parameters())
        return {
            "name": type(self).__name__,
            **self.sizes,
            "parameters": self.get_num_parameters(),
            "trainable_parameters": self.get_num_parameters(trainable_only=True),
            "parameter_tensors": len(parameters),
            "parameter_bytes": sum(p.numel() * p.element_size() for p in parameters),
        }


def pad_for_three_halvings(x: Tensor) -> Tensor:
    """Append zeros to `(b, c, t, f)` until t and f are multiples of 8.

    At least 16 frames, so that the bottleneck keeps two cells: batch norm cannot train on one,
    which has no variance.
    """
    t, f = x.shape[2:]
    frames = at_least(2, round_up(t, 8) // 8) * 8
    return F.pad(x, (0, round_up(f, 8) - f, 0, frames - t))


def initialise(module: nn.Module) -> None:
    """Truncated normal for linear layers, Kaiming for convolutions, zero for their biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
