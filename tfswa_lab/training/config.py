"""How to train: all numbers that are not the network's, in one frozen dataclass that checks itself.

Notebook: 07_training
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
MAY_BE_ZERO = ("warmup_steps", "num_workers", "seed")  # all other whole numbers are 1 or more


@dataclass(frozen=True)
class TrainingConfig:
    """How to train: steps, optimiser, precision, and when to validate and to save.

    A step is one update of the weights. It sees `batch_size * accumulate` segments, whatever the
    number of devices: each takes its share, so a run means the same on one GPU as on eight.

    Args:
        max_epochs: passes over the training set, None where `max_steps` is the end.
        max_steps: an earlier end, None for none. The learning rate reaches zero at the earlier end.
        batch_size: segments per forward pass, over all devices.
        accumulate: forward passes whose gradients are averaged into one step.
        learning_rate: AdamW's, at its highest.
        weight_decay: AdamW's.
        warmup_steps: steps in which the learning rate rises linearly; a cosine follows. None for
            a twentieth of the run, at most 1000.
        gradient_clip_val: largest norm of all gradients together, 0 for any.
        ema_decay: of the averaged weights that are validated and saved, 0 for the last weights.
        precision: 32-true, bf16-mixed or 16-mixed.
        activation_checkpointing: recompute activations in the backward pass to save memory.
        log_every_n_steps: steps between two points of a curve.
        val_every_n_steps: steps between two validations, None for once an epoch.
        patience: validations without a better score before the run stops, None for never.
        checkpoint_every_n_steps: steps between two checkpoints, None for once an epoch.
        checkpoint_every_n_minutes: and one whenever the last is this old.
        num_workers: processes that read audio ahead, for each device.
        device: cpu, cuda, or auto; not mps.
        devices: how many of them in this machine; torchrun and `fabric run` decide themselves.
        seed: of the order of the segments and of the augmentation.

    Raises:
        ValueError: a number is out of range, there is no end, or the precision is unknown.

    >>> TrainingConfig(learning_rate=-1)
    Traceback (most recent call last):
    ...
    ValueError: learning_rate=-1: must be above 0, and finite
    """

    max_epochs: int | None = 100
    max_steps: int | None = None
    batch_size: int = 4
    accumulate: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    warmup_steps: int | None = None
    gradient_clip_val: float = 5.0
    ema_decay: float = 0.999
    precision: str = "32-true"
    activation_checkpointing: bool = False
    log_every_n_steps: int = 10
    val_every_n_steps: int | None = None
    patience: int | None = None
    checkpoint_every_n_steps: int | None = None
    checkpoint_every_n_minutes: float = 10.0
    num_workers: int = 0
    device: str = "cpu"
    devices: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(TrainingConfig) if "int" in field.type):
            value, lowest = getattr(self, name), int(name not in MAY_BE_ZERO)
            if value is not None and not (lowest <= value < 2**63 and value == int(value)):
                raise ValueError(f"{name}={value}: a whole number, {lowest} or more")
        if self.max_epochs is None and self.max_steps is None:
            raise ValueError("max_epochs and max_steps are both None: one of them must be the end")
        for name in ("learning_rate", "checkpoint_every_n_minutes"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0, and finite")
        for name in ("weight_decay", "gradient_clip_val"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: a finite number, 0 or more")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"ema_decay={self.ema_decay}: from 0 to below 1; at 1 nothing is learnt"
            )
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: choose among {', '.join(PRECISIONS)}")

    def steps_per_epoch(self, segments: int) -> int:
        """Whole steps in a pass over so many segments.

        Raises:
            ValueError: there are fewer than a step takes.
        """
        in_a_step = self.batch_size * self.accumulate
        if segments < in_a_step:
            raise ValueError(
                f"a step takes {in_a_step} segments (batch_size={self.batch_size}, "
                f"accumulate={self.accumulate}), the training set has {segments}; lower the batch "
                "size or draw more samples_per_track"
            )
        return segments // in_a_step

    def total_steps(self, segments: int) -> int:
        """Steps until the earlier of both ends, with so many segments in the training set.

        >>> TrainingConfig(max_epochs=3, batch_size=4).total_steps(10)
        6
        """
        epochs = self.max_epochs and self.max_epochs * self.steps_per_epoch(segments)
        return min(end for end in (self.max_steps, epochs) if end)

    def warmup(self, total_steps: int) -> int:
        """Steps in which the learning rate rises, in a run of so many.

        >>> TrainingConfig().warmup(400), TrainingConfig(warmup_steps=100).warmup(400)
        (20, 100)

        Raises:
            ValueError: `warmup_steps` is more than the whole run.
        """
        if self.warmup_steps is None:
            return min(total_steps // 20, 1000)
        if self.warmup_steps > total_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps}, but the run ends after step {total_steps}: "
                "the learning rate would never reach its highest; lower warmup_steps, leave it "
                "out, or raise max_steps or max_epochs"
            )
        return self.warmup_steps
