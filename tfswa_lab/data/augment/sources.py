"""What every augmentation shares: the sources of a batch, changed, and the mixture they add up to.

Axis letters: `b` batch, `n` stems, `m` sources (the stems, and what they leave of the mixture),
`c` channels, `s` samples.

Notebook: 07_training
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

ROUNDING = 1e-6  # a rest that never exceeds this is the rounding of a float32 sum


def batch_sources(batch: dict) -> Tensor:
    """The stems `(b, n, c, s)` and, where they do not cover the mixture, the rest as one more.

    Raises:
        ValueError: mixture and stems do not fit each other.
    """
    mixture, stems = batch["mixture"], batch["stems"]
    if stems.ndim != 4 or mixture.shape != stems[:, 0].shape:
        raise ValueError(
            "expected a mixture (b, c, s) and its stems (b, n, c, s), "
            f"got {tuple(mixture.shape)} and {tuple(stems.shape)}"
        )
    rest = mixture - stems.sum(1)
    if rest.abs().max() <= ROUNDING:  # false for NaN, which is for the trainer to find
        return stems
    return torch.cat([stems, rest[:, None]], 1)


def replace_sources(batch: dict, sources: Tensor) -> dict:
    """A new batch with the stems among the sources `(b, m, c, s)` and the sum of all as mixture."""
    stems = sources[:, : batch["stems"].shape[1]]
    return {**batch, "mixture": sources.sum(1), "stems": stems}


class Augmentation:
    """Changes the sources of a batch and mixes them again; a subclass says how, in `change`.

    What the stems leave of the mixture (all but the voice, for target_stems=["vocals"]) is changed
    as one more source, so that estimates + rest = mixture still holds. `track` and `start_seconds`
    stay: they name the songs that the batch was made of.

    All numbers are drawn from the CPU generator, whatever the batch's device, and the global
    generators are left alone: the same seed gives the same batch.
    """

    def __call__(self, batch: dict, generator: Generator) -> dict:
        """A new batch; the tensors of the old one are not written to."""
        return replace_sources(batch, self.change(batch_sources(batch), generator))

    def change(self, sources: Tensor, generator: Generator) -> Tensor:
        """New sources of the same shape `(b, m, c, s)`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it changes sources")

    def __repr__(self) -> str:
        """Class and settings: part of what a checkpoint knows of its run."""
        return described(self)


class Chain(Augmentation):
    """Several augmentations, one after the other.

    >>> from tfswa_lab.data.augment import Gain, Remix
    >>> stems = torch.randn(4, 2, 1, 100)
    >>> batch = {"mixture": stems.sum(1), "stems": stems}
    >>> new = Chain([Remix(), Gain()])(batch, torch.Generator().manual_seed(0))
    >>> torch.equal(new["mixture"], new["stems"].sum(1))
    True
    """

    def __init__(self, augmentations: Sequence[Augmentation]):
        self.augmentations = list(augmentations)

    def change(self, sources: Tensor, generator: Generator) -> Tensor:
        """Sources `(b, m, c, s)` after the last augmentation."""
        for augmentation in self.augmentations:
            sources = augmentation.change(sources, generator)
        return sources


def described(part: object) -> str:
    """A class and its settings, as they would be written."""
    settings = ", ".join(f"{name}={value!r}" for name, value in vars(part).items())
    return f"{type(part).__name__}({settings})"


def toss(shape: Sequence[int], prob: float, generator: Generator) -> Tensor:
    """True with probability `prob`, everywhere independently."""
    return torch.rand(*shape, generator=generator) < prob


def check_prob(name: str, prob: float) -> float:
    """The probability, if it is one.

    Raises:
        ValueError: it is not in [0, 1].
    """
    if not 0 <= prob <= 1:
        raise ValueError(f"{name}={prob}: a probability lies between 0 and 1")
    return prob
