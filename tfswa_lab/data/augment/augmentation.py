"""The base of every augmentation, the mixing of songs, and masks on the network's input.

Axis letters: `b` batch, `n` stems, `m` sources (the stems, and the rest of the mixture), `c`
channels, `s` samples, `t` frames, `f` bins.

Notebook: 07_training
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Generator, Tensor, nn

from tfswa_lab.stft import check_waveform

ROUNDING = 1e-6  # a smaller rest is the rounding of a float32 sum


def batch_sources(batch: dict) -> Tensor:
    """The stems `(b, n, c, s)` and, where the mixture holds more, the rest as one more source.

    Raises:
        ValueError: mixture and stems do not fit each other, or are not of real numbers.
    """
    mixture, stems = batch["mixture"], batch["stems"]
    check_waveform("the mixture", mixture)
    check_waveform("the stems", stems)
    if stems.ndim != 4 or mixture.shape != stems[:, 0].shape:
        raise ValueError(
            "expected a mixture (b, c, s) and its stems (b, n, c, s), "
            f"got {tuple(mixture.shape)} and {tuple(stems.shape)}"
        )
    rest = mixture - stems.sum(1)
    if rest.abs().max() <= ROUNDING:  # false for NaN, which the trainer finds
        return stems
    return torch.cat([stems, rest[:, None]], 1)


def replace_sources(batch: dict, sources: Tensor) -> dict:
    """A new batch with the stems among the sources `(b, m, c, s)` and the sum of all as mixture."""
    stems = sources[:, : batch["stems"].shape[1]]
    return {**batch, "mixture": sources.sum(1), "stems": stems}


class Augmentation:
    """Changes the sources of a batch and mixes them again; a subclass says how, in `change`.

    The rest of the mixture (for target_stems=["vocals"], everything but the voice) is changed as
    one more source, so that estimates + rest = mixture still holds. `track` and `start_seconds`
    stay: they name the songs of the original batch.

    All numbers are drawn from the given CPU generator, whatever the batch's device, and never from
    the global one: the same seed gives the same batch.
    """

    def __call__(self, batch: dict, generator: Generator) -> dict:
        """A new batch; the tensors of the old one are not written to."""
        return replace_sources(batch, self.change(batch_sources(batch), generator))

    def change(self, sources: Tensor, generator: Generator) -> Tensor:
        """New sources of the same shape `(b, m, c, s)`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it changes sources")

    def __repr__(self) -> str:
        """Class and settings, which a checkpoint stores."""
        return settings_of(self)


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


def settings_of(part: object) -> str:
    """The call that would make this object: its class and settings."""
    settings = ", ".join(f"{name}={value!r}" for name, value in vars(part).items())
    return f"{type(part).__name__}({settings})"


def toss(shape: Sequence[int], prob: float, generator: Generator) -> Tensor:
    """True with probability `prob`, independently for each element."""
    return torch.rand(*shape, generator=generator) < prob


def check_prob(name: str, prob: float) -> float:
    """Return a probability.

    Raises:
        ValueError: it is not in [0, 1].
    """
    if not 0 <= prob <= 1:
        raise ValueError(f"{name}={prob}: a probability lies between 0 and 1")
    return prob


class Remix(Augmentation):
    """Mixtures of stems from different songs: each source is shuffled over the batch on its own.

    The voice of one item is mixed with the drums of a second and the bass of a third. The batch
    holds the same stems as before.

    Raises:
        ValueError: when called with a single item, which has no other to exchange with.

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
        place = order.argsort(0)  # of every item in that order; its partners follow it
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


class SpectrogramMasking:
    """Hide a random band of bins and a random run of frames from the network.

    Only the network's input is masked. The mixture and the targets stay as they are, so the network
    has to infer the hidden part from its surroundings. Hidden values become 0, the mean of
    normalised features (for `RMSNormalizer`, silence).

    Args:
        max_bins: a band is narrower than this.
        max_frames: a run is shorter than this.
        max_share: both are at most this share of their axis, so that a small map is never hidden
            completely.
        apply_prob: probability that a part of an item is hidden.

    Raises:
        ValueError: an argument makes no sense.

    Source: Park et al., "SpecAugment", Interspeech 2019, without its time warping. Widths and
    places are distributed as in `torchaudio.functional.mask_along_axis_iid`.

    >>> masking = SpectrogramMasking()
    >>> masking(torch.ones(4, 2, 300, 1025), torch.Generator().manual_seed(0)).shape
    torch.Size([4, 2, 300, 1025])
    """

    def __init__(
        self,
        max_bins: int = 80,
        max_frames: int = 40,
        max_share: float = 0.25,
        apply_prob: float = 1.0,
    ):
        if min(max_bins, max_frames) < 0:
            raise ValueError(f"max_bins={max_bins}, max_frames={max_frames}: 0 or more (0 is off)")
        self.max_bins = max_bins
        self.max_frames = max_frames
        self.max_share = check_prob("max_share", max_share)
        self.apply_prob = check_prob("apply_prob", apply_prob)

    def __call__(
        self, features: Tensor, generator: Generator, rank: int = 0, processes: int = 1
    ) -> Tensor:
        """Features `(b, c, t, f)` with a part set to 0, the same in all channels of an item.

        Where several processes share a batch, the masks of all its items are drawn in each, so
        that an item has the same mask for any number of processes.
        """
        share, _, frames, bins = features.shape
        items = share * processes
        band = self._span(items, bins, self.max_bins, generator)
        run = self._span(items, frames, self.max_frames, generator)
        hidden = band[:, None, :] | run[:, :, None]  # (items, t, f)
        hidden &= toss((items, 1, 1), self.apply_prob, generator)
        return features.masked_fill(hidden[rank::processes, None].to(features.device), 0.0)

    def __repr__(self) -> str:
        """Class and settings, which a checkpoint stores."""
        return settings_of(self)

    def _span(self, items: int, size: int, widest: int, generator: Generator) -> Tensor:
        """A random interval of an axis per item: `(b, size)`, true inside."""
        widest = min(widest, int(size * self.max_share))
        width = torch.rand(items, 1, generator=generator) * widest
        start = (torch.rand(items, 1, generator=generator) * (size - width)).long()
        place = torch.arange(size)
        return (place >= start) & (place < start + width.long())

    def applied(
        self, network: nn.Module, generator: Generator, rank: int = 0, processes: int = 1
    ) -> AbstractContextManager:
        """While this is open, `network` sees masked features whenever it is in training mode.

        >>> from tfswa_lab.models.separator import build_separator
        >>> from tfswa_lab.models.tfswa_unet import SIZES
        >>> separator = build_separator(("vocals", "other"), **SIZES["tiny"])
        >>> with SpectrogramMasking().applied(separator.model, torch.Generator()):
        ...     estimates = separator(torch.randn(1, 2, 9000))
        """
        return masked(network, lambda features: self(features, generator, rank, processes))


@contextmanager
def masked(network: nn.Module, mask: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While this is open, `network` sees `mask(features)` whenever it is in training mode."""

    def hide(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (mask(inputs[0]), *inputs[1:]) if module.training else None

    handle = network.register_forward_pre_hook(hide)
    try:
        yield
    finally:
        handle.remove()
