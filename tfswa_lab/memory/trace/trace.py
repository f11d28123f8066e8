"""What code does with memory, on the CPU or on a GPU.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tfswa_lab.memory.display import Shown, page
from tfswa_lab.memory.sizes import format_bytes
from tfswa_lab.memory.trace.timeline import Peak, Timeline
from tfswa_lab.memory.trace.tracer import Tracer

ENTRIES = 100_000  # of the allocator's history, of several hundred bytes each


class Trace(Shown):
    """What `trace` has recorded; complete once its `with` block has ended.

    Attributes:
        allocator: the history of CUDA's own allocator, as `torch.cuda.memory._snapshot()` returns
            it, for `memory.snapshot.read`. It also contains memory that Python never sees, such as
            workspaces. None without CUDA.
    """

    def __init__(self, tracer: Tracer):
        self.allocator: dict | None = None
        self._tracer = tracer

    def step(self) -> None:
        """A step begins here."""
        self._tracer.step()

    @property
    def devices(self) -> list[str]:
        """Where tensors have been seen, the one with the highest peak first."""
        return self._tracer.devices

    def timeline(self, device: str | None = None) -> Timeline:
        """All blocks on a device.

        Args:
            device: such as `cpu` or `cuda:0`; the one with the highest peak if None.

        Raises:
            ValueError: nothing was allocated there.
        """
        there = self.devices
        if not there or device not in (None, *there):
            names = ", ".join(there) or "none"
            raise ValueError(f"nothing was allocated on {device or 'a device'}; seen: {names}")
        return self._tracer.timeline(device or there[0])

    def peak(self, device: str | None = None) -> Peak:
        """When a device held the most memory, and who held it; arguments as for `timeline`."""
        return self.timeline(device).peak()

    @property
    def brief(self) -> str:
        """The peak."""
        if not self.devices:
            return "no tensor was made"
        peak = self.peak()
        return f"peak {format_bytes(peak.allocated)} on {peak.timeline.device}"

    def __str__(self) -> str:
        return f"{self.brief}\n{self.peak().table()}" if self.devices else self.brief

    def _repr_html_(self) -> str:
        return page(self.brief, self.peak().tables if self.devices else {}, {})


@contextmanager
def trace(
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    inputs: Iterable[Tensor] = (),
    stacks: bool = True,
) -> Iterator[Trace]:
    """Record every allocation and release of tensors in a `with` block.

    Parameters are found when a module is called, optimizer state when an optimizer steps. The
    arguments name what exists already, so that the timeline contains it from its first event on.

    Args:
        model: its parameters, buffers and gradients.
        optimizer: its state.
        inputs: other tensors.
        stacks: whether to record the lines of Python that allocate memory.

    Raises:
        TypeError: `model` is no module, or `optimizer` no optimizer.

    >>> import torch
    >>> layer, x = nn.Linear(8, 8), torch.zeros(4, 8)
    >>> with trace(layer, inputs=[x]) as seen:
    ...     layer(x).relu().sum().backward()
    >>> seen.peak().by_category()["parameter"]  # 8 · 8 weights and 8 biases of 4 bytes
    288
    """
    check_types(model=(model, nn.Module), optimizer=(optimizer, Optimizer))
    tracer = Tracer(stacks=stacks)
    if model is not None:
        tracer.modules.name(model)
    if optimizer is not None:
        tracer.add_optimizer(optimizer)
    for tensor in inputs:
        tracer.label(tensor, "input")
    seen = Trace(tracer)
    with tracer, _history_of_allocator(seen):
        yield seen


def check_types(**things: tuple[object, type]) -> None:
    """Refuse an argument that is neither None nor of its type, and name it.

    >>> check_types(model=(5, nn.Module))
    Traceback (most recent call last):
    TypeError: model=5; expected a torch Module, or None
    """
    for name, (thing, kind) in things.items():
        if thing is not None and not isinstance(thing, kind):
            raise TypeError(f"{name}={thing!r}; expected a torch {kind.__name__}, or None")


@contextmanager
def _history_of_allocator(seen: Trace) -> Iterator[None]:
    if not torch.cuda.is_initialized():  # initialising CUDA would take memory for its context
        yield
        return
    started_by_others = torch._C._cuda_isHistoryEnabled()
    with nullcontext() if started_by_others else recorded_history():
        yield
        seen.allocator = torch.cuda.memory._snapshot()


@contextmanager
def recorded_history(
    max_entries: int = ENTRIES, stacks: str = "python", context: str = "all"
) -> Iterator[None]:
    """CUDA's allocator records its history in the block, and forgets it at the end.

    The arguments are those of `memory.snapshot.record`.
    """
    history = torch.cuda.memory._record_memory_history
    history("all", context=context, stacks=stacks, max_entries=max_entries)
    try:
        yield
    finally:
        history(None)
