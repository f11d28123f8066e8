"""Operators on sequences of different lengths, which read the lengths in C++.

Where nobody knows the lengths, all are taken to be the longest: an upper bound, with a note.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tfswa_lab.memory.predict.unknown import user_line
from tfswa_lab.memory.predict.values import Values, real_tensors


def longest(values: Values, lengths: Any, most: int) -> int:
    """The longest of the lengths, or the most that it can be."""
    if isinstance(lengths, Tensor):
        known = values.of(lengths)
        if known is None:
            values.note(f"lengths at {user_line()}: unknown, all are taken to be the longest")
            return most
        with real_tensors():
            return int(known.max())
    return int(max(lengths)) if isinstance(lengths, list | tuple) else int(lengths)


class CTC(torch.autograd.Function):
    """Memory of `ctc_loss` on CUDA, without its numbers.

    Source: aten/src/ATen/native/cuda/LossCTC.cu of PyTorch 2.13 (sizes).
    """

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, targets: Tensor, longest_target: int) -> Tensor:
        """Losses (b,) of log_probs (t, b, c)."""
        frames, batch, _ = log_probs.shape
        alpha = log_probs.new_empty(batch, frames, 2 * longest_target + 1)
        losses = log_probs.new_empty(batch).uniform_()
        ctx.save_for_backward(log_probs, targets, alpha, losses)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The gradient, with as many backward variables as there were forward ones."""
        log_probs, _, alpha, _ = ctx.saved_tensors
        beta = torch.empty_like(alpha)
        grad = torch.empty_like(log_probs).uniform_()
        del beta
        return grad, None, None


def ctc_loss(
    calls: Any,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """`F.ctc_loss`; targets are padded, (b, s), or in a row."""
    if log_probs.dim() == 2:
        log_probs = log_probs.unsqueeze(1)  # (t, 1, c)
    longest_target = longest(calls.values, target_lengths, most=targets.shape[-1])
    losses = CTC.apply(log_probs.float(), targets, longest_target)
    return losses if reduction == "none" else getattr(losses, reduction)()


def pack(calls: Any, padded: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """`pack_padded_sequence` keeps the padding: rows (t · b, c), and b for each frame."""
    calls.values.note(
        f"packed sequences at {user_line()}: predicted with their padding, which takes more"
    )
    if batch_first:
        padded = padded.transpose(0, 1)  # (t, b, c)
    frames = longest(calls.values, lengths, most=padded.shape[0])
    rows = padded[:frames].reshape(frames * padded.shape[1], *padded.shape[2:])
    batch_sizes = torch.full((frames,), padded.shape[1], dtype=torch.int64)
    batch_sizes.lengths = lengths
    return rows, batch_sizes


def unpack(
    calls: Any,
    rows: Tensor,
    batch_sizes: Tensor,
    batch_first: bool,
    padding_value: float,
    total_length: int,
) -> tuple[Tensor, Tensor]:
    """`pad_packed_sequence`: the frames again, and the lengths."""
    frames = batch_sizes.shape[0]
    padded = rows.reshape(frames, -1, *rows.shape[1:])  # (t, b, c)
    if total_length > frames:
        missing = padded.new_zeros(total_length - frames, *padded.shape[1:])
        padded = torch.cat([padded, missing])
    return padded.transpose(0, 1) if batch_first else padded, batch_sizes.lengths


def recurrent(function: Any) -> Any:
    """`torch.lstm` and the like, which take packed rows or padded frames."""

    def run(calls: Any, x: Tensor, second: Any, *rest: Any) -> tuple[Tensor, ...]:
        if not (isinstance(second, Tensor) and second.dtype is torch.int64):
            return function(x, second, *rest)
        hidden, *options = rest
        frames = x.reshape(second.shape[0], -1, x.shape[-1])  # (t, b, c)
        output, *states = function(frames, hidden, *options, False)
        return (output.flatten(0, 1), *states)

    return run
