"""From one step to a run that stops, resumes and scales out.

>>> from tfswa_lab.training import TrainingConfig
>>> TrainingConfig(max_steps=100, batch_size=8).learning_rate
0.001
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checkpoint": ["find_checkpoint", "list_checkpoints", "load_checkpoint", "save_checkpoint"],
        "config": ["TrainingConfig"],
        "learner": ["Learner", "NonFiniteError", "warmup_cosine"],
        "losses": [
            "L1SpectrogramLoss",
            "L1WaveformLoss",
            "MultiResolutionSTFTLoss",
            "SDRLoss",
            "SISDRLoss",
            "SourceSeparationLoss",
        ],
        "presets": ["PRESETS", "Preset"],
        "run": ["build_trainer"],
        "trainer": ["Trainer"],
        "validation": ["validate", "validation_loader"],
    },
)
