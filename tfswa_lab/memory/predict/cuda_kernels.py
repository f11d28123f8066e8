"""CUDA's choices on a machine without a GPU: kernels, casts and loops that change what is kept.

The tensors are on the CPU, where torch chooses other kernels. Here it makes CUDA's choices: which
attention kernel runs and what it saves, how dropout stores its mask, and that optimizers update all
parameters at once.

Functions are replaced, because a torch function mode is off in the backward pass, where
checkpointed parts run again.

Source: aten/src/ATen/native/transformers/{attention.cpp, cuda/sdp_utils.cpp} and
cuda/flash_attn/flash_api.cpp of PyTorch 2.13 (read, not copied).

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import optimizer as optimizers
from torch.optim import swa_utils
from torch.utils import _foreach_utils

from tfswa_lab.memory.predict.cuda_attention import cuda_attention
from tfswa_lab.memory.predict.cuda_autocast import cuda_autocast
from tfswa_lab.memory.predict.fake_tensors import GPU, STAND_IN, FakeTensors, replaced
from tfswa_lab.memory.predict.values import Values
from tfswa_lab.memory.sizes import KIB
from tfswa_lab.memory.trace.timeline import Block, Timeline

# By patterns of operator names: memory that a prediction cannot see.
UNSEEN = {
    r".*convolution.*": "cuDNN workspaces of convolutions: they depend on shapes and algorithms, "
    "up to gigabytes with cudnn.benchmark; in allocated while they run",
    r"_fft.*": "cuFFT: workspaces in allocated while they run, plans outside of it",
    r".*(lstm|gru|rnn).*": "cuDNN's reserve of recurrent layers; in allocated",
}
ALWAYS = (
    "temporaries inside operators that never become tensors",
    "the CUDA context and loaded kernels, hundreds of MiB: on the GPU, outside of the allocator",
)


def error_budget(operators: Iterable[str]) -> tuple[str, ...]:
    """One sentence for each kind of memory that the prediction cannot see.

    Args:
        operators: names such as `aten.mm.default`.

    >>> error_budget(["aten._fft_r2c.default"])[0]
    'cuFFT: workspaces in allocated while they run, plans outside of it'
    """
    names = {operator.removeprefix("aten.").split(".")[0] for operator in operators}
    found = [
        text for pattern, text in UNSEEN.items() if any(map(re.compile(pattern).fullmatch, names))
    ]
    return (*found, *ALWAYS)


aten = torch.ops.aten
# cuBLAS keeps a workspace for each thread that multiplies matrices: the program's, and the one in
# which autograd runs the backward pass. Source: aten/src/ATen/cuda/CublasHandlePool.cpp.
CUBLAS_WORKSPACE = {"ampere": (2 * 4096 + 8 * 16) * KIB, "hopper": 8 * 4096 * KIB}
MATRIX_PRODUCTS = re.compile(
    r"aten\.(mm|bmm|addmm|baddbmm|addbmm|mv|addmv|dot|vdot|linear|matmul|einsum)\.\w+"
)


def cublas_workspaces(timeline: Timeline, gpu: str) -> list[Block]:
    """What cuBLAS allocates with the first matrix product of a thread, and keeps.

    >>> product = Block(512, 512, 1, op="aten.mm.default", phase="forward")
    >>> [block.size for block in cublas_workspaces(Timeline([product], 1), "ampere")]
    [8519680]
    """
    first = {}
    for block in timeline.blocks:
        if MATRIX_PRODUCTS.fullmatch(block.op):
            first.setdefault(block.phase in ("backward", "recompute"), block.born)
    size = CUBLAS_WORKSPACE[gpu]
    return [Block(size, size, born, op="cuBLAS workspace") for born in first.values()]


def workspace(operator: Any, args: tuple) -> int:
    """Bytes that an operator takes beside inputs and outputs, 0 if they are unknown."""
    measure = WORKSPACES.get(operator)
    return measure(*args) if measure else 0


def _flash_backward(grad_out: Tensor, query: Tensor, key: Tensor, *_: Any) -> int:
    """The gradient of the queries is accumulated in float32, beside one number per row.

    With groups of heads, the gradients of keys and values are made for each head, then added up.
    """
    b, h, length, width = query.shape
    rows = b * h * _up(length, 128)
    per_head = 2 * b * h * key.shape[2] * width * key.element_size()
    return 4 * rows * _up(width, 32) + 4 * rows + (per_head if key.shape[1] != h else 0)


def _efficient_backward(grad_out: Tensor, query: Tensor, *_: Any) -> int:
    """The same for half precision; for float32 the gradient is accumulated in place."""
    b, h, length, width = query.shape
    rows = b * h * length
    half = query.dtype is not torch.float32
    return 4 * rows + (4 * b * h * _up(length, 64) * width if half else 0)


def _softmax_backward(grad_out: Tensor, output: Tensor, *_: Any) -> int:
    """The product of gradient and output (SoftMax.cu)."""
    return grad_out.numel() * grad_out.element_size()


def _inverse_fft(x: Tensor, *_: Any) -> int:
    """cuFFT overwrites its input, so torch copies it first."""
    return x.numel() * x.element_size()


# Losses whose mean or sum keeps the memory of all elements: torch makes them, then shortens the
# result in place. The last two hold another such tensor until they have been added up.
FULL_LOSSES = {
    aten.binary_cross_entropy.default: 3,
    aten.soft_margin_loss.default: 2,
    aten.mse_loss.default: 2,
    aten.smooth_l1_loss.default: 2,
}


def with_full_storage(loss: Any, args: tuple, result: Tensor) -> Tensor:
    """The result of a loss, as a part of the memory that it keeps.

    Args:
        loss: a key of `FULL_LOSSES`, whose value is the place of the argument `reduction`.
        args: of the loss.
        result: what its fake kernel returned.
    """
    place = FULL_LOSSES[loss]
    if len(args) > place and args[place] == 0:  # no reduction
        return result
    shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
    return result.new_empty(shape).as_strided((), ())


def _loss(x: Tensor, target: Tensor, *_: Any) -> int:
    """All elements, beside those that the result keeps."""
    reduced = torch.broadcast_shapes(x.shape, target.shape)
    return math.prod(reduced) * x.element_size()


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


WORKSPACES = {
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten._softmax_backward_data.default: _softmax_backward,
    aten.mse_loss.default: _loss,
    aten.smooth_l1_loss.default: _loss,
    aten._fft_c2r.default: _inverse_fft,
}


@contextmanager
def cuda_like(fake: FakeTensors, values: Values, attention: str, gpu: str) -> Iterator[None]:
    """A GPU's kernels for its tensors; arguments as for `cuda_attention`."""
    devices = partial(_foreach_devices, fake, _foreach_utils._get_foreach_kernels_supported_devices)
    types = [*_foreach_utils._foreach_supported_types, FakeTensor]
    places = (optimizers, swa_utils, _foreach_utils)
    of_torch = (
        (F, "dropout", _dropout(fake)),
        (torch._C, "_group_tensors_by_device_and_dtype", _grouped),
        *((place, "_get_foreach_kernels_supported_devices", devices) for place in places),
        (optimizers, "_foreach_supported_types", types),
        (_foreach_utils, "_foreach_supported_types", types),
    )
    with replaced(of_torch), cuda_attention(fake, values, attention, gpu), cuda_autocast():
        yield


def _foreach_devices(fake: FakeTensors, devices: Callable) -> list[str]:
    """A program that never names a GPU has its tensors on the CPU."""
    return devices() if fake.names_gpu else [*devices(), "cpu"]


def _grouped(*args: Any) -> dict:
    """Groups of tensors by device and dtype, which C++ makes."""
    groups = GROUP_TENSORS(*args)
    return {(GPU if on == STAND_IN else on, dtype): v for (on, dtype), v in groups.items()}


GROUP_TENSORS = torch._C._group_tensors_by_device_and_dtype


def _dropout(fake: FakeTensors) -> Callable:
    """Dropout on CUDA stores one byte per element, on the CPU a float."""
    on_cpu = F.dropout

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if inplace or not fake.runs_on_gpu(x):
            return on_cpu(x, p, training, inplace)
        return torch.native_dropout(x, p, True)[0] if training and 0 < p < 1 else x

    return dropout
