"""The eight models of a public pipeline as plain networks of the same sizes, with random weights.

A guide loads two generators, four decoders, a depth estimator and an image encoder together, on a
GPU of 12 GB, and fails. What a plan and a policy do with them depends on bytes alone, so stacks of
transformer blocks and convolutions stand in for them, at any scale.

Notebook: 10_staged_pipelines
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tfswa_lab.durable import write_whole
from tfswa_lab.performance.lean_load import load
from tfswa_lab.performance.stage import Stage


class Size(NamedTuple):
    """One of the models: its kind, bytes of its weights, and of what it hands on."""

    kind: str
    weights: float
    carries: float


SIZES = {
    "scale_shift_generator": Size("transformer", 1.5e9, 0.05e9),
    "slat_generator": Size("transformer", 4.6e9, 0.2e9),
    "scale_shift_decoder": Size("convolution", 0.1e9, 0.05e9),
    "slat_decoder_gs": Size("convolution", 0.2e9, 0.1e9),
    "slat_decoder_gs4": Size("convolution", 0.2e9, 0.1e9),
    "slat_decoder_mesh": Size("convolution", 0.3e9, 0.3e9),
    "depth": Size("transformer", 1.4e9, 0.1e9),
    "vit": Size("transformer", 1.2e9, 0.0),
}
BLOCKS = 16  # of a network
FLOAT = 4  # bytes
NARROWEST = 64  # channels of what is handed on


class TransformerBlock(nn.Module):
    """Attention over tokens (b, t, c), then a network for each token."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (b, t, c) to tokens."""
        q, k, v = rearrange(self.to_qkv(self.norm1(x)), "b t (n h d) -> n b h t d", n=3, h=4)
        heads = F.scaled_dot_product_attention(q, k, v)
        x = x + self.to_out(rearrange(heads, "b h t d -> b t (h d)"))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ConvolutionBlock(nn.Module):
    """Two convolutions over tokens (b, t, c) that lie on a square."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (b, t, c) to tokens."""
        square = rearrange(x, "b (h w) c -> b c h w", h=math.isqrt(x.shape[1]))
        square = self.conv2(F.gelu(self.conv1(self.norm(square))))
        return x + rearrange(square, "b c h w -> b (h w) c")


KINDS = {"transformer": (TransformerBlock, 12), "convolution": (ConvolutionBlock, 18)}


class Stack(nn.Module):
    """Equal blocks, and one layer more that brings the weights to a number of bytes.

    Args:
        kind: of `KINDS`.
        size: bytes of the weights, from 100 000 on met within 1 %.
        hands_on: bytes of the output for `tokens` tokens, about.
        tokens: that the output is planned for, a square number.
    """

    def __init__(self, kind: str, size: float, hands_on: float, tokens: int):
        super().__init__()
        block, squares = KINDS[kind]
        width = math.sqrt(size / (FLOAT * squares * BLOCKS))
        step = 16 if width > 128 else 4  # GPUs have fast attention for such heads
        self.width = step * max(1, int(width / step))
        self.blocks = nn.ModuleList(block(self.width) for _ in range(BLOCKS))
        while (rest := size - FLOAT * sum(x.numel() for x in self.blocks.parameters())) < 0:
            del self.blocks[-1]
        self.head = nn.Linear(self.width, max(1, round(rest / (FLOAT * (self.width + 1)))))
        self.width_out = max(NARROWEST, round(hands_on / (FLOAT * tokens)))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of any width (b, t, c) to tokens (b, t, `width_out`)."""
        x = F.adaptive_avg_pool1d(x, self.width)
        for block in self.blocks:
            x = block(x)
        x = x + self.head(x).mean(-1, keepdim=True)
        return F.adaptive_avg_pool1d(x, self.width_out)


def build(name: str, scale: float = 1 / 50, tokens: int = 1024) -> Stack:
    """One of the eight networks, on torch's default device; best on "meta".

    >>> with torch.device("meta"):
    ...     vit = build("vit", scale=1 / 50)
    >>> round(sum(parameter.nbytes for parameter in vit.parameters()) / 24e6, 3)  # 1.2 GB / 50
    1.0
    """
    kind, weights, carries = SIZES[name]
    return Stack(kind, scale * weights, scale * carries, tokens)


def eight_stages(folder: str | Path, scale: float = 1 / 50, tokens: int = 1024) -> list[Stage]:
    """The stages of the pipeline; their files are written if they are not there.

    Args:
        folder: of the files.
        scale: of the weights and of what is handed on, where 1 is 9.5 GB.
        tokens: of the value, a square number; activations grow with it.

    Returns:
        Stages that take and return tokens (1, `tokens`, any width), such as
        `torch.rand(1, tokens, 64)`.
    """
    stages = []
    for name in SIZES:
        make = partial(build, name, scale, tokens)
        path = Path(folder) / f"{name}_{scale:.4g}_{tokens}.safetensors"
        if not path.exists():
            with torch.device("meta"):
                write_random(make(), path)
        stages.append(Stage(name, partial(load, make, path), _call, weights=path))
    return stages


def _call(module: nn.Module, value: Tensor) -> Tensor:
    return module(value)


def write_random(module: nn.Module, path: Path, seed: int = 0) -> None:
    """Write random weights for a module, whose tensors may be on the meta device, one by one.

    Args:
        module: gives names and shapes; all its tensors become float32.
        path: a safetensors file.
        seed: of the numbers.
    """
    tensors = module.state_dict()
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + FLOAT * tensor.numel()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole({path: _blocks(text, tensors, torch.Generator().manual_seed(seed))})


def _blocks(
    header: bytes, tensors: dict[str, Tensor], generator: torch.Generator
) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for name, tensor in tensors.items():
        if tensor.dim() > 1:
            scale = 1 / math.sqrt(tensor[0].numel())
            values = torch.randn(tensor.shape, generator=generator, device="cpu").mul_(scale)
        else:  # of a norm, or a bias
            values = torch.full(tensor.shape, float(name.endswith("weight")), device="cpu")
        yield values.numpy().data
