"""Augmentation: from the same songs, batches that were never recorded.

Every augmentation is called as `augment(batch, generator)` and returns a new batch whose mixture
is the sum of its sources again. `SpectrogramMasking` alone is different: it hides a part of what
the network sees and touches neither mixture nor target.

Notebook: 07_training
"""

from tfswa_lab.data.augment.effects import (
    AudioAugmentation,
    ChannelSwap,
    Gain,
    PitchShift,
    Polarity,
    SpeedPerturbation,
    TimeStretch,
)
from tfswa_lab.data.augment.masking import SpectrogramMasking
from tfswa_lab.data.augment.remix import MixupAugmentation, Remix
from tfswa_lab.data.augment.sources import Augmentation, Chain

__all__ = [
    "AudioAugmentation",
    "Augmentation",
    "Chain",
    "ChannelSwap",
    "Gain",
    "MixupAugmentation",
    "PitchShift",
    "Polarity",
    "Remix",
    "SpectrogramMasking",
    "SpeedPerturbation",
    "TimeStretch",
]
