"""Autocast with CUDA's lists of operators, on CPU tensors.

The two devices do not cast the same operators: on the CPU, layer norms, softmax and exponentials
stay in half precision. On CUDA they run in float32, and autograd keeps float32 inputs and outputs.

Source: aten/src/ATen/autocast_mode.h of PyTorch 2.13 (the lists).

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

KEY = "AutocastCPU"
# Run in float32.
FP32 = (
    *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p"),
    *("reciprocal", "rsqrt", "sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar"),
    *("softplus", "layer_norm", "native_layer_norm", "group_norm", "frobenius_norm.dim"),
    *("nuclear_norm", "nuclear_norm.dim", "cosine_similarity", "poisson_nll_loss"),
    *("cosine_embedding_loss", "nll_loss", "nll_loss2d", "hinge_embedding_loss", "kl_div"),
    *("l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss"),
    *("multilabel_margin_loss", "soft_margin_loss", "triplet_margin_loss", "multi_margin_loss"),
    *("binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "renorm", "logsumexp"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_linear1d", "upsample_bilinear2d"),
)
# Return float32 unless the caller names a dtype.
FP32_OUTPUT = (
    *("prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum"),
    *("linalg_vector_norm", "linalg_matrix_norm", "sum", "sum.dim_IntList"),
)
# Run in half precision; the rest of CUDA's list is also on the CPU's.
LOW_PRECISION = ("addmv", "mv", "addr", "linalg_multi_dot", "chain_matmul", "einsum")


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Autocast CPU tensors as CUDA would, for `torch.autocast` of "cpu" and of "cuda"."""
    library = torch.library.Library("aten", "IMPL")
    casts = WeakIdKeyDictionary()
    low_precision = partial(_in_low_precision, casts)
    rules = ((FP32, _in_fp32), (FP32_OUTPUT, _to_fp32_output), (LOW_PRECISION, low_precision))
    with warnings.catch_warnings(action="ignore"):  # torch warns that kernels are replaced
        for names, rule in rules:
            for name in names:
                library.impl(name, rule(_operator(name)), KEY)
    autocast = torch.amp.autocast_mode.autocast
    original, clear = autocast.__init__, torch.clear_autocast_cache

    def clear_cache() -> None:
        casts.clear()
        clear()

    def on_cpu(self: Any, device_type: str, dtype: torch.dtype | None = None, *args, **kwargs):
        if device_type == "cuda" and dtype is None:
            dtype = torch.get_autocast_dtype("cuda")
        original(self, "cpu" if device_type == "cuda" else device_type, dtype, *args, **kwargs)

    try:
        with (
            patch.object(autocast, "__init__", on_cpu),
            patch.object(torch, "clear_autocast_cache", clear_cache),
        ):
            yield
    finally:
        library._destroy()


def _operator(name: str) -> Callable:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _in_fp32(operator: Callable) -> Callable:
    return _with_casts(operator, lambda x: x.float() if _is_half(x) else x)


def _in_low_precision(casts: MutableMapping[Tensor, Tensor], operator: Callable) -> Callable:
    """Casts of parameters are kept until the outermost autocast ends."""

    def cast(x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu")
        if not x.is_floating_point() or x.dtype in (dtype, torch.float64):
            return x
        is_parameter = x.requires_grad and x.is_leaf and not x._is_view()
        is_kept = torch.is_autocast_cache_enabled() and not torch.is_inference_mode_enabled()
        if not (is_parameter and is_kept and x.dtype is torch.float32):
            return x.to(dtype)
        if x not in casts:
            casts[x] = x.to(dtype)
        return casts[x]

    return _with_casts(operator, cast)


def _with_casts(operator: Callable, cast: Callable[[Tensor], Tensor]) -> Callable:
    def run(*args, **kwargs):
        with _no_autocast():
            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
            return operator(*args, **kwargs)

    return run


def _to_fp32_output(operator: Callable) -> Callable:
    def run(x: Tensor, *args, dtype: torch.dtype | None = None, **kwargs):
        with _no_autocast():
            if dtype is None and _is_half(x):
                dtype = torch.float32
            return operator(x, *args, dtype=dtype, **kwargs)

    return run


def _no_autocast() -> Any:
    """Kernels of autocast run without autocast, or they would call themselves."""
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    return torch._C._ExcludeDispatchKeyGuard(autocast)


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)
