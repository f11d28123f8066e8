"""The TF-Locoformer: attention for long distances, convolution for short ones, axis by axis.

Axis letters: `b` batch, `c` channels, `t` frames, `f` frequency bins, `n` sequences, `l` tokens of
one sequence. A spectrogram is `(b, c, t, f)`, sequences of tokens `(n, l, c)`.

Notebook: 04_tf_locoformer
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tfswa_lab.models.checkpointing import checkpointed
from tfswa_lab.models.rotary import RotaryAttention

# Arguments of TFLocoformer; the last three are the paper's S, M and L.
SIZES = {
    "tiny": {"dim": 16, "num_blocks": 1, "hidden_dim": 24, "num_heads": 2, "attention_dim": 16},
    "S": {"dim": 96, "num_blocks": 4, "hidden_dim": 128, "kernel_size": 8},
    "M": {"dim": 128, "num_blocks": 6, "hidden_dim": 384, "kernel_size": 4},
    "L": {"dim": 128, "num_blocks": 9, "hidden_dim": 384, "kernel_size": 4},
}

CHECKPOINTING = (False, True, "block", "path")


class RMSGroupNorm(nn.Module):
    """Divide each group of a token's channels by its root mean square; one gain per channel.

    Unlike `nn.GroupNorm` it pools over channels only, so no token sees another.

    Args:
        dim: c, a multiple of `num_groups`.
        num_groups: equal parts of the channels.
        eps: added to the root mean square, so that silence stays silent.

    Raises:
        ValueError: groups that do not divide.

    Source: Saijo et al., "TF-Locoformer", IWAENC 2024.

    >>> RMSGroupNorm(4, num_groups=2)(torch.tensor([3.0, 4.0, 0.0, 0.1]))
    tensor([0.8485, 1.1314, 0.0000, 1.4140], grad_fn=<MulBackward0>)
    """

    def __init__(self, dim: int, num_groups: int, eps: float = 1e-5):
        super().__init__()
        if dim % num_groups:
            raise ValueError(f"dim={dim} cannot be split into num_groups={num_groups} equal groups")
        self.num_groups = num_groups
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """`(…, c)` to the same shape."""
        groups = rearrange(tokens, "... (g d) -> ... g d", g=self.num_groups)
        # a norm rather than the root of a mean of squares: that has no gradient at zero
        norm = torch.linalg.vector_norm(groups, dim=-1, keepdim=True)
        rms = norm / groups.shape[-1] ** 0.5
        return (groups / (rms + self.eps)).flatten(-2) * self.gamma


class ConvSwiGLU(nn.Module):
    """A feed-forward network that sees `kernel_size - 1` neighbours on each side.

    SwiGLU with a convolution in place of the first linear layer and a transposed one in place of
    the second. The first pads by `kernel_size - 1` and the second trims as much: lengths stay.

    Args:
        dim: c.
        hidden_dim: channels between the convolutions.
        kernel_size: of both.
        dropout: share of hidden and output values set to 0 in training.

    Source: Saijo et al., "TF-Locoformer", IWAENC 2024; SwiGLU after Shazeer, 2020.
    """

    def __init__(self, dim: int, hidden_dim: int, kernel_size: int, dropout: float = 0.0):
        super().__init__()
        padding = kernel_size - 1
        self.conv = nn.Conv1d(dim, 2 * hidden_dim, kernel_size, padding=padding)
        self.deconv = nn.ConvTranspose1d(hidden_dim, dim, kernel_size, padding=padding)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(n, l, c)` to the same shape."""
        value, gate = self.conv(rearrange(tokens, "n l c -> n c l")).chunk(2, dim=1)
        hidden = self.dropout(value * F.silu(gate))  # (n, hidden_dim, l + kernel_size - 1)
        return rearrange(self.dropout(self.deconv(hidden)), "n c l -> n l c")


class LocoformerLayer(nn.Module):
    """Attention between two convolutional feed-forward networks ("macaron").

    The input of each is normalised, and its output added to the input. The paper halves both
    feed-forward branches; the released code and this one do not.

    Args:
        dim: c.
        hidden_dim: of both `ConvSwiGLU`.
        kernel_size: of both `ConvSwiGLU`.
        num_heads: of `RotaryAttention`.
        attention_dim: of `RotaryAttention`.
        num_groups: of each `RMSGroupNorm`.
        dropout: of all parts.

    Source: Saijo et al., "TF-Locoformer", IWAENC 2024 and its released code.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        kernel_size: int,
        num_heads: int,
        attention_dim: int,
        num_groups: int,
        dropout: float,
    ):
        super().__init__()
        self.norm1 = RMSGroupNorm(dim, num_groups)
        self.ffn1 = ConvSwiGLU(dim, hidden_dim, kernel_size, dropout)
        self.norm2 = RMSGroupNorm(dim, num_groups)
        self.attention = RotaryAttention(dim, attention_dim, num_heads, dropout)
        self.norm3 = RMSGroupNorm(dim, num_groups)
        self.ffn2 = ConvSwiGLU(dim, hidden_dim, kernel_size, dropout)

    def process(self, tokens: Tensor) -> Tensor:
        """`(n, l, c)` to the same shape."""
        tokens = tokens + self.ffn1(self.norm1(tokens))
        tokens = tokens + self.attention(self.norm2(tokens))
        return tokens + self.ffn2(self.norm3(tokens))


class FrequencyPath(LocoformerLayer):
    """Along the frequency bins of each frame; frames do not see each other."""

    def forward(self, x: Tensor) -> Tensor:
        """`(b, c, t, f)` to the same shape."""
        tokens = self.process(rearrange(x, "b c t f -> (b t) f c"))
        return rearrange(tokens, "(b t) f c -> b c t f", t=x.shape[2])


class TimePath(LocoformerLayer):
    """Along the frames of each frequency bin; bins do not see each other."""

    def forward(self, x: Tensor) -> Tensor:
        """`(b, c, t, f)` to the same shape."""
        tokens = self.process(rearrange(x, "b c t f -> (b f) t c"))
        return rearrange(tokens, "(b f) t c -> b c t f", f=x.shape[3])


class TFLocoformerBlock(nn.Sequential):
    """A frequency path, then a time path: `(b, c, t, f)` to the same shape.

    Args:
        sizes: those of `LocoformerLayer`.
    """

    def __init__(self, **sizes):
        paths = {"frequency": FrequencyPath(**sizes), "time": TimePath(**sizes)}
        super().__init__(OrderedDict(paths))


class TFLocoformer(nn.Module):
    """Spectrogram in, spectrograms of the stems out: a complex mapping, without masks or bounds.

    A 3×3 convolution with global layer norm, blocks of two paths at full resolution, and a 3×3
    transposed convolution. Under autocast both ends stay in float32, and so does the residual sum
    between them.

    Args:
        in_channels: real and imaginary part of each audio channel: 2 for mono, 4 for stereo.
        out_channels: as many for each stem, see `separator.output_channels`.
        dim: channels between the two ends.
        num_blocks: blocks.
        hidden_dim: of each `ConvSwiGLU`.
        kernel_size: of each `ConvSwiGLU`.
        num_heads: attention heads.
        attention_dim: width of all heads together.
        num_groups: of each `RMSGroupNorm`.
        dropout: in training, after each part and on hidden values and attention weights.
        activation_checkpointing: False keeps all activations for the backward pass; "block" or
            True recomputes block by block, "path" path by path, which keeps twice as many inputs
            but only half of the other activations at a time.

    Raises:
        ValueError: a size is not positive, groups or heads do not divide, heads are of odd width,
            or there is no such checkpointing.

    Source: Saijo et al., "TF-Locoformer: Transformer with local modeling by convolution for speech
    separation and enhancement", IWAENC 2024, arXiv:2408.03440.

    >>> TFLocoformer().get_num_parameters()  # M, for two speakers in one channel
    14975620
    """

    separator_heads = ("mapping",)

    def __init__(
        self,
        in_channels: int = 2,
        out_channels: int = 4,
        dim: int = 128,
        num_blocks: int = 6,
        hidden_dim: int = 384,
        kernel_size: int = 4,
        num_heads: int = 4,
        attention_dim: int = 128,
        num_groups: int = 4,
        dropout: float = 0.0,
        activation_checkpointing: bool | str = False,
    ):
        super().__init__()
        layer = {
            "dim": dim,
            "hidden_dim": hidden_dim,
            "kernel_size": kernel_size,
            "num_heads": num_heads,
            "attention_dim": attention_dim,
            "num_groups": num_groups,
        }
        ends = {"in_channels": in_channels, "out_channels": out_channels}
        check_positive(ends | {"num_blocks": num_blocks} | layer)
        if activation_checkpointing not in CHECKPOINTING:
            raise ValueError(
                f"activation_checkpointing={activation_checkpointing!r}: choose among "
                + ", ".join(map(repr, CHECKPOINTING))
            )
        layer["dropout"] = dropout
        self.sizes = ends | {"num_blocks": num_blocks} | layer
        self.activation_checkpointing = activation_checkpointing
        self.encoder = nn.Sequential(
            nn.Conv2d(in_channels, dim, 3, padding=1), nn.GroupNorm(1, dim)
        )
        blocks = (TFLocoformerBlock(**layer) for _ in range(num_blocks))
        self.blocks = nn.ModuleList(blocks)
        self.decoder = nn.ConvTranspose2d(dim, out_channels, 3, padding=1)
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, in_channels, t, f)` to `(b, out_channels, t, f)`."""
        if x.ndim != 4 or x.shape[1] != self.sizes["in_channels"]:
            raise ValueError(
                f"expected (b, {self.sizes['in_channels']}, t, f), got {tuple(x.shape)}"
            )
        with torch.autocast(x.device.type, enabled=False):
            x = self.encoder(x)
        checkpointing = self.activation_checkpointing and torch.is_grad_enabled()
        for part in self._parts():
            x = checkpointed(part, x) if checkpointing else part(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.decoder(x)

    def _parts(self) -> list[nn.Module]:
        """The modules that checkpointing recomputes one at a time: the blocks, or their paths."""
        if self.activation_checkpointing == "path":
            return [path for block in self.blocks for path in block]
        return list(self.blocks)

    def get_num_parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())


def check_positive(sizes: dict[str, int]) -> None:
    """Refuse sizes below 1, by name."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")


def initialise(module: nn.Module) -> None:
    """Xavier for every matrix and kernel, zero for the biases beside them.

    Source: the released recipes of TF-Locoformer (`init: xavier_uniform`).
    """
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
