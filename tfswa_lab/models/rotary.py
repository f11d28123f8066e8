"""Rotary positions: queries and keys turn with their position, so scores depend on distances.

Axis letters: `n` sequences, `l` tokens of one sequence, `c` channels, `h` heads, `d` head width.

Notebook: 04_tf_locoformer
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def rotary_angles(
    length: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The angle `(l, d/2)` by which each pair of channels turns at each position, in radians.

    Pair i turns by `position / 10000^(2i / width)`: the first fast, the last slowly. Nothing is
    cached, because the table is small and a cache with an entry for each length would grow.

    Args:
        length: l.
        width: d, even.
        dtype: float32 or better: in float16, position 2049 is position 2048.
        device: of the result.

    Source: Su et al., "RoFormer", 2021, eq. 15.

    >>> rotary_angles(3, 4)
    tensor([[0.0000, 0.0000],
            [1.0000, 0.0100],
            [2.0000, 0.0200]])
    """
    positions = torch.arange(length, dtype=dtype, device=device)
    pairs = torch.arange(0, width, 2, dtype=dtype, device=device)
    return positions[:, None] * 10_000 ** (-pairs / width)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of `x` `(…, l, d)` by its angle `(l, d/2)`.

    The result has the dtype of `x`: float32 cosines would promote bfloat16 to float32, which takes
    twice the memory and excludes flash attention on CUDA.

    Source: Su et al., "RoFormer", 2021, eq. 34.
    """
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]  # (…, l, d/2)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2)  # (…, l, d/2, 2) to (…, l, d)


class RotaryAttention(nn.Module):
    """Self-attention with rotary positions, through torch's fused kernel.

    Args:
        dim: c.
        attention_dim: width of all heads together, h · d; d must be even.
        num_heads: h.
        dropout: share of the attention weights and of the outputs set to 0 in training. torch's
            fused CPU kernels have no dropout: above 0, training keeps all `l × l` scores.

    Raises:
        ValueError: heads that do not divide the width, or of odd width.

    Source: Saijo et al., "TF-Locoformer", IWAENC 2024.

    >>> RotaryAttention(dim=24, attention_dim=16, num_heads=2)(torch.zeros(3, 10, 24)).shape
    torch.Size([3, 10, 24])
    """

    def __init__(self, dim: int, attention_dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        if attention_dim % num_heads:
            raise ValueError(
                f"attention_dim={attention_dim} cannot be split into num_heads={num_heads} "
                "equal heads"
            )
        if attention_dim // num_heads % 2:
            raise ValueError(
                f"attention_dim={attention_dim} makes num_heads={num_heads} heads of odd width "
                f"{attention_dim // num_heads}; rotary positions turn pairs of channels"
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * attention_dim, bias=False)
        self.proj = nn.Linear(attention_dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend within each sequence of `tokens` `(n, l, c)`."""
        query, key, value = rearrange(
            self.qkv(tokens), "n l (qkv h d) -> qkv n h l d", qkv=3, h=self.num_heads
        )
        dtype = torch.promote_types(query.dtype, torch.float32)
        angles = rotary_angles(*query.shape[-2:], dtype, query.device)
        output = F.scaled_dot_product_attention(
            rotate(query, angles),
            rotate(key, angles),
            value.contiguous(),  # a view would also keep the unrotated query and key alive
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return self.dropout(self.proj(rearrange(output, "n h l d -> n l (h d)")))
