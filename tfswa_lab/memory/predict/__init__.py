"""How much GPU memory a step will take, without a GPU.

Notebook: 05_where_memory_goes
"""

import sys
from inspect import signature
from types import ModuleType

from tfswa_lab.memory.predict.predict import (
    Prediction,
    compare,
    max_batch_size,
    predict,
    predict_choices,
    to_markdown,
)

__all__ = ["Prediction", "compare", "max_batch_size", "predict", "predict_choices", "to_markdown"]


class _CallablePackage(ModuleType):
    __call__ = staticmethod(predict)
    __signature__ = signature(predict)  # without it, the first parameter would be taken for `self`


sys.modules[__name__].__class__ = _CallablePackage  # for `from tfswa_lab.memory import predict`
