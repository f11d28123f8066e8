"""Which attention kernel CUDA takes, and what that kernel keeps.

Source: aten/src/ATen/native/transformers/{attention.cpp, cuda/sdp_utils.cpp} and
cuda/flash_attn/flash_api.cpp of PyTorch 2.13 (read, not copied).

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, bias, flex_attention
from torch.nn.attention.bias import CausalBias, CausalVariant

from tfswa_lab.memory.predict.fake_tensors import FakeTensors, replaced
from tfswa_lab.memory.predict.unknown import user_line
from tfswa_lab.memory.predict.values import Values, real_tensors
from tfswa_lab.memory.sizes import format_bytes

ATTENTION = ("auto", "flash", "efficient", "cudnn", "math")
# The kernels that "auto" tries, in order. "hopper" is every GPU of compute capability 9 or 10
# (H100, H200, B200) with cuDNN above 9.15, which torch >= 2.11 for CUDA 13 installs; "ampere" is
# every other GPU.
AUTO = {
    "ampere": ("flash", "efficient", "math", "cudnn"),
    "hopper": ("cudnn", "flash", "efficient", "math"),
}
CUDNN_PREFERRED = 9_15_00  # torch prefers the cuDNN kernel above this version
CUDNN_ROWS = 65_535  # batch times heads, the most that the cuDNN kernel supports
HALVES = (torch.float16, torch.bfloat16)
KERNELS = {
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.CUDNN_ATTENTION: "cudnn",
    SDPBackend.MATH: "math",
}
ORDER = torch._C._get_sdp_priority_order()  # unless the program sets its own priorities


def present_gpu() -> str:
    """The key of `AUTO` for the GPU of this machine; "ampere" where there is none.

    Source: `check_prefer_cudnn_attention` in sdp_utils.cpp of PyTorch 2.11.
    """
    if not torch.cuda.is_available() or os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") == "1":
        return "ampere"
    is_new = torch.cuda.get_device_capability()[0] in (9, 10)
    return "hopper" if is_new and torch.backends.cudnn.version() > CUDNN_PREFERRED else "ampere"


@contextmanager
def cuda_attention(fake: FakeTensors, values: Values, attention: str, gpu: str) -> Iterator[None]:
    """Attention on the GPU takes CUDA's kernels.

    Args:
        fake: the mode that makes tensors fake.
        values: takes notes.
        attention: one of `ATTENTION`.
        gpu: a key of `AUTO`.

    Raises:
        ValueError: the kernel or the GPU is unknown, or the kernel does not support the inputs.
    """
    for name, value, known in (("attention", attention, ATTENTION), ("gpu", gpu, AUTO)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is none of {', '.join(known)}")
    on_cpu = F.scaled_dot_product_attention

    def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not fake.runs_on_gpu(query):
            return on_cpu(query, *args, **kwargs)
        kernels = allowed(gpu) if attention == "auto" else (attention,)
        return on_gpu(kernels, query, *args, **kwargs)

    def flex(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        scores = 4 * math.prod(query.shape[:-1]) * key.shape[-2]
        values.note(
            f"flex_attention at {user_line()}: predicted as compiled; without "
            f"torch.compile it makes all scores, {format_bytes(scores)} for each copy of them"
        )
        return (*Flex.apply(query, key, value), None)

    of_torch = (
        (F, "scaled_dot_product_attention", attend),
        (flex_attention, "flex_attention_hop", flex),
        (bias.CausalBias, "__new__", _new_bias),
        *((torch.nested, name, _refuse_nested) for name in NESTED),
    )
    with replaced(of_torch):
        yield


def allowed(gpu: str) -> tuple[str, ...]:
    """The kernels that the program allows, in its own order if it has one, else in the GPU's."""
    own = _cur_sdpa_kernel_backends(with_priority=True)
    names = tuple(KERNELS[kernel] for kernel in own if kernel in KERNELS)
    if torch._C._get_sdp_priority_order() != ORDER:
        return names
    return tuple(name for name in AUTO[gpu] if name in names)


def on_gpu(
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
    lower_right = False
    if isinstance(attn_mask, CausalBias):  # needs no memory
        is_square = query.shape[-2] == key.shape[-2]
        lower_right = attn_mask.variant is CausalVariant.LOWER_RIGHT and not is_square
        attn_mask, is_causal = None, True
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (x.to(dtype) for x in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    refusals = refused(query, key, value, attn_mask, is_causal and not lower_right, enable_gqa)
    kernel = next((name for name in kernels if name not in refusals), None)
    if kernel is None:
        reasons = "; ".join(f"{name}: {refusals[name]}" for name in kernels)
        raise ValueError(f"attention: none of the allowed kernels can run here: {reasons}")
    common = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    with torch.autocast("cpu", enabled=False):  # the inputs are cast already
        if kernel == "math":
            attend = torch.ops.aten._scaled_dot_product_attention_math
            return attend(query, key, value, attn_mask, enable_gqa=enable_gqa, **common)[0]
        if kernel == "flash":
            return _flash(query, key, value, **common)
        keeps = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        attend = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention")
        added = _bias(attn_mask, query, key, multiple=8 if kernel == "efficient" else 1)
        return attend(query, key, value, added, keeps, **common)[0]


def refused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
) -> dict[str, str]:
    """The kernels that do not support these inputs, and why."""
    width, dtype = query.shape[-1], query.dtype
    half = dtype in HALVES
    rows = math.prod(query.shape[:-2])
    aligned = all(x.shape[-1] % (8 if half else 4) == 0 for x in (query, value))
    fused = ("flash", "efficient", "cudnn")
    found = {}
    if any(x.ndim != 4 for x in (query, key, value)):
        found = dict.fromkeys(fused, "it takes (batch, heads, length, width) only")
    elif query.shape[:2] != key.shape[:2] and not enable_gqa:
        found = dict.fromkeys(fused, "batches or heads differ")
    elif query.shape[1] != key.shape[1]:
        found["efficient"] = "it takes no groups of heads"
    if any(x.stride(-1) != 1 for x in (query, key, value)):
        found |= dict.fromkeys(fused, "the last axis is not contiguous")
    if not half:
        found["flash"] = found["cudnn"] = f"{dtype} is not half precision; use autocast"
    if dtype is torch.float64:
        found["efficient"] = "float64 is not supported"
    if mask is not None:
        found["flash"] = "it takes no mask"
    if is_causal and query.shape[-2] != key.shape[-2]:
        found["flash"] = "is_causal with lengths that differ"
    if width != value.shape[-1]:
        found["flash"] = "keys and values have other widths"
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


class Flex(torch.autograd.Function):
    """Memory of a compiled `flex_attention`: it keeps its inputs, its output and a sum per row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Output (b, h, l, d) and sums (b, h, l) in float32."""
        output = query.new_empty((*query.shape[:-1], value.shape[-1])).uniform_()
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32).uniform_()
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.mark_non_differentiable(sums)
        return output, sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        """Three gradients, and a number per row beside them."""
        *inputs, _, sums = ctx.saved_tensors
        sums.clone()
        return tuple(torch.empty_like(x).uniform_() for x in inputs)


def _new_bias(cls: type, *_: Any) -> CausalBias:
    """A causal bias is a note about lengths, not a tensor of numbers."""
    with real_tensors():
        return torch.Tensor._make_subclass(cls, torch.empty(0))


NESTED = ("nested_tensor", "as_nested_tensor", "nested_tensor_from_jagged", "narrow")


def _refuse_nested(*_: Any, **__: Any) -> None:
    raise NotImplementedError(
        f"nested tensors at {user_line()}: unknown kernel. Bounds are two predictions: "
        "sequences padded to the longest one take more, and cut to the shortest one less"
    )
