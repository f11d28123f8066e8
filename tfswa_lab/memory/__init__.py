"""Where memory goes, in four verbs: `trace`, `snapshot`, `predict`, and `leaks` to diagnose."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["gauges", "leaks", "predict", "snapshot", "trace"],
    submod_attrs={"gauges": ["status"], "leaks": ["diagnose"], "predict": ["max_batch_size"]},
)
