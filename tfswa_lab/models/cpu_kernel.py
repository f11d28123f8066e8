"""An attention unit of a spectrogram in one pass through a CPU's cache, compiled by numba.

torch runs a unit as a dozen operators, and each writes the whole plane to memory: transposed
copies, normalised tokens, queries, hidden layers. Here a thread takes one rectangle of the plane,
whose tokens attend to each other, through the whole unit before it takes the next, and what it
needs stays in the cache. Channels are rows, and neighbouring tokens fill a register, so narrow
heads waste nothing: torch's fused kernel multiplies matrices, which are too thin with 8 channels.

Axis letters: `b` batch, `c` channels, `t` frames, `f` frequency bins, `l` tokens of a rectangle.
Inside the kernels, everything is `(channels, l)` in float32.

Notebook: 09_running_lean
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.profiler import record_function

if TYPE_CHECKING:
    from collections.abc import Callable

    from tfswa_lab.models.attention import AttentionUnit

LANES = 16  # float32 numbers in the widest register: rows of buffers are multiples of it
BLOCK = 4  # channels, or queries, that a loop handles at once
TILE = 256  # tokens that go from layer to layer together
LOG2_E = 1.4426950408889634
# Scores are in bits, so that a softmax takes powers of two. Up to this one, no sum overflows.
MOST_BITS = 60.0
# Sums may be reordered, so that each lane of a register adds up its own; NaN stays NaN.
SUMS = {"contract", "reassoc", "nsz", "arcp"}

f32, i32 = np.float32, np.int32
AS_WEIGHTS = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are


def compiled(fastmath: set[str]) -> Callable:
    """numba's decorator, with code kept on disk if there is a folder for it."""

    def decorate(function: Callable) -> Callable:
        options = {"fastmath": fastmath, "nogil": True, "error_model": "numpy"}
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # neither this folder nor the user's cache can be written
            return njit(**options)(function)

    return decorate


# Functions of one number ---------------------------------------------------------------------


@compiled({"contract"})  # reordered, the rounding below would cancel
def exp2(x):
    """2ˣ, for x up to 127; below -126 as at -126."""
    x = f32(-126.0) if x < f32(-126.0) else x
    shifted = x + f32(12_582_912.0)  # 1.5 · 2²³: its last bits become the nearest integer
    rest = x - (shifted - f32(12_582_912.0))  # from -0.5 to 0.5
    # The polynomial whose largest relative error in that interval is the smallest: 7.5e-8.
    power = f32(1.327647187e-3)
    power = power * rest + f32(9.675541333e-3)
    power = power * rest + f32(5.550713274e-2)
    power = power * rest + f32(0.2402211972)
    power = power * rest + f32(0.6931469671)
    power = power * rest + f32(1.000000072)
    exponent = f32(shifted).view(i32) << i32(23)
    return i32(f32(power).view(i32) + exponent).view(f32)


@compiled(SUMS)
def gelu(x):
    """x Φ(x).

    Source of erfc, to 1.5e-7: Abramowitz & Stegun, "Handbook of Mathematical Functions", 7.1.26.
    """
    z = abs(x) * f32(0.70710678)
    t = f32(1.0) / (f32(1.0) + f32(0.3275911) * z)
    series = f32(1.061405429) * t + f32(-1.453152027)
    series = series * t + f32(1.421413741)
    series = series * t + f32(-0.284496736)
    series = (series * t + f32(0.254829592)) * t
    erfc = series * exp2(z * z * f32(-LOG2_E))
    half = f32(0.5) * x
    return half + abs(half) * (f32(1.0) - erfc)


# Layers, `n` tokens at once: those from column `at` of `x` to the first columns of `out` ----------


@compiled(SUMS)
def normalise(x, at, n, weight, bias, epsilon, moments, out):
    """Layer norm over the rows of `x`."""
    mean, scale = moments[0, :n], moments[1, :n]
    mean[:] = f32(0.0)
    scale[:] = f32(epsilon)
    share = f32(1.0) / f32(x.shape[0])
    for c in range(x.shape[0]):
        row = x[c, at : at + n]
        for j in range(n):
            mean[j] += row[j] * share
    for c in range(x.shape[0]):
        row = x[c, at : at + n]
        for j in range(n):
            off = row[j] - mean[j]
            scale[j] += off * off * share
    for j in range(n):
        scale[j] = f32(1.0) / np.sqrt(scale[j])
    for c in range(x.shape[0]):
        row, normed, gain, shift = x[c, at : at + n], out[c], weight[c], bias[c]
        for j in range(n):
            normed[j] = (row[j] - mean[j]) * scale[j] * gain + shift


@compiled(SUMS)
def linear(weight, bias, x, at, out, out_at, n):
    """`weight @ x + bias`, to the columns of `out` from `out_at` on.

    Four rows of results at once share what they load. Slices begin at 0, so numba need not ask
    whether an index is negative. The loop inside stands in `score`, too: as a function of rows and
    results it takes up to three times as long, because numba counts references to their arrays.
    """
    for o in range(0, len(weight), BLOCK):
        a, b, c, d = weight[o], weight[o + 1], weight[o + 2], weight[o + 3]
        out_a, out_b = out[o, out_at : out_at + n], out[o + 1, out_at : out_at + n]
        out_c, out_d = out[o + 2, out_at : out_at + n], out[o + 3, out_at : out_at + n]
        out_a[:], out_b[:], out_c[:], out_d[:] = bias[o], bias[o + 1], bias[o + 2], bias[o + 3]
        for i in range(0, weight.shape[1], BLOCK):
            a0, a1, a2, a3 = a[i], a[i + 1], a[i + 2], a[i + 3]
            b0, b1, b2, b3 = b[i], b[i + 1], b[i + 2], b[i + 3]
            c0, c1, c2, c3 = c[i], c[i + 1], c[i + 2], c[i + 3]
            d0, d1, d2, d3 = d[i], d[i + 1], d[i + 2], d[i + 3]
            row0, row1 = x[i, at : at + n], x[i + 1, at : at + n]
            row2, row3 = x[i + 2, at : at + n], x[i + 3, at : at + n]
            for j in range(n):
                x0, x1, x2, x3 = row0[j], row1[j], row2[j], row3[j]
                out_a[j] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
                out_b[j] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
                out_c[j] += c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3
                out_d[j] += d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3


@compiled(SUMS)
def activate(hidden, n):
    """GELU in place."""
    for o in range(len(hidden)):
        row = hidden[o]
        for j in range(n):
            row[j] = gelu(row[j])


@compiled(SUMS)
def add(x, to, at, n):
    """Add the first columns of `x` to those of `to` from `at` on."""
    for c in range(len(x)):
        row, target = x[c], to[c, at : at + n]
        for j in range(n):
            target[j] += row[j]


# Attention of one head: its queries, keys and values are `(d, n)` --------------------------------


@compiled(SUMS)
def largest_square(x, row, width, n):
    """Of the lengths of the columns of so many rows of `x`, from `row` on."""
    most = f32(0.0)
    for j in range(n):
        square = f32(0.0)
        for d in range(row, row + width):
            square += x[d, j] * x[d, j]
        if not square <= most:  # NaN stays
            most = square
    return most


@compiled(SUMS)
def score(x, query, key, width, at, n, scores):
    """Scores of four queries, in columns from `at` on, with all keys, to four rows of `scores`."""
    one, two, three, four = scores[0], scores[1], scores[2], scores[3]
    for i in range(0, width, BLOCK):
        q = query + i
        a0, a1, a2, a3 = x[q, at], x[q + 1, at], x[q + 2, at], x[q + 3, at]
        b0, b1, b2, b3 = x[q, at + 1], x[q + 1, at + 1], x[q + 2, at + 1], x[q + 3, at + 1]
        c0, c1, c2, c3 = x[q, at + 2], x[q + 1, at + 2], x[q + 2, at + 2], x[q + 3, at + 2]
        d0, d1, d2, d3 = x[q, at + 3], x[q + 1, at + 3], x[q + 2, at + 3], x[q + 3, at + 3]
        row0, row1, row2, row3 = x[key + i], x[key + i + 1], x[key + i + 2], x[key + i + 3]
        if i == 0:
            for j in range(n):
                one[j] = two[j] = three[j] = four[j] = f32(0.0)
        for j in range(n):
            x0, x1, x2, x3 = row0[j], row1[j], row2[j], row3[j]
            one[j] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
            two[j] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
            three[j] += c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3
            four[j] += d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3


@compiled(SUMS)
def softmax(scores, n, small):
    """Scores in bits to powers of two, in place, and the factor that makes their sum one.

    Large scores lose their maximum first, so that no power overflows.
    """
    most = f32(0.0)
    if not small:
        most = scores[0]
        for j in range(n):
            most = max(most, scores[j])
    total = f32(0.0)
    for j in range(n):
        power = exp2(scores[j] - most)
        scores[j] = power
        total += power
    return f32(1.0) / total


@compiled(SUMS)
def mix(x, value, width, scores, factors, at, n, mixed, to):
    """The values, weighted for four queries, to four columns of `mixed` from `at` on."""
    one, two, three, four = scores[0], scores[1], scores[2], scores[3]
    p, q, r, s = factors
    for i in range(0, width, BLOCK):
        v = value + i
        row0, row1, row2, row3 = x[v], x[v + 1], x[v + 2], x[v + 3]
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = f32(0.0)
        c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = f32(0.0)
        for j in range(n):
            a, b, c, d = one[j], two[j], three[j], four[j]
            x0, x1, x2, x3 = row0[j], row1[j], row2[j], row3[j]
            a0, a1, a2, a3 = a0 + a * x0, a1 + a * x1, a2 + a * x2, a3 + a * x3
            b0, b1, b2, b3 = b0 + b * x0, b1 + b * x1, b2 + b * x2, b3 + b * x3
            c0, c1, c2, c3 = c0 + c * x0, c1 + c * x1, c2 + c * x2, c3 + c * x3
            d0, d1, d2, d3 = d0 + d * x0, d1 + d * x1, d2 + d * x2, d3 + d * x3
        sums = (
            (a0 * p, b0 * q, c0 * r, d0 * s),
            (a1 * p, b1 * q, c1 * r, d1 * s),
            (a2 * p, b2 * q, c2 * r, d2 * s),
            (a3 * p, b3 * q, c3 * r, d3 * s),
        )
        for row in range(BLOCK):
            for column in range(BLOCK):
                mixed[to + i + row, at + column] = sums[row][column]


@compiled(SUMS)
def attend(qkv, heads, n, scores, mixed):
    """All heads of a rectangle, from `qkv` to `mixed`; four queries at once.

    The last may lie behind the last token, in columns that nobody reads.
    """
    channels = len(mixed)
    width = channels // heads
    for query in range(0, channels, width):
        key, value = channels + query, 2 * channels + query
        # No score is above the product of both lengths (Cauchy and Schwarz).
        most = largest_square(qkv, query, width, n) * largest_square(qkv, key, width, n)
        small = most <= f32(MOST_BITS * MOST_BITS)
        for at in range(0, n, BLOCK):
            score(qkv, query, key, width, at, n, scores)
            factors = (
                softmax(scores[0], n, small),
                softmax(scores[1], n, small),
                softmax(scores[2], n, small),
                softmax(scores[3], n, small),
            )
            mix(qkv, value, width, scores, factors, at, n, mixed, query)


# The whole unit --------------------------------------------------------------------------------


class Weights(NamedTuple):
    """Of one unit; its queries give scores in bits."""

    norm1: np.ndarray
    bias1: np.ndarray
    qkv: np.ndarray  # (3·c, c)
    proj: np.ndarray  # (c, c)
    proj_bias: np.ndarray
    norm2: np.ndarray
    bias2: np.ndarray
    widen: np.ndarray  # (hidden, c)
    widen_bias: np.ndarray
    narrow: np.ndarray  # (c, hidden)
    narrow_bias: np.ndarray


class Buffers(NamedTuple):
    """What one thread needs for one rectangle."""

    tokens: np.ndarray  # (c, l)
    qkv: np.ndarray  # (3·c, l)
    mixed: np.ndarray  # (c, l)
    scores: np.ndarray  # (BLOCK, l)
    normed: np.ndarray  # (c, TILE)
    hidden: np.ndarray  # (hidden, TILE)
    moments: np.ndarray  # (2, TILE)
    zeros: np.ndarray  # (3·c,)


@compiled(SUMS)
def transform(weights, epsilons, heads, n, buffers):
    """Take the tokens of one rectangle through the unit, in place."""
    w, tokens, normed, hidden = weights, buffers.tokens, buffers.normed, buffers.hidden
    for at in range(0, n, TILE):
        m = min(TILE, n - at)
        normalise(tokens, at, m, w.norm1, w.bias1, epsilons[0], buffers.moments, normed)
        linear(w.qkv, buffers.zeros, normed, 0, buffers.qkv, at, m)
    attend(buffers.qkv, heads, n, buffers.scores, buffers.mixed)
    for at in range(0, n, TILE):
        m = min(TILE, n - at)
        linear(w.proj, w.proj_bias, buffers.mixed, at, normed, 0, m)
        add(normed, tokens, at, m)
        normalise(tokens, at, m, w.norm2, w.bias2, epsilons[1], buffers.moments, normed)
        linear(w.widen, w.widen_bias, normed, 0, hidden, 0, m)
        activate(hidden, m)
        linear(w.narrow, w.narrow_bias, hidden, 0, normed, 0, m)
        add(normed, tokens, at, m)


@compiled(SUMS)
def transform_all(x, out, rows, columns, first, last, weights, epsilons, heads, buffers):
    """Take the rectangles between neighbouring `rows` and `columns` of `x` `(b, c, t, f)` through.

    They are counted along columns, then rows, then examples; this does `first` to `last - 1`.
    """
    across, down = len(columns) - 1, len(rows) - 1
    channels, tokens = x.shape[1], buffers.tokens
    for index in range(first, last):
        b, r, k = index // (across * down), index // across % down, index % across
        top, bottom, left, right = rows[r], rows[r + 1], columns[k], columns[k + 1]
        size = right - left
        for c in range(channels):
            for t in range(top, bottom):
                at = (t - top) * size
                tokens[c, at : at + size] = x[b, c, t, left:right]
        transform(weights, epsilons, heads, (bottom - top) * size, buffers)
        for c in range(channels):
            for t in range(top, bottom):
                at = (t - top) * size
                out[b, c, t, left:right] = tokens[c, at : at + size]


def attention_unit(unit: AttentionUnit, x: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """`unit` inside each rectangle of `x` `(b, c, t, f)` between neighbouring borders.

    Args:
        unit: gives the weights, float32 like `x`. `lean_inference.runs_lean` has checked it: the
            kernel looks at no index.
        x: contiguous, on the CPU.
        rows: borders along t, from 0 to t.
        columns: borders along f, from 0 to f.
    """
    tokens = max(map(int, np.diff(rows))) * max(map(int, np.diff(columns)))
    weights, epsilons = weights_of(unit), (unit.norm1.eps, unit.norm2.eps)
    out = torch.empty_like(x)
    arrays = x.detach().numpy(), out.numpy(), np.array(rows), np.array(columns)

    def work(first: int, last: int) -> None:
        heads, buffers = unit.attention.num_heads, buffers_for(weights, tokens)
        transform_all(*arrays, first, last, weights, epsilons, heads, buffers)

    rectangles = len(x) * (len(rows) - 1) * (len(columns) - 1)
    share = math.ceil(rectangles / torch.get_num_threads())
    starts = range(0, rectangles, share)
    ends = [min(start + share, rectangles) for start in starts]
    # A profiler sees the whole as one operator.
    with record_function("tfswa_lab::attention_unit"):
        if len(starts) == 1:
            work(0, rectangles)
        else:
            with ThreadPoolExecutor(len(starts)) as threads:
                list(threads.map(work, starts, ends))
    return out


def weights_of(unit: AttentionUnit) -> Weights:
    """The weights of a unit; those of queries make scores `q k / √d` in bits."""
    attention, (widen, _, narrow) = unit.attention, unit.mlp
    dim = len(attention.proj.weight)
    scale = torch.ones(3 * dim, 1, **AS_WEIGHTS)
    scale[:dim] = LOG2_E / math.sqrt(dim // attention.num_heads)
    tensors = (
        *(unit.norm1.weight, unit.norm1.bias, attention.qkv.weight * scale),
        *(attention.proj.weight, attention.proj.bias, unit.norm2.weight, unit.norm2.bias),
        *(widen.weight, widen.bias, narrow.weight, narrow.bias),
    )
    return Weights(*(tensor.detach().contiguous().numpy() for tensor in tensors))


def buffers_for(weights: Weights, tokens: int) -> Buffers:
    """Memory for rectangles of up to so many tokens; torch's begins on the border of a register."""
    columns = tokens + -tokens % LANES
    dim, hidden = len(weights.proj), len(weights.widen)
    long = (dim, columns), (3 * dim, columns), (dim, columns), (BLOCK, columns)
    shapes = (*long, (dim, TILE), (hidden, TILE), (2, TILE), (3 * dim,))
    return Buffers(*(torch.zeros(shape, **AS_WEIGHTS).numpy() for shape in shapes))
