"""Calls of a program that a prediction answers in torch's place.

They ask for numbers, name devices, or talk to a GPU that is not there.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tfswa_lab.memory.predict import sequences
from tfswa_lab.memory.predict.fake_tensors import STAND_IN, FakeTensors, the_gpu
from tfswa_lab.memory.predict.unknown import (
    Truth,
    Unknown,
    asking_frame,
    is_compared,
    line_of,
    user_line,
)
from tfswa_lab.memory.predict.unknown_array import UnknownArray
from tfswa_lab.memory.predict.values import MOST_NUMBERS, Values, real_tensors


class Calls(TorchFunctionMode):
    """A mode that sees every function of torch that the program calls.

    Args:
        fake: the mode that makes tensors fake.
        values: what is known of their numbers.
    """

    def __init__(self, fake: FakeTensors, values: Values):
        super().__init__()
        self.fake, self.values = fake, values
        self.running: Any = None  # the function of torch that the program has called

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": without_cuda(kwargs["device"])}
        answer = ANSWERS.get(func)
        before, self.running = self.running, func
        try:
            if answer:
                return answer(self, *args, **kwargs)
            if self.values.handed_out and any(type(each) is Unknown for each in args):
                args = [_as_number(func, each) for each in args]
                return self.values.made_with_unknown(func(*args, **kwargs))
            return func(*args, **kwargs)
        finally:
            self.running = before


@contextmanager
def calls_answered(fake: FakeTensors, values: Values) -> Iterator[Calls]:
    """Answer the calls of a program, also of its parts that run again in a backward pass."""
    calls, run = Calls(fake, values), torch.autograd._engine_run_backward

    def with_answers(*args: Any, **kwargs: Any) -> Any:
        with calls:
            return run(*args, **kwargs)

    with patch.object(torch.autograd, "_engine_run_backward", with_answers), calls:
        yield calls


ARITHMETIC = {torch.full, torch.full_like, Tensor.new_full, Tensor.fill_} | {
    getattr(place, name)
    for place in (Tensor, torch)
    for name in (
        *("add", "sub", "mul", "remainder", "floor_divide", "add_", "sub_", "mul_", "rsub"),
        *("__add__", "__sub__", "__mul__", "__mod__", "__floordiv__", "__radd__", "__rsub__"),
    )
    if hasattr(place, name)
}


def _as_number(func: Any, value: Any) -> Any:
    """A whole number keeps its type in arithmetic, although nobody knows it."""
    return 1 if type(value) is Unknown and value.whole and func in ARITHMETIC else value


def without_cuda(device: Any) -> Any:
    """The stand-in for a GPU; other devices as they are."""
    if isinstance(device, int) and not isinstance(device, bool):
        return the_gpu(torch.device("cuda", device))
    if isinstance(device, str | torch.device) and str(device).startswith("cuda"):
        return the_gpu(torch.device(device))
    return device


def _to(calls: Calls, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return tensor.to(*map(without_cuda, args), **kwargs)


def _cuda(calls: Calls, tensor: Tensor, device: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    return tensor.to(STAND_IN if device is None else without_cuda(device))


def _pin_memory(calls: Calls, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    if tensor.is_cuda:
        raise RuntimeError("cannot pin 'torch.cuda' tensors: only dense CPU tensors can be pinned")
    if getattr(tensor, "pinned", False):
        return tensor
    pinned = tensor.clone()
    pinned.pinned = True
    return pinned


def _is_pinned(calls: Calls, tensor: Tensor, *_: Any, **__: Any) -> bool:
    return getattr(tensor, "pinned", False)


def _deepcopy(calls: Calls, tensor: Tensor, memo: dict) -> Tensor:
    """A clone; torch would copy a storage, of which fake tensors have none."""
    if id(tensor) in memo:
        return memo[id(tensor)]
    if not tensor.is_leaf:
        raise RuntimeError(
            "only tensors created explicitly by the user support the deepcopy protocol"
        )
    copied = tensor.detach().clone()
    if getattr(tensor, "_is_param", False):
        copied = nn.Parameter(copied, tensor.requires_grad)
    copied.requires_grad_(tensor.requires_grad)
    if tensor.grad is not None:
        copied.grad = tensor.grad.detach().clone()
    memo[id(tensor)] = copied
    return copied


def _data_ptr(calls: Calls, tensor: Tensor) -> int:
    """Code that writes to an address which does not exist would end the process."""
    raise NotImplementedError(
        f"the address of a tensor at {user_line()}: tensors of a prediction have no memory; keep "
        "the line out of make_step and of the step"
    )


def _item(calls: Calls, tensor: Tensor) -> Any:
    if tensor.numel() != 1:
        raise RuntimeError(f"a Tensor with {tensor.numel()} elements cannot be converted to Scalar")
    return calls.values.number(tensor)


def _whole(calls: Calls, tensor: Tensor) -> int:
    return int(_item(calls, tensor))


def _float(calls: Calls, tensor: Tensor) -> float:
    number = _item(calls, tensor)
    if isinstance(number, Unknown | Truth):
        if is_compared(asking_frame()):
            raise calls.values.refuse("a branch", line_of(asking_frame()))
        calls.values.note(
            f"float() of a tensor at {line_of(asking_frame())} gave NaN, as for all numbers that "
            "a prediction does not know; comparisons with it are false"
        )
    return float(number)


def _bool(calls: Calls, tensor: Tensor) -> bool:
    if tensor.numel() > 1:
        raise RuntimeError("Boolean value of Tensor with more than one value is ambiguous")
    return bool(calls.values.number(tensor))


def _equal(calls: Calls, one: Tensor, other: Tensor, **close: Any) -> bool | Truth:
    known = [calls.values.of(tensor) for tensor in (one, other)]
    if any(values is None for values in known):
        return Truth(calls.values, line_of(asking_frame()))
    with real_tensors():
        return torch.allclose(*known, **close) if close else torch.equal(*known)


def _allclose(
    calls: Calls,
    one: Tensor,
    other: Tensor,
    rtol: float = 1e-5,
    atol: float = 1e-8,
    equal_nan: bool = False,
) -> bool | Truth:
    return _equal(calls, one, other, rtol=rtol, atol=atol, equal_nan=equal_nan)


def _format(calls: Calls, tensor: Tensor, specification: str) -> str:
    if tensor.dim() == 0 and specification:
        return format(_item(calls, tensor), specification)
    return repr(tensor)


def _tolist(calls: Calls, tensor: Tensor) -> Any:
    known = calls.values.of(tensor)
    if known is not None:
        with real_tensors():
            return known.tolist()
    return calls.values.numbers(tensor)


def _numpy(calls: Calls, tensor: Tensor, *_: Any, **force: Any) -> np.ndarray:
    """An array of the right shape; numbers that nobody knows are NaN."""
    if not force.get("force"):
        if tensor.requires_grad:
            raise RuntimeError(
                "Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() "
                "instead."
            )
        if tensor.is_cuda:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
                "tensor to host memory first."
            )
    known = calls.values.of(tensor)
    if known is not None:
        with real_tensors():
            return known.numpy().copy()
    if not tensor.dtype.is_floating_point:
        raise calls.values.refuse("an array of whole numbers", line_of(asking_frame()))
    with real_tensors():
        unknown = torch.full((), math.nan, dtype=tensor.dtype).numpy()
    every = np.broadcast_to(unknown, tuple(tensor.shape))
    every = every.copy() if every.size <= MOST_NUMBERS else every
    found = every.view(UnknownArray)
    found.values = calls.values
    return found


def _array(calls: Calls, tensor: Tensor, dtype: Any = None, *_: Any, **__: Any) -> np.ndarray:
    found = _numpy(calls, tensor)
    return found if dtype is None else found.astype(dtype)


def _from_data(function: Callable) -> Callable:
    """`torch.tensor` and the like, which make a tensor on the host, then copy it."""

    def make(
        calls: Calls,
        data: Any,
        *args: Any,
        device: Any = None,
        requires_grad: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        if isinstance(data, torch.UntypedStorage):  # a file's bytes, as safetensors reads them
            with real_tensors():
                return function(data, *args, **kwargs)
        unknown = []
        if not isinstance(data, Tensor):
            data = _numbers_in(calls, data, unknown)
        made = function(data, *args, **kwargs)
        if unknown:
            calls.values.forget(made.untyped_storage()._cdata)
        made = made if device is None else made.to(device)
        return made.requires_grad_() if requires_grad else made

    return make


def _numbers_in(calls: Calls, data: Any, unknown: list) -> Any:
    """Nested lists with numbers in place of tensors; those that nobody knows are collected."""
    if isinstance(data, list | tuple):
        return [_numbers_in(calls, each, unknown) for each in data]
    if isinstance(data, Tensor):
        known = calls.values.of(data)
        if known is None:
            unknown.append(data)
        with real_tensors():
            if known is None:
                known = torch.zeros(data.shape, dtype=data.dtype)
            return known.tolist()
    if isinstance(data, Unknown | Truth):
        unknown.append(data)
        if isinstance(data, Truth):
            return False
        return 0 if data.whole else 0.0
    return data


def _one_hot(calls: Calls, tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes == -1:
        num_classes = int((tensor.max() + 1).item())
    made = torch.zeros((*tensor.shape, num_classes), dtype=tensor.dtype, device=tensor.device)
    return made.scatter_(-1, tensor.unsqueeze(-1), 1)


def _patched(name: str) -> Callable:
    """A function that the program has imported by name, before it was replaced."""
    return lambda calls, *args, **kwargs: getattr(F, name)(*args, **kwargs)


ANSWERS = {
    Tensor.to: _to,
    Tensor.cuda: _cuda,
    Tensor.pin_memory: _pin_memory,
    Tensor.is_pinned: _is_pinned,
    Tensor.data_ptr: _data_ptr,
    Tensor.__deepcopy__: _deepcopy,
    Tensor.item: _item,
    Tensor.__int__: _whole,
    Tensor.__index__: _whole,
    Tensor.__float__: _float,
    Tensor.__bool__: _bool,
    Tensor.__format__: _format,
    Tensor.tolist: _tolist,
    Tensor.numpy: _numpy,
    Tensor.__array__: _array,
    torch.is_nonzero: _bool,
    Tensor.is_nonzero: _bool,
    torch.equal: _equal,
    Tensor.equal: _equal,
    torch.allclose: _allclose,
    Tensor.allclose: _allclose,
    F.one_hot: _one_hot,
    F.scaled_dot_product_attention: _patched("scaled_dot_product_attention"),
    F.ctc_loss: sequences.ctc_loss,
    torch._pack_padded_sequence: sequences.pack,
    torch._pad_packed_sequence: sequences.unpack,
    **{rnn: sequences.recurrent(rnn) for rnn in (torch.lstm, torch.gru)},
    **{rnn: sequences.recurrent(rnn) for rnn in (torch.rnn_tanh, torch.rnn_relu)},
    F.dropout: _patched("dropout"),
    torch.dropout: _patched("dropout"),
    **{
        function: _from_data(function)
        for function in (torch.tensor, torch.as_tensor, torch.asarray)
    },
}
