"""Augmentation: from the same songs, batches that were never recorded.

Every augmentation is called as `augment(batch, generator)` and returns a new batch whose mixture
is the sum of its sources again. `SpectrogramMasking` alone is different: it hides a part of the
network's input and changes neither mixture nor target.

Notebook: 07_training
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "augmentation": [
            "Augmentation",
            "Chain",
            "MixupAugmentation",
            "Remix",
            "SpectrogramMasking",
        ],
        "effects": [
            "AudioAugmentation",
            "ChannelSwap",
            "Gain",
            "PitchShift",
            "Polarity",
            "SpeedPerturbation",
            "TimeStretch",
        ],
    },
)
