"""What code does with memory: every allocation, its line, its module, the peak.

Notebook: 05_where_memory_goes
"""

import sys
from inspect import signature
from types import ModuleType

from tfswa_lab.memory.trace.stacks import Frame
from tfswa_lab.memory.trace.timeline import Block, Peak, Timeline
from tfswa_lab.memory.trace.trace import Trace, trace

__all__ = ["Block", "Frame", "Peak", "Timeline", "Trace", "trace"]


class _CallablePackage(ModuleType):
    __call__ = staticmethod(trace)
    __signature__ = signature(trace)  # without it, the first parameter would be taken for `self`


sys.modules[__name__].__class__ = _CallablePackage  # for `from tfswa_lab.memory import trace`
