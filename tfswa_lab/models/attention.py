"""Attention over a spectrogram: along time, along frequency, and inside shifted windows.

Axis letters: `b` batch, `c` channels, `t` frames, `f` frequency bins, `h` heads, `d` head width,
`l` tokens of one sequence. A spectrogram is `(b, c, t, f)`, a sequence of tokens `(b, l, c)`.

Notebook: 02_attention_blocks
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tfswa_lab.models.lean_inference import in_rectangles, runs_lean
from tfswa_lab.models.symbolic import is_traced, round_up

# The most sequences that CUDA's fused kernels take at once: with more, cuDNN's kernel fails
# (PyTorch issue 181235), and so does flash attention (issue 146704).
MOST_SEQUENCES = 65_535


class ScaledDotProductAttention(nn.Module):
    """`softmax(q kᵀ / √d) v`, written out: unlike the fused kernels it keeps all `l × l` scores.

    Source: Vaswani et al., "Attention is all you need", 2017, eq. 1.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            query, key, value: `(…, l, d)`.
            mask: boolean, broadcastable to `(…, l, l)`; True where a query may see a key.

        Returns:
            Output `(…, l, d)` and the weights `(…, l, l)`, whose rows sum to one.
        """
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5  # (…, l, l)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = scores.softmax(-1)
        return weights @ value, weights


class MultiHeadAttention(nn.Module):
    """Self-attention in `num_heads` subspaces, through torch's fused kernel.

    Args:
        dim: c, a multiple of `num_heads`.
        num_heads: h.

    >>> MultiHeadAttention(dim=16, num_heads=2)(torch.zeros(3, 10, 16)).shape
    torch.Size([3, 10, 16])
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} cannot be split into num_heads={num_heads} equal heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, need_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend within each sequence of `tokens` `(b, l, c)`.

        Args:
            mask: boolean, broadcastable to `(b, h, l, l)`; True where a query may see a key.
            need_weights: also return the attention maps `(b, h, l, l)`; this keeps every score in
                memory, because the fused kernel cannot return them.
        """
        query, key, value = rearrange(
            self.qkv(tokens), "b l (qkv h d) -> qkv b h l d", qkv=3, h=self.num_heads
        )
        if need_weights:
            output, weights = ScaledDotProductAttention()(query, key, value, mask)
            return self.proj(rearrange(output, "b h l d -> b l (h d)")), weights
        output = fused_attention(query, key, value, mask)
        return self.proj(rearrange(output, "b h l d -> b l (h d)"))


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention `(b, h, l, d)` by torch's fused kernel, in parts if it cannot take all at once.

    Args:
        mask: boolean `(b or 1, h or 1, l, l)`, None for none.
    """
    if is_traced() or len(query) <= MOST_SEQUENCES:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    parts = [x.split(MOST_SEQUENCES) for x in (query, key, value)]
    same = mask is None or len(mask) == 1
    masks = [mask] * len(parts[0]) if same else mask.split(MOST_SEQUENCES)
    outputs = [F.scaled_dot_product_attention(*part) for part in zip(*parts, masks, strict=True)]
    return torch.cat(outputs)


class AttentionUnit(nn.Module):
    """One pre-norm transformer layer on tokens: attention, then an MLP, each with a residual.

    Args:
        dim: c.
        num_heads: h.
        mlp_ratio: width of the MLP's hidden layer in units of c.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int = 4):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = MultiHeadAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp(dim, mlp_ratio)

    def attend(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens `(b, l, c)` to tokens of the same shape."""
        tokens = tokens + self.attention(self.norm1(tokens), mask)
        return tokens + self.mlp(self.norm2(tokens))


def mlp(dim: int, ratio: int) -> nn.Sequential:
    """Widen, GELU, narrow, token by token."""
    return nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim))


class TemporalSequenceAttention(AttentionUnit):
    """TSA: every frequency bin attends over its own frames and sees no other bin.

    Source: Yao et al., EURASIP J. Adv. Signal Process. 2025:39, Sec. 3.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`(b, c, t, f)` to the same shape."""
        if runs_lean(self, x):
            t, f = x.shape[2:]
            return in_rectangles(self, x.mT, range(f + 1), (0, t)).mT
        tokens = rearrange(x, "b c t f -> (b f) t c")
        return rearrange(self.attend(tokens), "(b f) t c -> b c t f", f=x.shape[3])


class FrequencySequenceAttention(AttentionUnit):
    """FSA: every frame attends over its own frequency bins and sees no other frame.

    Source: Yao et al., EURASIP J. Adv. Signal Process. 2025:39, Sec. 3.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`(b, c, t, f)` to the same shape."""
        if runs_lean(self, x):
            t, f = x.shape[2:]
            return in_rectangles(self, x, range(t + 1), (0, f))
        tokens = rearrange(x, "b c t f -> (b t) f c")
        return rearrange(self.attend(tokens), "(b t) f c -> b c t f", t=x.shape[2])


class ShiftedWindowAttention(AttentionUnit):
    """SWA: attention inside windows of the time-frequency plane, on a grid that may be shifted.

    With `shift_size=0` (W-MSA) the windows tile the plane from its corner; with half a window
    (SW-MSA) they cross the borders of the former, so information passes from one window to the
    next. The shift is a cyclic roll, which joins opposite ends of the plane in one window, and
    sizes that are no multiple of the window are padded. An exact mask separates joined and padded
    cells: two cells see each other if and only if `window_regions` gives them the same region.

    Args:
        dim: c.
        num_heads: h.
        window_size: in cells, one number or `(frames, bins)`.
        shift_size: in cells, one number or `(frames, bins)`, less than the window.
        mlp_ratio: width of the MLP's hidden layer in units of c.

    Source: Liu et al., "Swin Transformer", ICCV 2021, Sec. 3.2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | tuple[int, int] = 8,
        shift_size: int | tuple[int, int] = 0,
        mlp_ratio: int = 4,
    ):
        super().__init__(dim, num_heads, mlp_ratio)
        self.window_size = _pair(window_size)
        self.shift_size = _pair(shift_size)
        for window, shift in zip(self.window_size, self.shift_size, strict=True):
            if not 0 <= shift < window:
                raise ValueError(
                    f"shift_size={shift_size} must lie between 0 and window_size={window_size} - 1"
                )

    def forward(self, x: Tensor) -> Tensor:
        """`(b, c, t, f)` to the same shape, for any `t` and `f`."""
        b, _, t, f = x.shape
        shift_t, shift_f = self.shift_size
        if runs_lean(self, x):  # the regions of the mask are the rectangles of the shifted grid
            borders = (
                sorted({0, *range(shift, size, window), size})
                for size, window, shift in zip(
                    (t, f), self.window_size, self.shift_size, strict=True
                )
            )
            return in_rectangles(self, x, *borders)
        x = pad_to_windows(x, self.window_size)
        x = x.roll((-shift_t, -shift_f), dims=(2, 3))
        tokens = self.attend(window_partition(x, self.window_size), self._mask(b, t, f, x.device))
        x = window_merge(tokens, self.window_size, x.shape)
        return x.roll((shift_t, shift_f), dims=(2, 3))[:, :, :t, :f]

    def _tiles(self, t: int, f: int) -> bool:
        """Whether the windows tile the plane as it is."""
        exact = t % self.window_size[0] == 0 and f % self.window_size[1] == 0
        return exact and self.shift_size == (0, 0)

    def _mask(self, b: int, t: int, f: int, device: torch.device) -> Tensor | None:
        if not is_traced() and self._tiles(t, f):
            return None  # nothing joined or padded: torch can use its fastest kernel
        mask = window_mask(t, f, self.window_size, self.shift_size, device)
        return mask.repeat(b, 1, 1)[:, None]  # (b·windows, 1, l, l)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def pad_to_windows(x: Tensor, window_size: tuple[int, int]) -> Tensor:
    """Append zeros to `(b, c, t, f)` until t and f are multiples of the window."""
    t, f = x.shape[2:]
    return F.pad(x, (0, round_up(f, window_size[1]) - f, 0, round_up(t, window_size[0]) - t))


def window_partition(x: Tensor, window_size: tuple[int, int]) -> Tensor:
    """Cut `(b, c, t, f)` into windows of tokens, `(b·windows, l, c)`, time-major.

    >>> window_partition(torch.zeros(1, 5, 16, 24), (8, 8)).shape
    torch.Size([6, 64, 5])
    """
    return rearrange(
        x, "b c (nt wt) (nf wf) -> (b nt nf) (wt wf) c", wt=window_size[0], wf=window_size[1]
    )


def window_merge(tokens: Tensor, window_size: tuple[int, int], shape: torch.Size) -> Tensor:
    """Undo `window_partition`; `shape` is the `(b, c, t, f)` that was cut."""
    window_t, window_f = window_size
    return rearrange(
        tokens,
        "(b nt nf) (wt wf) c -> b c (nt wt) (nf wf)",
        nt=shape[2] // window_t,
        nf=shape[3] // window_f,
        wt=window_t,
    )


def window_regions(size: int, window: int, shift: int, device: torch.device) -> Tensor:
    """The region of each position along one axis of `size` cells, padded to whole windows.

    Real cells get the number of their window on the shifted grid (-1 for those before its first
    line, which the roll moves to the other end), padded cells get -2.

    >>> window_regions(7, window=4, shift=2, device="cpu").tolist()
    [-1, -1, 0, 0, 0, 0, 1, -2]
    """
    positions = torch.arange(round_up(size, window), device=device)
    regions = torch.div(positions - shift, window, rounding_mode="floor")
    return regions.masked_fill(positions >= size, -2)


def window_mask(
    t: int, f: int, window_size: tuple[int, int], shift_size: tuple[int, int], device: torch.device
) -> Tensor:
    """Which tokens may see each other: boolean `(windows, l, l)` for a plane of `t × f` cells.

    Two tokens of a window see each other if they lie in one region along both axes. Padded cells
    see only each other; the caller cuts them off.

    Source: Liu et al., ICCV 2021, Fig. 4.
    """
    regions_t = window_regions(t, window_size[0], shift_size[0], device)
    regions_f = window_regions(f, window_size[1], shift_size[1], device)
    regions = regions_t[:, None] * (regions_f.shape[0] + 3) + regions_f  # one number per pair
    rolled = regions.roll((-shift_size[0], -shift_size[1]), dims=(0, 1))
    windows = window_partition(rolled[None, None], window_size)[..., 0]  # (windows, l)
    return windows[:, :, None] == windows[:, None, :]
