"""The same music faster, higher, louder, mirrored: effects on the sources of each item.

Time and pitch change for all sources of an item together, because the music would lose its rhythm
and harmony otherwise. Level, channels and polarity change for each source alone, as on a mixing
desk.

The number of samples stays. An item that gets longer loses its end; one that gets shorter starts
again from its beginning, because silence would be an easy target. This leaves one seam, at the
same sample in all sources.

Axis letters: `b` batch, `m` sources (the stems, and the rest of the mixture), `c` channels, `s`
samples.

Notebook: 07_training
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from tfswa_lab.data.augment.augmentation import Augmentation, Chain, check_prob, toss
from tfswa_lab.data.augment.stretch import (
    change_speed,
    looped,
    pitch_shift,
    simple_ratio,
    time_stretch,
)

Range = tuple[float, float]


class TimeStretch(Augmentation):
    """Slower or faster music at the same pitch.

    Args:
        factor: range of the factor of the duration.
        prob: probability for each item.
        n_fft: window of the phase vocoder in samples; 46 ms of 44 100 Hz by default.
    """

    def __init__(self, factor: Range = (0.9, 1.1), prob: float = 1.0, n_fft: int = 2048):
        self.factor = _check_range("TimeStretch factor", factor, 0.5, 2)
        self.prob = check_prob("TimeStretch prob", prob)
        self.n_fft = n_fft

    def change(self, sources: Tensor, generator: Generator) -> Tensor:
        """Sources `(b, m, c, s)`, all of an item stretched alike."""
        chosen = toss((len(sources),), self.prob, generator)
        factors = _uniform((len(sources),), self.factor, generator).tolist()
        return _each(self._stretch, sources, chosen, factors)

    def _stretch(self, item: Tensor, factor: float) -> Tensor:
        samples = item.shape[-1]
        enough = looped(item, math.ceil(samples / factor) + self.n_fft)
        return time_stretch(enough, factor, self.n_fft)[..., :samples]


class PitchShift(Augmentation):
    """Higher or lower music at the same tempo.

    Args:
        semitones: range of the shift.
        prob: probability for each item.
        n_fft: window of the phase vocoder in samples; 46 ms of 44 100 Hz by default.
    """

    def __init__(self, semitones: Range = (-2.0, 2.0), prob: float = 1.0, n_fft: int = 2048):
        self.semitones = _check_range("PitchShift semitones", semitones, -12, 12)
        self.prob = check_prob("PitchShift prob", prob)
        self.n_fft = n_fft

    def change(self, sources: Tensor, generator: Generator) -> Tensor:
        """Sources `(b, m, c, s)`, all of an item shifted alike."""
        chosen = toss((len(sources),), self.prob, generator)
        semitones = _uniform((len(sources),), self.semitones, generator).tolist()
        return _each(self._shift, sources, chosen, semitones)

    def _shift(self, item: Tensor, semitones: float) -> Tensor:
        return pitch_shift(item, semitones, self.n_fft)


class SpeedPerturbation(Augmentation):
    """Tempo, pitch and formants together, as a tape played too fast.

    It is cheap and has no artefacts of a vocoder.

    Args:
        factors: one of these is drawn for each item; above 1 is faster and higher.
        prob: probability for each item.

    Source: Ko et al., "Audio augmentation for speech recognition", Interspeech 2015.
    """

    def __init__(self, factors: Sequence[float] = (0.9, 0.95, 1.0, 1.05, 1.1), prob: float = 1.0):
        if not factors or not all(0.5 <= factor <= 2 for factor in factors):
            raise ValueError(f"SpeedPerturbation factors={factors}: one or more between 0.5 and 2")
        self.factors = tuple(factors)
        self.prob = check_prob("SpeedPerturbation prob", prob)

    def change(self, sources: Tensor, generator: Generator) -> Tensor:
        """Sources `(b, m, c, s)`, all of an item at the same speed."""
        chosen = toss((len(sources),), self.prob, generator)
        drawn = torch.randint(len(self.factors), (len(sources),), generator=generator)
        return _each(_speed_up, sources, chosen, [self.factors[k] for k in drawn])


def _speed_up(item: Tensor, factor: float) -> Tensor:
    samples, ratio = item.shape[-1], simple_ratio(factor)
    return change_speed(looped(item, math.ceil(samples * ratio)), ratio)[..., :samples]


class Gain(Augmentation):
    """Every source of every item louder or softer by its own factor.

    Args:
        factor: range of the factor of the amplitude.
        prob: probability for each source.
    """

    def __init__(self, factor: Range = (0.7, 1.3), prob: float = 1.0):
        self.factor = _check_range("Gain factor", factor, 0, math.inf)
        self.prob = check_prob("Gain prob", prob)

    def change(self, sources: Tensor, generator: Generator) -> Tensor:
        """Sources `(b, m, c, s)`; the sum may exceed 1, which float32 represents."""
        shape = (*sources.shape[:2], 1, 1)
        chosen = toss(shape, self.prob, generator)
        factors = _uniform(shape, self.factor, generator)
        return sources * torch.where(chosen, factors, 1.0).to(sources)


class ChannelSwap(Augmentation):
    """Left and right exchanged, in each source independently; mono stays as it is.

    Args:
        prob: probability for each source.
    """

    def __init__(self, prob: float = 0.5):
        self.prob = check_prob("ChannelSwap prob", prob)

    def change(self, sources: Tensor, generator: Generator) -> Tensor:
        """Sources `(b, m, c, s)`."""
        chosen = toss((*sources.shape[:2], 1, 1), self.prob, generator)
        return torch.where(chosen.to(sources.device), sources.flip(2), sources)


class Polarity(Augmentation):
    """The sign of a source changed: inaudible in the source alone, but it changes the mixture.

    Args:
        prob: probability for each source.
    """

    def __init__(self, prob: float = 0.5):
        self.prob = check_prob("Polarity prob", prob)

    def change(self, sources: Tensor, generator: Generator) -> Tensor:
        """Sources `(b, m, c, s)`."""
        turned = toss((*sources.shape[:2], 1, 1), self.prob, generator)
        return sources * (1 - 2 * turned.to(sources))


class AudioAugmentation(Chain):
    """Time stretch, pitch shift, gain, channel swap and polarity, each with its own probability.

    `SpectrogramMasking` belongs to the same recipe, but acts on the network's input, not on audio.

    Args:
        time_stretch: range of the factor of the duration.
        pitch_semitones: range of the shift.
        gain: range of the factor of the amplitude.
        time_stretch_prob: for each item.
        pitch_prob: for each item. These two cost most: see the lesson.
        gain_prob: for each source, as the following.
        channel_swap_prob: for each source.
        polarity_prob: for each source.
        n_fft: window of the phase vocoder in samples; 46 ms of 44 100 Hz by default.

    Raises:
        ValueError: a range or probability makes no sense.
    """

    def __init__(
        self,
        time_stretch: Range = (0.9, 1.1),
        pitch_semitones: Range = (-2.0, 2.0),
        gain: Range = (0.7, 1.3),
        time_stretch_prob: float = 0.2,
        pitch_prob: float = 0.2,
        gain_prob: float = 1.0,
        channel_swap_prob: float = 0.5,
        polarity_prob: float = 0.5,
        n_fft: int = 2048,
    ):
        super().__init__(
            [
                TimeStretch(time_stretch, time_stretch_prob, n_fft),
                PitchShift(pitch_semitones, pitch_prob, n_fft),
                Gain(gain, gain_prob),
                ChannelSwap(channel_swap_prob),
                Polarity(polarity_prob),
            ]
        )


def _each(
    effect: Callable[[Tensor, float], Tensor],
    sources: Tensor,
    chosen: Tensor,
    amounts: Sequence[float],
) -> Tensor:
    """The effect, by its own amount, on each chosen item `(m, c, s)` of the sources."""
    items = zip(sources, chosen.tolist(), amounts, strict=True)
    return torch.stack([effect(item, amount) if on else item for item, on, amount in items])


def _uniform(shape: Sequence[int], limits: Range, generator: Generator) -> Tensor:
    low, high = limits
    return low + (high - low) * torch.rand(*shape, generator=generator)


def _check_range(name: str, limits: Range, lowest: float, highest: float) -> Range:
    low, high = limits
    if not lowest <= low <= high <= highest:
        raise ValueError(f"{name}={limits}: (low, high) between {lowest} and {highest}")
    return low, high
