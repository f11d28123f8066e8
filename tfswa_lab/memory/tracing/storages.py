"""Which tensors lie in memory that can be told: not those still to come, nor wrappers of others.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.parameter import UninitializedTensorMixin

ROWS = ("crow_indices", "col_indices", "values")
COLUMNS = ("ccol_indices", "row_indices", "values")
PARTS = {torch.sparse_coo: ("_indices", "_values"), torch.sparse_csr: ROWS, torch.sparse_bsr: ROWS}
PARTS |= {torch.sparse_csc: COLUMNS, torch.sparse_bsc: COLUMNS}


def has_storage(thing: Any) -> bool:
    """Whether it is a tensor with a storage of its own that can be asked for.

    Sparse tensors have several, parameters of lazy modules have none yet, inside `torch.func.vmap`
    and `grad` tensors wrap others, and what `torch.export` leaves behind has formulas for sizes.

    Notebook: 05_where_memory_goes

    >>> has_storage(torch.ones(2)), has_storage(torch.nn.LazyLinear(3).weight)
    (True, False)
    """
    if not issubclass(type(thing), Tensor) or isinstance(thing, UninitializedTensorMixin):
        return False
    if thing.layout is not torch.strided or thing._has_symbolic_sizes_strides:
        return False
    return not is_functorch_wrapped_tensor(thing)


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The tensors that a tensor consists of: itself, or the indices and values of a sparse one.

    Notebook: 05_where_memory_goes

    >>> [part.numel() for part in parts_of(torch.eye(3).to_sparse())]
    [6, 3]
    """
    if has_storage(tensor):
        return [tensor]
    names = PARTS.get(getattr(tensor, "layout", None), ())
    return [getattr(tensor, name)() for name in names]
