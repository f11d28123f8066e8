"""Whether an exported program computes what its network computes, at other sizes, too.

A tracer records what the network did for one input. What Python decided from its size is frozen,
and the program may still run at other sizes, with wrong values (PyTorch issues 152018 and 99701).

Axis letters: `b` batch, `c` channels, `s` samples, `t` frames, `f` frequency bins.

Notebook: 10_staged_pipelines
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tfswa_lab.memory.display import Shown
from tfswa_lab.models.exported import Program

TOLERANCE = 1e-4  # the largest error, as a share of the largest value
EXAMPLE = (2, 37)  # batch and frames of the exporter's input, which are not checked
FEW = (1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17)  # frames, for a batch of one, two and three
MANY = (24, 31, 40, 63, 64, 65, 87, 120)  # frames, for a batch of one
NAMED = 4  # failing sizes that an error shows

Size = tuple[int, int]  # batch, and frames or samples


@dataclass(frozen=True, repr=False)
class Check(Shown):
    """A program beside its network.

    Args:
        errors: by batch and frames (or samples), the largest error as a share of the network's
            largest value; infinite where the program does not run or gives another shape.
        reasons: what it said where it did not run.
        fixed: axes that the file says cannot change.
        tolerance: the largest error allowed.
        unit: of the second size, `frames` or `samples`.
    """

    errors: Mapping[Size, float]
    reasons: Mapping[Size, str]
    fixed: tuple[int, ...] = ()
    tolerance: float = TOLERANCE
    unit: str = "frames"

    @property
    def worst(self) -> float:
        """The largest error at any size."""
        return max(self.errors.values())

    @property
    def at(self) -> Size:
        """Where it is."""
        return max(self.errors, key=self.errors.__getitem__)

    @property
    def failed(self) -> list[Size]:
        """Sizes at which the error is too large, or not a number."""
        return [size for size, error in self.errors.items() if not error <= self.tolerance]

    @property
    def passed(self) -> bool:
        """Whether all sizes agree, and both axes can change."""
        return not self.failed and not self.fixed

    @property
    def brief(self) -> str:
        """How many sizes agree, and the largest error."""
        agree = len(self.errors) - len(self.failed)
        return f"{agree} of {len(self.errors)} sizes agree, worst error {self.worst:.1e}"

    def __str__(self) -> str:
        batch, length = self.at
        return f"{self.brief} at {batch} × {length} {self.unit}" + self._faults()

    def _faults(self) -> str:
        names = {0: "batch", 2: self.unit}
        lines = [f"the file fixes its axis {names[axis]}" for axis in self.fixed]
        for size in self.failed[:NAMED]:
            why = self.reasons.get(size) or f"off by {self.errors[size]:.2g}"
            lines.append(f"{size[0]} × {size[1]} {self.unit}: {why}")
        more = len(self.failed) - NAMED
        return "".join(f"; {line}" for line in lines) + f"; and {more} more" * (more > 0)

    def refuse(self, path: Path) -> None:
        """Raise if the check was not passed.

        Raises:
            ValueError: names the file, the sizes and the errors.
        """
        if not self.passed:
            raise ValueError(
                f"{path.name} is not the network: {self}. Something that Python computed from a "
                "size was frozen: compute it from x.shape in torch, without int() and if"
            )


def check_program(
    program: Program, reference: Callable[[Tensor], Tensor], channels: int, bins: int | None
) -> Check:
    """Compare a program with what it was made from, on random inputs.

    Args:
        program: that was opened.
        reference: gives what is right.
        channels: c of the input.
        bins: f of the input; None for waveforms `(b, c, s)`.
    """
    errors, reasons = {}, {}
    hop = program.metadata.get("hop_length", 1) if bins is None else 1
    for batch, length in sizes(reference, None if bins else hop):
        x = random_input(batch, channels, length, bins)
        with torch.no_grad():
            right = reference(x)
        try:
            with torch.no_grad():
                error = largest_error(program.run(x), right)
        except Exception as raised:  # whatever it is, it is the finding
            reasons[batch, length] = str(raised).strip().partition("\n")[0][:160]
            error = torch.inf
        errors[batch, length] = error
    return Check(errors, reasons, program.fixed, unit="samples" if bins is None else "frames")


def sizes(network: object, hop: int | None = None) -> list[Size]:
    """Batches and frames at, below and beside multiples of the windows; samples if there is a hop.

    Args:
        network: whose attribute `sizes` may name a `window_size`.
        hop: samples from frame to frame.
    """
    window = getattr(network, "sizes", {}).get("window_size", 8)
    beside = {window * count + step for count in (1, 2) for step in (-1, 0, 1)} - {0}
    few = [(batch, t) for batch in (1, 2, 3) for t in sorted({*FEW, *beside} - {EXAMPLE[1]})]
    found = [*few, *((1, t) for t in MANY)]
    if hop is None:
        return found
    # lengths whose remainder after the last whole hop differs
    return [(1, 1), *((b, max(1, (t - 1) * hop + (t * 37) % hop)) for b, t in found)]


def random_input(batch: int, channels: int, length: int, bins: int | None) -> Tensor:
    """The same numbers for the same size, without torch's generator."""
    shape = (batch, channels, length) if bins is None else (batch, channels, length, bins)
    return torch.randn(shape, generator=torch.Generator().manual_seed(length))


def largest_error(found: Tensor, right: Tensor) -> float:
    """As a share of the largest value; infinite for another shape or a value that is no number.

    >>> largest_error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
    0.25
    """
    if found.shape != right.shape:
        raise ValueError(f"gives {tuple(found.shape)}, expected {tuple(right.shape)}")
    tiny = torch.finfo(right.dtype).tiny
    error = ((found - right).abs().max() / right.abs().max().clamp(min=tiny)).item()
    return torch.inf if error != error else error
