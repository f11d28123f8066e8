"""Does a step lose memory, which line allocates it, and which object keeps it alive?

Lazy, because pytest imports `pytest_plugin` wherever this package is installed.

Notebook: 06_leak_diagnosis
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"diagnose": ["diagnose"], "verdicts": ["Diagnosis"]}
)
