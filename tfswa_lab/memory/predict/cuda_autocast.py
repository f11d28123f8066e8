"""Autocast with CUDA's lists of operators, on CPU tensors.

The two devices do not cast the same operators: on the CPU, layer norms, softmax and exponentials
stay in half precision, on CUDA they run in float32, and their inputs and outputs are kept in it.

Source: aten/src/ATen/autocast_mode.h of PyTorch 2.13 (the lists).

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

KEY = "AutocastCPU"
# Run in float32.
WHOLE = (
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
# Give out float32 if nothing else is asked for.
WHOLE_OUT = (
    *("prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum"),
    *("linalg_vector_norm", "linalg_matrix_norm", "sum", "sum.dim_IntList"),
)
# Run in half precision; the others of CUDA's are on the CPU's list as well.
HALF = ("addmv", "mv", "addr", "linalg_multi_dot", "chain_matmul", "einsum")


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Autocast of "cpu" and of "cuda" both mean CUDA's, on CPU tensors."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # that kernels are replaced
        for names, make in ((WHOLE, _whole), (WHOLE_OUT, _whole_out), (HALF, _half)):
            for name in names:
                library.impl(name, make(_operator(name)), KEY)
    autocast = torch.amp.autocast_mode.autocast
    original = autocast.__init__

    def on_cpu(self: Any, device_type: str, dtype: torch.dtype | None = None, *args, **kwargs):
        if device_type == "cuda" and dtype is None:
            dtype = torch.get_autocast_dtype("cuda")
        original(self, "cpu" if device_type == "cuda" else device_type, dtype, *args, **kwargs)

    autocast.__init__ = on_cpu
    try:
        yield
    finally:
        autocast.__init__ = original
        library._destroy()


def _operator(name: str) -> Callable:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _whole(operator: Callable) -> Callable:
    def run(*args, **kwargs):
        with _plain():
            args, kwargs = tree_map(_to_whole, (args, kwargs))
            return operator(*args, **kwargs)

    return run


def _whole_out(operator: Callable) -> Callable:
    def run(x: Tensor, *args, dtype: torch.dtype | None = None, **kwargs):
        with _plain():
            if dtype is None and _is_half(x):
                dtype = torch.float32
            return operator(x, *args, dtype=dtype, **kwargs)

    return run


def _half(operator: Callable) -> Callable:
    def run(*args, **kwargs):
        dtype = torch.get_autocast_dtype("cpu")
        with _plain():
            args, kwargs = tree_map(
                lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x,
                (args, kwargs),
            )
            return operator(*args, **kwargs)

    return run


def _plain() -> Any:
    """Without autocast, as its own kernels run."""
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    return torch._C._ExcludeDispatchKeyGuard(autocast)


def _to_whole(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and _is_half(value) else value


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)
