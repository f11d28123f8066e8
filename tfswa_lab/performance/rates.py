"""How much work a step asks for, and how fast this machine does such work at its best.

A kernel that moves bytes as fast as a copy, or multiplies as fast as a large GEMM, has reached the
roof of its machine: it gets faster only if it moves fewer bytes or multiplies less.

Source: Williams, Waterman & Patterson, "Roofline: an insightful visual performance model for
multicore architectures", Communications of the ACM 52(4), 2009.

Notebook: 09_running_lean
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tfswa_lab.performance.timing import seconds_of

aten = torch.ops.aten
# The CPU's fused attention has the shapes of CUDA's, but torch has no formula for it.
FLOPS = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        aten._scaled_dot_product_flash_attention
    ],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
OVERWRITES = {  # their first argument is written and not read
    *("copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_", "exponential_")
}

LONG_ENOUGH = 5e-3  # seconds that a product takes whose rate counts

# What a step asks for ----------------------------------------------------------------------------


class Work(TorchDispatchMode):
    """Counts inside its block what operators read, write and multiply; views cost nothing.

    Args:
        unless: whether an operator that runs now is not to be counted.

    Attributes:
        calls: by operator such as `aten::add`.
        bytes: by operator, of the tensors that it reads and writes. What stays in a cache between
            two operators counts as well.
        flops: by operator and dtype, of matrix products, convolutions and attention, forward and
            backward; a multiplication and its addition are two.
        devices: types of the devices that tensors are on.
    """

    def __init__(self, unless: Callable[[], bool] = lambda: False):
        super().__init__()
        self._unless = unless
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.flops: Counter[tuple[str, torch.dtype]] = Counter()
        self.devices: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run one operator and count it."""
        kwargs = kwargs or {}
        if func._overloadpacket not in FLOPS and (parts := self._by_parts(func, args, kwargs)):
            return parts[0]
        out = func(*args, **kwargs)
        if not self._unless():
            self._count(func, args, kwargs, out)
        return out

    def _by_parts(self, func: Any, args: tuple, kwargs: dict) -> tuple | None:
        """The result of an operator that is defined by others, counted as those."""
        with self:
            out = func.decompose(*args, **kwargs)
        return None if out is NotImplemented else (out,)

    def _count(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        read, written = _tensors((args, kwargs)), _tensors(out)
        name = func._overloadpacket._qualified_op_name
        self.devices |= {x.device.type for x in (*read, *written)}
        self.calls[name] += 1
        if not _moves_nothing(func, read, written):
            if func._overloadpacket.__name__ in OVERWRITES:
                read = read[1:]
            self.bytes[name] += sum(map(bytes_of, (*read, *written)))
        if formula := FLOPS.get(func._overloadpacket):
            dtype = next(x.dtype for x in written)
            self.flops[name, dtype] += formula(*args, **kwargs, out_val=out)


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _moves_nothing(func: Any, read: list[Tensor], written: list[Tensor]) -> bool:
    """Whether an operator makes a view, or memory that nobody has filled."""
    if func._schema.is_mutable:
        return False
    before = {_memory(x) for x in read}
    return "empty" in func.__name__ or all(_memory(x) in before for x in written)


def _memory(tensor: Tensor) -> int:
    """The identity of the memory that views share."""
    is_strided = tensor.layout is torch.strided
    return tensor.untyped_storage()._cdata if is_strided else id(tensor)


def bytes_of(tensor: Tensor) -> int:
    """Bytes of different elements: an expanded axis counts once.

    >>> bytes_of(torch.zeros(3, 1).expand(3, 100))
    12
    """
    if tensor.layout is not torch.strided or tensor.is_nested:
        return tensor.numel() * tensor.element_size()
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride or not size) * tensor.element_size()


# What this machine can do ------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """The best that a machine does, measured on it.

    Args:
        flops: per second, of a large matrix product.
        bytes: per second, read and written by a copy that fits no cache.
    """

    flops: float
    bytes: float


def measured_rates(device: torch.device, dtype: torch.dtype = torch.float32) -> Rates:
    """Rates of a device at a dtype: measured once, about a tenth of a second, and then kept.

    They are measured again for other numbers of threads and other settings of TF32.
    """
    precision = torch.get_float32_matmul_precision()
    settings = torch.get_num_threads(), precision, torch.backends.cuda.matmul.allow_tf32
    return Rates(
        _gemm_rate(torch.device(device), dtype, settings),
        _copy_rate(torch.device(device), settings[0]),
    )


@lru_cache
def _gemm_rate(device: torch.device, dtype: torch.dtype, _settings: tuple) -> float:
    """Of the first size that takes long enough; some CPUs multiply half precision very slowly."""
    for size in (256, 1024, 4096):
        left, right = (_filled((size, size), device, dtype) for _ in range(2))
        out = torch.empty_like(left)
        seconds = _least(partial(torch.mm, left, right, out=out))
        if seconds > LONG_ENOUGH:
            break
    return 2 * size**3 / seconds


@lru_cache
def _copy_rate(device: torch.device, _threads: int) -> float:
    size = 2**28 if device.type == "cuda" else 2**26
    source, target = (_filled((size,), device, torch.uint8) for _ in range(2))
    return 2 * size / _least(lambda: target.copy_(source))


def _filled(shape: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Ones, which draw no random numbers; each page is touched."""
    return torch.ones(shape, device=device, dtype=dtype)


@torch.no_grad()
def _least(fn: Callable[[], Any]) -> float:
    """Seconds of the fastest of five runs, after one to warm up."""
    return min([seconds_of(fn) for _ in range(6)][1:])
