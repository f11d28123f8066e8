"""Tensors with a shape and no values: a step of 700 GiB fits on a laptop.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Make all tensors fake and on the CPU, also those that a program wants on a GPU."""
    with patch.object(nn.Module, "_apply", _apply_by_replacing), FakeTensors(), CudaAsCpu():
        yield


class FakeTensors(FakeTensorMode):
    """Torch's mode of fake tensors, with answers where a program asks for a value.

    Every number (`.item()`) is 1 and every truth value (`if tensor`) is False: a logged loss is
    finite, an overlap is not empty, a check for NaN finds none.
    """

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, so torch does not have to wrap every dispatch."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        if func in (torch.ops.aten.equal.default, torch.ops.aten.is_nonzero.default):
            return False
        if func is torch.ops.aten._local_scalar_dense.default:
            return _answer(args[0])
        return super().__torch_dispatch__(func, types, args, kwargs)


def _answer(tensor: Tensor) -> bool | complex | float | int:
    if tensor.dtype is torch.bool:
        return False
    if tensor.is_complex():
        return 1 + 0j
    return 1.0 if tensor.is_floating_point() else 1


class CudaAsCpu(TorchFunctionMode):
    """Where a program names the device `cuda`, it gets the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        if func is Tensor.cuda:
            return args[0]
        kwargs = kwargs or {}
        if "device" in kwargs:
            kwargs = kwargs | {"device": _on_cpu(kwargs["device"])}
        if func is Tensor.to:
            args = tuple(map(_on_cpu, args))
        return func(*args, **kwargs)


def _on_cpu(value: Any) -> Any:
    is_cuda = isinstance(value, str | torch.device) and str(value).startswith("cuda")
    return torch.device("cpu") if is_cuda else value


def _apply_by_replacing(
    module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """`Module.to` and the like; torch would swap the data of tensors, which fake ones refuse."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is not None and (changed := function(parameter)) is not parameter:
            changed = nn.Parameter(changed.detach(), parameter.requires_grad)
            module._parameters[name] = changed
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module
