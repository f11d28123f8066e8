"""How many hooks modules, tensors and optimizers have, and which lists of them grow.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.modules import module as modules_of_torch
from torch.optim import optimizer as optimizers_of_torch

from tfswa_lab.memory.trace.stacks import Frame

OF_TENSORS = ("_backward_hooks", "_post_accumulate_grad_hooks")
GLOBAL = (modules_of_torch, optimizers_of_torch)

Counts = Mapping[tuple[int, str], int]  # by the identity of the owner and the name of its list


@dataclass(frozen=True)
class Hooks:
    """A list of hooks that grows.

    Args:
        name: of the list, such as `_forward_hooks`.
        owner: the module or tensor that it belongs to, as code, such as `model[0]`.
        count: the number of hooks at the end.
        per_step: hooks that are added per step.
        line: where the function that was added last is defined, if that is known.
    """

    name: str
    owner: str
    count: int
    per_step: float
    line: Frame | None = None


def hook_counts(owners: Iterable[Any]) -> Counts:
    """The number of hooks that are registered, globally and on some objects.

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
    lists = (name for name, value in vars(owner).items() if isinstance(value, dict))
    return [name for name in lists if name.endswith("_hooks")]


def growing_hooks(
    counts: Sequence[Counts], owners: Callable[[], list[Any]], spell: Callable[[Any], str]
) -> Iterator[Hooks]:
    """Lists of hooks that become longer in both halves of a run.

    Args:
        counts: of hooks, after every second step.
        owners: all objects that may have hooks.
        spell: writes one of them as code.
    """
    if len(counts) < 3:
        return
    early, middle, late = (counts[at] for at in (0, len(counts) // 2, -1))
    for (identity, name), count in late.items():
        before = early.get((identity, name), 0)
        if before < middle.get((identity, name), 0) < count:
            every = (*GLOBAL, *owners())
            owner = next((each for each in every if id(each) == identity), None)
            spelled = "torch" if any(owner is each for each in GLOBAL) else spell(owner)
            per_step = (count - before) / (2 * len(counts) - 2)
            yield Hooks(name, spelled, count, per_step, line_of_last(owner, name))


def line_of_last(owner: Any, name: str) -> Frame | None:
    """Where the newest function in a list of hooks is defined; None if Python did not define it.

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
