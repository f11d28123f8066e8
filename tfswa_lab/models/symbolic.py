"""Sizes that may be symbols: what a network computes from its input's size while it is exported.

An exported program must hold for all sizes. An `if` that looks at one is decided while the program
is recorded and holds for all inputs from then on (PyTorch issues 152018 and 99701), so padding and
masks are arithmetic of the sizes: whole numbers as ever, `SymInt` in `torch.export`, tensors in
`torch.jit.trace`.

Notebook: 10_staged_pipelines
"""

from __future__ import annotations

import torch
from torch import Tensor

Size = int | torch.SymInt | Tensor


def is_traced() -> bool:
    """Whether the network is recorded for inputs of other sizes than this one."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def round_up(size: Size, multiple: int) -> Size:
    """The first multiple that is not below the size.

    Written so, and not as `size + -size % multiple`, torch knows that it is a multiple.

    >>> round_up(17, 8), round_up(16, 8)
    (24, 16)
    """
    return (size + multiple - 1) // multiple * multiple


def at_least(least: int, size: Size) -> Size:
    """The larger of the two.

    >>> at_least(2, 1), at_least(2, 3)
    (2, 3)
    """
    if isinstance(size, Tensor):  # of a trace
        return size.clamp(min=least)
    return torch.sym_max(size, least)
