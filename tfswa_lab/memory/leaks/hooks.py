"""How many hooks hang on modules, tensors and optimizers.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.modules import module as modules_of_torch
from torch.optim import optimizer as optimizers_of_torch

from tfswa_lab.memory.trace.stacks import Frame

OF_TENSORS = ("_backward_hooks", "_post_accumulate_grad_hooks")
GLOBAL = (modules_of_torch, optimizers_of_torch)


def hook_counts(owners: Iterable[Any]) -> dict[tuple[int, str], int]:
    """Hooks of each kind that are registered, globally and on some objects.

    Args:
        owners: modules, tensors and optimizers.

    Returns:
        Counts above zero, by the identity of the owner and the attribute that lists them.

    >>> import torch
    >>> layer = torch.nn.ReLU()
    >>> handle = layer.register_forward_hook(print)
    >>> hook_counts([layer])[id(layer), "_forward_hooks"]
    1
    """
    counts = {}
    for owner in (*GLOBAL, *owners):
        for name in _lists_of_hooks(owner):
            hooks = getattr(owner, name, None)
            if hooks:
                counts[id(owner), name] = len(hooks)
    return counts


def _lists_of_hooks(owner: Any) -> Iterable[str]:
    if issubclass(type(owner), Tensor):
        return OF_TENSORS
    return [name for name, value in vars(owner).items() if _is_list_of_hooks(name, value)]


def _is_list_of_hooks(name: str, value: Any) -> bool:
    return name.endswith("_hooks") and isinstance(value, dict)


def line_of_last(owner: Any, name: str) -> Frame | None:
    """Where the newest function in a list of hooks is written; None if Python did not write it.

    Args:
        owner: that has the list as an attribute.
        name: of the attribute.

    >>> import torch
    >>> layer = torch.nn.ReLU()
    >>> handle = layer.register_forward_hook(lambda module, x, y: None)
    >>> line_of_last(layer, "_forward_hooks").name
    '<lambda>'
    """
    hooks = list((getattr(owner, name, None) or {}).values())
    hook = hooks[-1] if hooks else None
    while isinstance(hook, partial):
        hook = hook.func
    code = getattr(hook, "__code__", None)
    return Frame(code.co_filename, code.co_firstlineno, code.co_qualname) if code else None
