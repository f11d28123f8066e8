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

    Raises:
        ValueError: it is neither the CPU nor a CUDA GPU, or there is no such GPU.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(name)):
        raise ValueError(f"device={str(name)!r} is unknown; use auto, cpu, cuda, or cuda:0")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={name!r}, but torch finds no CUDA GPU of that number here; use cpu or auto"
        )
    return device


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
