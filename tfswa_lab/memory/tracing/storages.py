"""Which tensors lie in memory that can be told: not those still to come, nor wrappers of others.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.parameter import UninitializedTensorMixin


def has_storage(thing: Any) -> bool:
    """Whether it is a tensor with a storage of its own that can be asked for.

    Sparse tensors have several, parameters of lazy modules have none yet, and inside
    `torch.func.vmap` and `grad` tensors wrap others.

    Notebook: 05_where_memory_goes

    >>> has_storage(torch.ones(2)), has_storage(torch.nn.LazyLinear(3).weight)
    (True, False)
    """
    if not issubclass(type(thing), Tensor) or isinstance(thing, UninitializedTensorMixin):
        return False
    return thing.layout is torch.strided and not is_functorch_wrapped_tensor(thing)
