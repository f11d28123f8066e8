"""When an attention unit runs through the compiled kernel of `cpu_kernel`, and how.

Notebook: 09_running_lean
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

if TYPE_CHECKING:
    from tfswa_lab.models.attention import AttentionUnit

LEAST_NUMBERS = 2**18  # that come in; below, little is gained
TORCHS_KERNEL = F.scaled_dot_product_attention


def runs_lean(unit: AttentionUnit, x: Tensor) -> bool:
    """Whether the compiled kernel gives what the unit would give for `x`, and sooner.

    It knows float32 on a CPU and no gradients. Whoever looks inside the unit, or has changed
    something in it, gets torch's operators.
    """
    return (
        not (torch.compiler.is_compiling() or torch.jit.is_tracing())  # before sizes are compared
        and x.device.type == "cpu"
        and x.numel() >= LEAST_NUMBERS
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and _is_plain(unit, x)
        and not _is_watched(unit)
        and _kernel() is not None
    )


def _is_plain(unit: AttentionUnit, x: Tensor) -> bool:
    """Whether all parts are as they were built, in float32, with widths that suit the kernel."""
    kinds = [nn.LayerNorm, type(unit.attention), nn.Linear, nn.Linear]
    kinds += [nn.LayerNorm, nn.Sequential, nn.Linear, nn.GELU, nn.Linear]
    tensors = [x, *unit.parameters()]
    return (
        [type(module) for module in unit.modules()][1:] == kinds
        and unit.mlp[1].approximate == "none"
        and getattr(unit.attend, "__qualname__", "") == "AttentionUnit.attend"
        and getattr(unit.attention.forward, "__qualname__", "") == "MultiHeadAttention.forward"
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and all(tensor.dtype is torch.float32 for tensor in tensors)
        and _shapes_fit(unit, x.shape[1])
        and F.scaled_dot_product_attention is TORCHS_KERNEL
    )


def _shapes_fit(unit: AttentionUnit, c: int) -> bool:
    """Whether the kernel, which checks no index, stays inside the weights; c channels come in."""
    hidden = len(unit.mlp[0].weight)
    norm, attention = [(c,), (c,)], [(3 * c, c), (c, c), (c,)]
    expected = [*norm, *attention, *norm, (hidden, c), (hidden,), (c, hidden), (c,)]
    shapes = [tuple(parameter.shape) for parameter in unit.parameters()]
    return shapes == expected and c // unit.attention.num_heads % 4 == 0 == hidden % 4


def _is_watched(unit: AttentionUnit) -> bool:
    """Whether hooks or dispatch modes want to see each operator."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    inner = list(unit.modules())[1:]
    return (
        any(getattr(module, name) for module in inner for name in hooks)
        or nn.modules.module._has_any_global_hook()
        or _get_current_dispatch_mode() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None  # of torch.func
        or torch.autograd.forward_ad._current_level >= 0
    )


@cache
def _kernel() -> ModuleType | None:
    """The kernel, if numba is installed for this Python and compiles."""
    try:
        from numba.core import config

        from tfswa_lab.models import cpu_kernel
    except ImportError:
        return None
    return None if config.DISABLE_JIT else cpu_kernel


def in_rectangles(
    unit: AttentionUnit, x: Tensor, rows: Sequence[int], columns: Sequence[int]
) -> Tensor:
    """`unit` inside each rectangle of `x` `(b, c, t, f)` between neighbouring borders.

    Args:
        rows: borders along t, from 0 to t.
        columns: borders along f, from 0 to f.
    """
    return _kernel().attention_unit(unit, x.contiguous(), list(rows), list(columns))
