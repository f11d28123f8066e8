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
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import optimizer as optimizers
from torch.utils import _foreach_utils

from tfswa_lab.memory.predict.cuda_autocast import cuda_autocast

# By patterns of operator names: memory that a prediction cannot see.
UNSEEN = {
    r"mm|bmm|addmm|baddbmm": "cuBLAS workspace: 8.1 MiB by default, 32 MiB on Hopper; in allocated",
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

    >>> error_budget(["aten.mm.default"])[0]
    'cuBLAS workspace: 8.1 MiB by default, 32 MiB on Hopper; in allocated'
    """
    names = {operator.removeprefix("aten.").split(".")[0] for operator in operators}
    found = [
        text for pattern, text in UNSEEN.items() if any(map(re.compile(pattern).fullmatch, names))
    ]
    return (*found, *ALWAYS)


aten = torch.ops.aten


def workspace(operator: Any, args: tuple) -> int:
    """Bytes that an operator takes beside inputs and outputs, 0 if they are unknown."""
    measure = WORKSPACES.get(operator)
    return measure(*args) if measure else 0


def _flash_backward(grad_out: Tensor, query: Tensor, *_: Any) -> int:
    """The gradient of the queries is accumulated in float32, beside one number per row."""
    b, h, length, width = query.shape
    rows = b * h * _up(length, 128)
    return 4 * rows * _up(width, 32) + 4 * rows


def _efficient_backward(grad_out: Tensor, query: Tensor, *_: Any) -> int:
    """The same for half precision; for float32 the gradient is accumulated in place."""
    b, h, length, width = query.shape
    rows = b * h * length
    half = query.dtype is not torch.float32
    return 4 * rows + (4 * b * h * _up(length, 64) * width if half else 0)


def _inverse_fft(x: Tensor, *_: Any) -> int:
    """cuFFT overwrites its input, so torch copies it first."""
    return x.numel() * x.element_size()


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


WORKSPACES = {
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten._fft_c2r.default: _inverse_fft,
}


ATTENTION = ("auto", "flash", "efficient", "cudnn", "math")
# The kernels that "auto" tries, in order. "hopper" is every GPU of compute capability 9 or 10
# (H100, H200, B200) with cuDNN above 9.15, which torch >= 2.11 for CUDA 13 installs; "ampere" is
# every other GPU.
AUTO = {
    "ampere": ("flash", "efficient", "math"),
    "hopper": ("cudnn", "flash", "efficient", "math"),
}
CUDNN_PREFERRED = 9_15_00  # torch prefers the cuDNN kernel above this version
CUDNN_ROWS = 65_535  # batch times heads, the most that the cuDNN kernel supports
HALVES = (torch.float16, torch.bfloat16)


def present_gpu() -> str:
    """The key of `AUTO` for the GPU of this machine; "ampere" where there is none.

    Source: `check_prefer_cudnn_attention` in sdp_utils.cpp of PyTorch 2.11.
    """
    if not torch.cuda.is_available() or os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") == "1":
        return "ampere"
    is_new = torch.cuda.get_device_capability()[0] in (9, 10)
    return "hopper" if is_new and torch.backends.cudnn.version() > CUDNN_PREFERRED else "ampere"


@contextmanager
def cuda_like(attention: str = "auto", gpu: str | None = None) -> Iterator[None]:
    """Treat CPU tensors as a GPU treats its own.

    Args:
        attention: the kernel of `scaled_dot_product_attention`: "flash" (half precision, no mask),
            "efficient", "cudnn", or "math", which keeps all scores; "auto" takes the first one that
            supports the inputs, in the GPU's order.
        gpu: a key of `AUTO`, whose order "auto" follows; None for the GPU of this machine.

    Raises:
        ValueError: the kernel or the GPU is unknown, or the kernel does not support the inputs.
    """
    gpu = present_gpu() if gpu is None else gpu
    for name, value, known in (("attention", attention, ATTENTION), ("gpu", gpu, AUTO)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is none of {', '.join(known)}")
    kernels = AUTO[gpu] if attention == "auto" else (attention,)
    devices = partial(_with_cpu, _foreach_utils._get_foreach_kernels_supported_devices)
    types = [*_foreach_utils._foreach_supported_types, FakeTensor]
    with ExitStack() as stack:
        for place, name, value in (
            (F, "scaled_dot_product_attention", partial(_attention, kernels)),
            (F, "dropout", _dropout),
            (optimizers, "_get_foreach_kernels_supported_devices", devices),
            (_foreach_utils, "_get_foreach_kernels_supported_devices", devices),
            (optimizers, "_foreach_supported_types", types),
            (_foreach_utils, "_foreach_supported_types", types),
        ):
            stack.enter_context(patch.object(place, name, value))
        stack.enter_context(cuda_autocast())
        yield


def _with_cpu(devices: Any) -> list[str]:
    return [*devices(), "cpu"]


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout on CUDA stores one byte per element, on the CPU a float."""
    return torch.native_dropout(x, p, True)[0] if training and 0 < p < 1 else x


def _attention(
    kernels: tuple[str, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` by the first of these kernels that supports the inputs."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (x.to(dtype) for x in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    refusals = _refusals(query, key, value, attn_mask, enable_gqa)
    kernel = next((name for name in kernels if name not in refusals), None)
    if kernel is None:
        (kernel,) = kernels
        raise ValueError(f"attention={kernel!r} cannot run here: {refusals[kernel]}")
    common = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    with torch.autocast("cpu", enabled=False):  # the inputs are cast already
        if kernel == "math":
            attend = torch.ops.aten._scaled_dot_product_attention_math
            return attend(query, key, value, attn_mask, enable_gqa=enable_gqa, **common)[0]
        if kernel == "flash":
            return _flash(query, key, value, **common)
        keeps = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        attend = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention")
        bias = _bias(attn_mask, query, key, multiple=8 if kernel == "efficient" else 1)
        return attend(query, key, value, bias, keeps, **common)[0]


def _refusals(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool
) -> dict[str, str]:
    """The kernels that do not support these inputs, and why."""
    width, half = query.shape[-1], query.dtype in HALVES
    rows = math.prod(query.shape[:-2])
    aligned = width % (8 if half else 4) == 0
    found = {}
    if query.ndim != 4 or enable_gqa:
        reason = "it is emulated only for (batch, heads, length, width) without groups of heads"
        found = dict.fromkeys(("flash", "efficient", "cudnn"), reason)
    if not half:
        found["flash"] = found["cudnn"] = f"{query.dtype} is not half precision; use autocast"
    if mask is not None:
        found["flash"] = "it takes no mask"
    if width > 256:
        found["flash"] = f"heads of {width} channels are wider than 256"
    if width > 128:
        found["cudnn"] = f"heads of {width} channels are wider than 128"
    if rows > CUDNN_ROWS:
        found["cudnn"] = f"batch times heads is {rows}, more than {CUDNN_ROWS}"
    if 1 in (query.shape[-2], key.shape[-2]):
        found["cudnn"] = "a sequence has length 1"
    if not aligned:
        found["efficient"] = found["cudnn"] = f"heads of {width} channels are not aligned"
    return found


def _flash(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, scale: Any
) -> Tensor:
    """Flash attention pads heads to multiples of eight channels and cuts the result."""
    width = query.shape[-1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    if width % 8:
        query, key, value = (F.pad(x, (0, -width % 8)) for x in (query, key, value))
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    return attend(query, key, value, dropout_p, is_causal, scale=scale)[0][..., :width]


def _bias(mask: Tensor | None, query: Tensor, key: Tensor, multiple: int) -> Tensor | None:
    """A mask as the kernels take it: numbers to add, with rows padded to a multiple."""
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -math.inf)
    length = mask.shape[-1]
    if length % multiple:
        mask = F.pad(mask, (0, -length % multiple))[..., :length]
    return mask.expand(*query.shape[:2], query.shape[2], key.shape[2])
