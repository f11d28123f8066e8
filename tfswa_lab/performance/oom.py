"""Go on where memory runs out: a training step and a long input, in smaller parts.

`memory.out_of_memory` says which error is an out-of-memory and how to try again; here is what the
two users of a GPU, training and inference, have to put right before they try again.

Notebook: 09_running_lean
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from numbers import Integral
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from tfswa_lab.memory.out_of_memory import OnRetreat, retreat
from tfswa_lab.training.randomness import random_state, set_random_state

# Training ----------------------------------------------------------------------------------------

REPEATS = 3  # of parts that cannot be smaller, once a step has worked

# Of each optimizer that has made a step: the largest part that has fitted since memory ran out;
# infinite where it never did.
_part_sizes: WeakKeyDictionary[Optimizer, float] = WeakKeyDictionary()


def train_step(
    loss_of: Callable[[Any], Tensor],
    batch: Any,
    optimizer: Optimizer,
    *,
    floor: int = 1,
    on_retreat: OnRetreat | None = None,
    size: int | None = None,
    backward: Callable[[Tensor], None] = Tensor.backward,
    step: Callable[[], Any] | None = None,
) -> Tensor:
    """One step of an optimizer over a batch; where memory runs out, in parts of half the size.

    It drops old gradients, adds up those of the parts, and steps once. A part weighs by its share
    of the items, so the gradient is that of the whole batch, and so are the weights up to rounding.

    Where memory runs out in `loss_of` or in the backward pass, the gradients of the weights are
    dropped, the failed pass is freed, the global generators return to their states, and the same
    items are used again, in the same order. Later steps of the optimizer keep the smaller size:
    `part_size`. Each retreat is logged. Where parts cannot be smaller, but earlier steps did fit,
    another program may have taken the memory for a moment: they are tried again, up to `REPEATS`
    times. An error in the optimizer's own step comes out, because the step may have moved half of
    the weights.

    Three things do differ from the whole batch, and from a try that was not aborted: batch norm in
    training mode normalises each part by itself (a retreat warns of it), its running statistics
    also move in the aborted try, and dropout draws for each part.

    Args:
        loss_of: the mean loss of a part of the batch, a scalar that needs gradients.
        batch: anything with a length and slices: a tensor, a list of items, a range of indices. For
            inputs and targets in two tensors, `TensorDataset(inputs, targets)`.
        optimizer: of the weights.
        floor: the smallest part to try.
        on_retreat: gets each size that is tried next, and the error that made it so.
        size: the largest part to try; None for the whole batch. Smaller parts that memory has room
            for accumulate the gradient, as usual.
        backward: of a loss, such as `lambda loss: scaler.scale(loss).backward()`.
        step: moves the weights once the gradient is complete; clip it here. None for
            `optimizer.step`.

    Returns:
        The mean loss of the batch, without its graph.

    Raises:
        ValueError: the batch is empty, a dictionary or a tuple of tensors, a size is no whole
            number above 0, or there are other processes: they would wait for this one while it
            repeats its backward pass.
        torch.OutOfMemoryError, or another out-of-memory error: parts of `floor` items do not fit,
            either; its note says what was tried. All gradients are dropped.

    >>> weight = nn.Parameter(torch.tensor(0.0))
    >>> def loss_of(targets):
    ...     if len(targets) > 2:
    ...         raise torch.OutOfMemoryError("CUDA out of memory")
    ...     return (weight - targets).square().mean()
    >>> optimizer = torch.optim.SGD([weight], lr=0.5)
    >>> train_step(loss_of, torch.tensor([1.0, 2.0, 6.0]), optimizer, on_retreat=print)
    1 CUDA out of memory
    tensor(13.6667)
    >>> weight.item(), part_size(optimizer)
    (3.0, 1)
    """
    _refuse_other_processes()
    items = _count(batch)
    known = _part_sizes.get(optimizer, math.inf)
    first = min(items, _size("size", items if size is None else size), known)
    device = next(p.device for group in optimizer.param_groups for p in group["params"])
    random = random_state(device)

    in_parts = set()

    def gradients_of(size: int) -> Tensor:
        set_random_state(random, device)
        with _batch_norms(in_parts) if size < first and known == math.inf else nullcontext():
            return _gradients(loss_of, batch, optimizer, backward, size)

    repeats = REPEATS if optimizer in _part_sizes else 0
    loss, size = retreat(gradients_of, first, _size("floor", floor), on_retreat, repeats)
    _part_sizes[optimizer] = size if size < first else known
    if in_parts:
        warnings.warn(
            f"{', '.join(sorted(in_parts))} in training mode: the statistics of parts are not those"
            " of the batch, so the weights will differ a little from those of whole batches",
            stacklevel=2,
        )
    (step or optimizer.step)()
    return loss


def _count(batch: Any) -> int:
    _refuse_several_inputs("the batch", batch)
    if len(batch) == 0:
        raise ValueError("the batch is empty: there is nothing to learn; leave this step out")
    return len(batch)


def _gradients(
    loss_of: Callable[[Any], Tensor],
    batch: Any,
    optimizer: Optimizer,
    backward: Callable[[Tensor], None],
    size: int,
) -> Tensor:
    """Leave the gradient of the mean loss in the weights, or none at all; returns the loss."""
    optimizer.zero_grad()
    items, total = len(batch), 0.0
    try:
        for start in range(0, items, size):
            share = (min(start + size, items) - start) / items
            loss = loss_of(batch[start : start + size]) * share
            backward(loss)
            total = total + loss.detach()
    except BaseException:
        optimizer.zero_grad()
        raise
    return total


def part_size(optimizer: Optimizer) -> int | None:
    """How many items at once the steps of an optimizer have retreated to; None if they have not."""
    known = _part_sizes.get(optimizer, math.inf)
    return None if known == math.inf else known


def _refuse_other_processes() -> None:
    """Refuse to be one of several processes that train together.

    Raises:
        ValueError: says why. No other process is asked.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if (processes := distributed.get_world_size()) > 1:
        raise ValueError(
            f"a step that survives an out-of-memory is for one process, and here are {processes}: "
            "while one repeats its backward pass, the others wait for its gradients for ever; "
            "train without it, with smaller batches"
        )


@contextmanager
def _batch_norms(names: set[str]) -> Iterator[None]:
    """Add the names of all modules that run in this block and use the statistics of their batch."""

    def look(module: nn.Module, _inputs: Any) -> None:
        has_statistics = getattr(module, "running_mean", None) is not None
        if module.training and (has_statistics or isinstance(module, _BatchNorm)):
            names.add(type(module).__name__)

    handle = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


# Inference ---------------------------------------------------------------------------------------


@torch.no_grad()
def process_in_chunks(fn: Callable[[Any], Any], items: Any, size: int) -> Any:
    """`fn` of some items at a time, joined; where memory runs out, of half as many from then on.

    Results move to the CPU as they come, so a GPU holds those of one chunk only, and no graph.

    Args:
        fn: maps a chunk to a tensor whose first axis is that of the chunk's items, or to a tuple,
            list or dictionary of such tensors, also nested. Its parts must not depend on which
            items are together in a chunk, as in batch norm in training mode.
        items: a tensor or an array, whose chunks are slices; or a list or an iterable, which is
            read as it is needed, whose chunks are lists.
        size: the most items in a chunk.

    Returns:
        What `fn` would return for all items at once, on the CPU. `fn` also runs where a tensor has
            no items; without any item of a list, nothing tells the form: an empty tensor.

    Raises:
        ValueError: `size` is no whole number above 0, `items` is a dictionary or a tuple of
            tensors, or `fn` returns something else, such as a mean over the chunk.
        torch.OutOfMemoryError, or another out-of-memory error: there is no memory for one item.

    >>> process_in_chunks(lambda x: {"double": 2 * x}, torch.arange(5), size=2)
    {'double': tensor([0, 2, 4, 6, 8])}
    """
    _refuse_several_inputs("items", items)
    size, start, results = _size("size", size), 0, []
    is_array = hasattr(items, "shape")
    ahead = items if is_array else _Ahead(items)
    while len(chunk := ahead[start : start + size]) or (is_array and not results):

        def one(count: int, chunk: Any = chunk) -> Any:
            return tree_map(partial(_row_by_row, count), fn(chunk[:count]))

        result, count = retreat(one, len(chunk))
        size = count if count < len(chunk) else size
        results.append(result)
        start += max(count, 1)
    return tree_map(lambda *parts: torch.cat(parts), *results) if results else torch.empty(0)


def _row_by_row(items: int, result: Any) -> Tensor:
    """A copy on the CPU: `fn` may write into the same memory again, or return a view of more."""
    if not isinstance(result, Tensor) or result.shape[:1] != (items,):
        form = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(
            f"fn returned {form} for {items} items: it must return tensors with a row for each, "
            "because what depends on the chunk would change with its size"
        )
    return result.detach().to("cpu", copy=True)


class _Ahead:
    """Slices of an iterable, each behind the last, which is all that is kept of it."""

    def __init__(self, items: Iterable):
        self.items, self.held, self.start = iter(items), [], 0

    def __getitem__(self, wanted: slice) -> list:
        self.held, self.start = self.held[wanted.start - self.start :], wanted.start
        size = wanted.stop - wanted.start
        self.held += islice(self.items, max(size - len(self.held), 0))
        return self.held[:size]


# Both --------------------------------------------------------------------------------------------


def _refuse_several_inputs(name: str, items: Any) -> None:
    """Refuse what holds a tensor for each kind of input, not for each item."""
    if isinstance(items, Mapping):
        raise ValueError(
            f"{name} is a dictionary of {list(items)}, which has no slices; pass the range of its "
            "items' indices, and take them from it in your function"
        )
    if isinstance(items, tuple) and items and all(isinstance(x, Tensor) for x in items):
        raise ValueError(
            f"{name} is a tuple of {len(items)} tensors, which may be items, or inputs and "
            "targets; pass a list of items, or the range of their indices"
        )


def _size(name: str, value: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of items, 1 or more")
    return int(value)
