"""The learning rate over a run: a linear warm-up, then half a cosine down to zero.

Source: Loshchilov & Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017,
eq. 5, without restarts.

Notebook: 07_training
"""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """Factor of the learning rate for a step, counted from 0.

    The first step already moves, and the last one still does.

    >>> [round(warmup_cosine(step, 2, 6), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.85, 0.5, 0.15]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_schedule(optimizer: Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """A scheduler to be stepped once after each update."""
    return LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup_steps, total_steps))


def resume_schedule(schedule: LambdaLR, state: dict) -> None:
    """Go on from a saved schedule, along this one's curve.

    A run that was given more steps has a longer cosine: its rate rises to the new curve at once,
    where the saved one would be 0 at the old end.
    """
    schedule.load_state_dict(state)
    factor = schedule.lr_lambdas[0](schedule.last_epoch)
    for group, highest in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
        group["lr"] = factor * highest
