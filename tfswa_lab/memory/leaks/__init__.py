"""Does a step lose memory, which line makes what is lost, and what holds it?

Lazy, because pytest loads `pytest_plugin` wherever this package is installed.

Notebook: 06_leak_diagnosis
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"diagnose": ["diagnose"], "verdicts": ["Diagnosis"]}
)
