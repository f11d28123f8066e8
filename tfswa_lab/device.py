"""Where to compute: turns the name of a device into a torch device; how many threads of the CPU.

Notebook: 00_start_here
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device a user asked for; "auto" is CUDA where there is a GPU, else the CPU.

    A device that was picked can be picked again: a notebook's cell may run twice.

    "mps" is the GPU of an Apple computer. "auto" does not choose it: it has no float64, which the
    lessons and the scores compute in, and nobody has measured the lab on it.

    Raises:
        ValueError: the name is unknown, or this machine has no such device.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    name = str(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = re.fullmatch(r"(?:cpu|mps)(?::0)?|cuda(?::(\d+))?", name)
    if not known:
        raise ValueError(f"device={name!r} is unknown; use auto, cpu, cuda, cuda:0, or mps")
    if name.startswith("cuda") and int(known[1] or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={name!r}, but torch finds no CUDA GPU of that number here; use cpu or auto"
        )
    if name.startswith("mps") and not torch.backends.mps.is_available():
        raise ValueError(f"device={name!r}, but torch finds no Apple GPU here; use cpu or auto")
    return torch.device(name)


@contextmanager
def compute_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads inside the block, and restore the old number at its end.

    Notebook: 08_evaluation
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
