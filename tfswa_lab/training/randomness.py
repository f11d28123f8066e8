"""Every source of chance in a run: generators derived from a step's numbers, or saved and restored.

Order and augmentation use generators that are derived from seed, epoch and step, the same in all
processes. Dropout, and whatever else draws from the global generators, needs these saved and
restored.

Notebook: 07_training
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def generator_for(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on these whole numbers and on nothing else.

    Neighbouring numbers give unrelated streams: they are hashed, since sums such as
    `seed + epoch` would repeat an epoch of one seed as another epoch of the next.

    >>> first, second = generator_for(0, 1), generator_for(1, 0)
    >>> bool(torch.rand(1, generator=first) == torch.rand(1, generator=second))
    False
    """
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def random_state(device: torch.device) -> dict:
    """States of the global generators of Python, numpy and torch, in plain containers.

    Args:
        device: this process's device; a GPU has a generator of its own.
    """
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (others may draw from it)
    state = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict, device: torch.device) -> None:
    """Put the global generators into the states of `random_state`.

    A GPU's state is left out where the run moved from a GPU to the CPU or back.
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
