"""Where memory goes: `trace`, `snapshot`, `predict`, `leaks` to diagnose, and `who` holds it now.

In a notebook, `%load_ext tfswa_lab.memory` adds `%memory`, `%memory who` and `%%memory`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["gauges", "leaks", "predict", "snapshot", "trace", "who"],
    submod_attrs={
        "gauges": ["status"],
        "ipython": ["load_ipython_extension"],
        "leaks": ["diagnose"],
        "predict": ["max_batch_size"],
    },
)
