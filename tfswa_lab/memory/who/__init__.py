"""What holds the memory of tensors now, and which line of code would free it.

Notebook: 06_leak_diagnosis
"""

import sys
from inspect import signature
from types import ModuleType

from tfswa_lab.memory.who.names import forget_error
from tfswa_lab.memory.who.who import Held, Holder, who

__all__ = ["Held", "Holder", "forget_error", "who"]


class _CallablePackage(ModuleType):
    __call__ = staticmethod(who)
    __signature__ = signature(who)  # without it, the first parameter would be taken for `self`


sys.modules[__name__].__class__ = _CallablePackage  # for `from tfswa_lab.memory import who`
