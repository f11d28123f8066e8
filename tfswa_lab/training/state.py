"""All that a run consists of, in plain containers, and the way back.

Notebook: 07_training
"""

from __future__ import annotations

import hashlib
import platform
import warnings
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING

from torch.utils.data import Dataset

from tfswa_lab import __version__
from tfswa_lab.models.storage import describe
from tfswa_lab.training.config import check_same_run
from tfswa_lab.training.launch import gathered
from tfswa_lab.training.randomness import random_state, set_random_state
from tfswa_lab.training.schedule import resume_schedule

if TYPE_CHECKING:
    from tfswa_lab.training.trainer import Trainer

PACKAGES = ("torch", "lightning-fabric", "numpy")
PROGRESS = ("step", "best_sdr", "best_step", "stale")


def settings(trainer: Trainer) -> dict:
    """What makes this run this run: numbers, network, loss, songs and what is done to them."""
    return {
        "training": asdict(trainer.config),
        "separator": describe(trainer.separator),
        "loss": in_words(trainer.loss),
        "augment": in_words(trainer.augment),
        "masking": in_words(trainer.masking),
        "stretches": len(trainer.train_set),
        "songs": songs_in_words(trainer.train_set),
    }


def in_words(part: object) -> str:
    """A part's own description, or its class where that would be an address in memory.

    >>> from tfswa_lab.data.augment import Chain, Gain, Remix
    >>> in_words(Chain([Remix(), Gain((0.5, 2))]))
    'Chain(augmentations=[Remix(), Gain(factor=(0.5, 2), prob=1.0)])'
    >>> in_words(object())
    'object'
    """
    words = " ".join(repr(part).split())
    return words if " at 0x" not in words else getattr(part, "__name__", type(part).__name__)


def songs_in_words(songs: Dataset) -> str:
    """How many songs, and a digest of their names, of a data set that has `track_names`."""
    names = getattr(songs, "track_names", None)
    if names is None:
        return "without names"
    return f"{len(names)}, of names {hashlib.sha256(repr(sorted(names)).encode()).hexdigest()[:8]}"


def run_state(trainer: Trainer) -> dict:
    """Everything that the next step depends on; called by all processes together.

    The place in the training set is not among it: it follows from the step.
    """
    precision = trainer.fabric.strategy.precision
    return {
        **{name: getattr(trainer, name) for name in PROGRESS},
        "separator": trainer.separator.state_dict(),
        "ema": trainer.ema.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict(),
        "scaler": precision.state_dict(),
        "random": gathered(trainer.fabric, random_state(trainer.fabric.device)),
        "history": trainer.history,
        "settings": settings(trainer),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of all that decides about the last bit."""
    ours = {"python": platform.python_version(), "tfswa-lab": __version__}
    return ours | {name: version(name) for name in PACKAGES}


def restore(trainer: Trainer, state: dict) -> None:
    """Put a fresh trainer where `run_state` was taken.

    Processes that the saved run did not have keep their own random state. Other versions of the
    packages are only warned of: the run goes on, but perhaps not bit for bit.

    Raises:
        ValueError: the state is of a run with other settings.
    """
    check_same_run(state["settings"], settings(trainer))
    if state["versions"] != versions():
        warnings.warn(f"saved with {state['versions']}, this is {versions()}", stacklevel=2)
    trainer.separator.load_state_dict(state["separator"])
    trainer.ema.load_state_dict(state["ema"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    resume_schedule(trainer.scheduler, state["scheduler"])  # after the optimizer: it sets the rate
    trainer.fabric.strategy.precision.load_state_dict(state["scaler"])
    for name in PROGRESS:
        setattr(trainer, name, state[name])
    trainer.logbook.history = state["history"]
    rank = trainer.fabric.global_rank
    if rank < len(state["random"]):
        set_random_state(state["random"][rank], trainer.fabric.device)
