"""Running lean: the batch that fits, steps that survive, profiles, staged pipelines, export."""

import lazy_loader

# `profile` is a file that can be called, whatever was imported before.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["export", "lean_load", "profile"],
    submod_attrs={
        "adapters": ["stages_from_config"],
        "batch_size": ["BatchSize", "find_batch_size", "knee"],
        "events": ["loading"],
        "monitor": ["Monitor"],
        "oom": ["part_size", "process_in_chunks", "train_step"],
        "set_up": ["diagnose"],
        "stage": ["Stage"],
        "staged": ["StagedPipeline"],
        "timing": ["Timing", "benchmark", "real_time_factor"],
    },
)
