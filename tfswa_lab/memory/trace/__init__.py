"""What a piece of code does with memory: every allocation, its line, its module, the peak.

Notebook: 05_where_memory_goes
"""

import sys
from types import ModuleType

from tfswa_lab.memory.trace.timeline import Block, Frame, Timeline
from tfswa_lab.memory.trace.trace import Trace, trace

__all__ = ["Block", "Frame", "Timeline", "Trace", "trace"]


class _Callable(ModuleType):
    __call__ = staticmethod(trace)


sys.modules[__name__].__class__ = _Callable  # `from tfswa_lab.memory import trace` is this package
