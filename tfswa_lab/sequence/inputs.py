"""What every function of this room accepts, checked once.

Axis letters: `b` sequences, `t` frames, `k` states.

Notebook: 11_hmm
"""

from __future__ import annotations

from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROW_SUM_TOLERANCE = 1e-4


class Problem(NamedTuple):
    """A checked batch: what an engine works on.

    Attributes:
        log_emissions: `(b, t, k)`, log p(x_t | z_t = k), float32 or float64; padding is arbitrary.
        startprob: `(k)` or `(b, k)`.
        transmat: `(k, k)`, or `(b, t - 1, k, k)` where it changes with time (padding: uniform).
        lengths: `(b)`, int64, on the CPU.
    """

    log_emissions: Tensor
    startprob: Tensor
    transmat: Tensor
    lengths: Tensor

    @property
    def varies(self) -> bool:
        """Whether the transitions change with time."""
        return self.transmat.ndim == 4

    def detached(self) -> Problem:
        """The same without gradients."""
        return Problem(*(tensor.detach() for tensor in self))

    def select(self, which: Tensor) -> Problem:
        """Some of the sequences, by index."""
        start, transitions = self.startprob, self.transmat
        return Problem(
            self.log_emissions[which],
            start[which] if start.ndim == 2 else start,
            transitions[which] if self.varies else transitions,
            self.lengths[which.to(self.lengths.device)],
        )


class Smoothed(NamedTuple):
    """What a smoother returns.

    Attributes:
        log_likelihood: `(b)`, float64.
        states: `(b, t, k)`, p(z_t = k | x_1 … x_T).
        transitions: `(b, k, k)` expected transitions, or `(b, t - 1, k, k)` for each step.
    """

    log_likelihood: Tensor
    states: Tensor
    transitions: Tensor


def check_sizes(**sizes: int) -> None:
    """Refuse sizes that are not whole numbers from 1 on.

    Raises:
        ValueError: with the name and the value.
    """
    for name, value in sizes.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}, expected a whole number of 1 or more")


def checked(
    log_emissions: Tensor, startprob: Tensor, transmat: Tensor, lengths: Tensor | None
) -> tuple[Problem, bool]:
    """Check the inputs of a hidden Markov model, and say whether they had a batch axis.

    While `torch.compile` or `torch.export` traces, shapes are checked and values are not.

    Raises:
        ValueError: a shape, a length, a probability or an emission that cannot be.
    """
    log_emissions, batched = as_batch(log_emissions)
    b, t, k = log_emissions.shape
    startprob = _like(startprob, log_emissions)
    transmat = _like(transmat, log_emissions)
    lengths = checked_lengths(lengths, b, t)
    if transmat.ndim == 3 and not batched:
        transmat = transmat[None]
    if startprob.shape not in ((k,), (b, k)):
        raise ValueError(f"startprob has shape {tuple(startprob.shape)}, expected ({k},)")
    if transmat.shape not in ((k, k), (b, t - 1, k, k)):
        raise ValueError(
            f"transmat has shape {tuple(transmat.shape)}, expected ({k}, {k}), or "
            f"({b}, {t - 1}, {k}, {k}) for transitions that change with time"
        )
    if transmat.ndim == 4:
        transmat = _without_padding(transmat, lengths)
    if not torch.compiler.is_compiling():
        check_distributions("startprob", startprob)
        check_distributions("transmat", transmat)
        check_emissions(log_emissions, lengths)
    return Problem(log_emissions, startprob, transmat, lengths), batched


def as_batch(log_emissions: Tensor) -> tuple[Tensor, bool]:
    """Log emissions as `(b, t, k)` in float32 or float64, and whether there was a batch axis."""
    log_emissions = torch.as_tensor(log_emissions)
    if log_emissions.ndim not in (2, 3) or 0 in log_emissions.shape:
        raise ValueError(
            f"log_emissions has shape {tuple(log_emissions.shape)}, expected "
            "(sequences, frames, states) or (frames, states)"
        )
    if not log_emissions.is_floating_point():
        raise ValueError(f"log_emissions has dtype {log_emissions.dtype}, expected a float")
    if log_emissions.dtype not in (torch.float32, torch.float64):
        log_emissions = log_emissions.float()  # a recursion in half precision is wrong
    batched = log_emissions.ndim == 3
    return (log_emissions if batched else log_emissions[None]), batched


def _like(tensor: Tensor, reference: Tensor) -> Tensor:
    """Probabilities on the device of the emissions; float64 stays, all else becomes their dtype."""
    tensor = torch.as_tensor(tensor)
    dtype = tensor.dtype if tensor.dtype == torch.float64 else reference.dtype
    return tensor.to(reference.device, dtype)


def checked_lengths(lengths: Tensor | None, sequences: int, frames: int) -> Tensor:
    """Lengths as int64 on the CPU; all frames where none are given.

    Raises:
        ValueError: their number is wrong, or one is below 1 or beyond the frames.
    """
    if lengths is None:
        return torch.full((sequences,), frames, dtype=torch.int64)
    lengths = torch.as_tensor(lengths)
    if lengths.shape != (sequences,) or lengths.is_floating_point():
        raise ValueError(
            f"lengths has shape {tuple(lengths.shape)} and dtype {lengths.dtype}, expected "
            f"one whole number for each of {sequences} sequences"
        )
    if torch.compiler.is_compiling():
        return lengths.long()
    lengths = lengths.to("cpu", torch.int64)
    wrong = ((lengths < 1) | (lengths > frames)).nonzero()
    if len(wrong):
        place = int(wrong[0])
        raise ValueError(
            f"sequence {place} has length {int(lengths[place])}, expected 1 to {frames} frames"
        )
    return lengths


def inside(lengths: Tensor, frames: int, device: torch.device | None = None) -> Tensor:
    """Which frames belong to a sequence, `(b, t)`."""
    device = device or lengths.device
    return torch.arange(frames, device=device) < lengths.to(device)[:, None]


def check_range(name: str, values: Tensor, valid: Tensor, number: int) -> None:
    """Refuse whole numbers `(b, t)` that are not 0 … number - 1 where `valid`.

    Raises:
        ValueError: names the first of them and its place.
    """
    wrong = (valid & ((values < 0) | (values >= number))).nonzero()
    if len(wrong):
        b, t = wrong[0].tolist()
        raise ValueError(
            f"{name} {int(values[b, t])} in sequence {b}, frame {t}: there are "
            f"{number} {name}s, 0 to {number - 1}"
        )


def replace_rows(results: tuple[Tensor, ...], which: Tensor, rest: tuple[Tensor, ...]) -> None:
    """Put the results of some sequences, by index, in their places."""
    for result, right in zip(results, rest, strict=True):
        result[which] = right.to(result)


def _without_padding(transmat: Tensor, lengths: Tensor) -> Tensor:
    """Transitions that change with time, uniform behind the end of a sequence."""
    steps = inside(lengths - 1, transmat.shape[1], transmat.device)[:, :, None, None]
    return torch.where(steps, transmat, 1 / transmat.shape[-1])


def check_distributions(name: str, rows: Tensor) -> None:
    """Refuse rows (the last axis) that are no distributions.

    Raises:
        ValueError: names the row, and its sum or its entry.
    """
    rows = rows.detach().cpu().numpy()  # whose small operations take half the time of torch's
    if not rows.size:  # no step, for one frame
        return
    sums = rows.sum(-1, dtype=np.float64)
    errors = np.abs(sums - 1)
    if rows.min() >= 0 and errors.max() <= ROW_SUM_TOLERANCE:  # False for NaN
        return
    if not (rows >= 0).all():
        place = tuple(np.argwhere(~(rows >= 0))[0].tolist())
        where = ", ".join(map(str, place))
        raise ValueError(f"{name}[{where}] is {float(rows[place]):.6g}, expected a probability")
    place = tuple(np.argwhere(errors > ROW_SUM_TOLERANCE)[0].tolist())
    row = f" row {', '.join(map(str, place))}" if place else ""
    raise ValueError(f"{name}{row} sums to {float(sums[place]):.6g}, expected 1: normalise it")


def check_emissions(log_emissions: Tensor, lengths: Tensor) -> None:
    """Refuse NaN and +inf inside a sequence.

    Raises:
        ValueError: names the first place.
    """
    if bool(log_emissions.detach().amax() < torch.inf):  # NaN fails the comparison
        return
    there = inside(lengths, log_emissions.shape[1], log_emissions.device)[..., None]
    wrong = (there & ~(log_emissions < torch.inf)).nonzero()
    if len(wrong):
        b, t, k = wrong[0].tolist()
        raise ValueError(
            f"log_emissions is {float(log_emissions[b, t, k])} in sequence {b}, frame {t}, "
            f"state {k}; for a missing frame give 0 in all states"
        )
