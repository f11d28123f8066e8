"""Mixtures that nobody recorded: stems of different songs together, or on top of each other.

Axis letters: `b` batch, `m` sources (the stems, and what they leave of the mixture), `c` channels,
`s` samples.

Notebook: 07_training
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator, Tensor

from tfswa_lab.data.augment.sources import Augmentation, check_prob, toss


class Remix(Augmentation):
    """Mixtures of stems from different songs: each source is shuffled over the batch on its own.

    The voice of one item meets the drums of a second and the bass of a third. Nothing is lost:
    the batch holds the same stems as before.

    Raises:
        ValueError: when called with a single item, which leaves nothing to remix with.

    Source: Uhlich et al., "Improving music source separation based on deep neural networks through
    data augmentation and network blending", ICASSP 2017.
    """

    def change(self, sources: Tensor, generator: Generator) -> Tensor:
        """Sources `(b, m, c, s)` in another order along `b`, a different one for each of `m`."""
        _check_items("Remix", len(sources), 2)
        order = _shuffles(sources, generator)
        return sources[order, torch.arange(sources.shape[1])]


class MixupAugmentation(Augmentation):
    """Several singers in one voice stem: a source becomes a weighted mix with that of other items.

    Weights and partners are drawn for each source of each item. The weights sum to 1, so a mix of
    two unrelated sources is up to 3 dB quieter than either. This is the "mix-audio" of
    TFSWA-ResUNet, with random weights.

    Args:
        tracks: how many items are mixed, the item itself among them.
        alpha: of the symmetric Dirichlet distribution of the weights (for two tracks: Beta). 1
            makes all weights equally likely, less prefers one track, more prefers equal shares.
        apply_prob: probability that a source of an item is mixed at all.

    Raises:
        ValueError: an argument makes no sense; or, when called, the batch has fewer items than
            tracks.

    Source: Zhang et al., "mixup: beyond empirical risk minimization", ICLR 2018; Kong et al.,
    "Decoupling magnitude and phase estimation with deep ResUNet for music source separation",
    ISMIR 2021 (mix-audio).
    """

    def __init__(self, tracks: int = 2, alpha: float = 1.0, apply_prob: float = 0.5):
        if tracks < 2:
            raise ValueError(f"tracks={tracks}: a mix takes at least 2")
        if not alpha > 0:
            raise ValueError(f"alpha={alpha}: must be positive")
        self.tracks = tracks
        self.alpha = alpha
        self.apply_prob = check_prob("MixupAugmentation apply_prob", apply_prob)

    def change(self, sources: Tensor, generator: Generator) -> Tensor:
        """Sources `(b, m, c, s)`, each a mix with the same source of other items."""
        _check_items(f"MixupAugmentation(tracks={self.tracks})", len(sources), self.tracks)
        order = _shuffles(sources, generator)
        place = order.argsort(0)  # of every item in that order; its partners are those behind it
        weights = self._weights(sources.shape[:2], generator).to(sources)
        each = torch.arange(sources.shape[1])
        return sum(
            weights[..., k, None, None] * sources[order.roll(-k, 0).gather(0, place), each]
            for k in range(self.tracks)
        )

    def _weights(self, shape: torch.Size, generator: Generator) -> Tensor:
        """Weights `(b, m, tracks)` that sum to 1; the first is the item's own."""
        chosen = toss(shape, self.apply_prob, generator)
        # torch draws Dirichlet samples from its global generator only.
        seed = torch.randint(2**62, (), generator=generator).item()
        weights = np.random.default_rng(seed).dirichlet([self.alpha] * self.tracks, tuple(shape))
        alone = torch.eye(self.tracks, dtype=torch.float64)[0]
        return torch.where(chosen[..., None], torch.from_numpy(weights), alone)


def _shuffles(sources: Tensor, generator: Generator) -> Tensor:
    """An order `(b, m)` of the batch for each source."""
    items, count = sources.shape[:2]
    return torch.stack([torch.randperm(items, generator=generator) for _ in range(count)], 1)


def _check_items(name: str, items: int, needed: int) -> None:
    if items < needed:
        raise ValueError(
            f"{name} mixes the items of a batch and needs at least {needed}, got {items}; raise "
            "batch_size, drop the last incomplete batch, or leave this augmentation out"
        )
