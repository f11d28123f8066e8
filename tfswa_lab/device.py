"""Where to compute: the one place that turns a user's word into a torch device.

Notebook: 00_start_here
"""

from __future__ import annotations

import torch


def pick_device(name: str = "auto") -> torch.device:
    """The device a user asked for; "auto" is CUDA where there is a card, else the CPU.

    Raises:
        ValueError: the name means nothing to torch, or there is no such card.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r} is unknown; use auto, cpu, or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}, but torch finds no CUDA card here; use cpu or auto")
    return device
