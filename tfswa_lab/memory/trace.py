"""What a piece of code does with memory, on the CPU or on a card.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tfswa_lab.memory.sizes import in_words
from tfswa_lab.memory.snapshot import Snapshot, read, record
from tfswa_lab.memory.snapshots.emit import write_snapshot
from tfswa_lab.memory.tracing.blocks import Timeline
from tfswa_lab.memory.tracing.fullest import Fullest
from tfswa_lab.memory.tracing.tracer import Tracer


class Trace:
    """What `trace` has seen; complete when its region has ended.

    Attributes:
        allocator: where a card is in use, what CUDA's allocator itself wrote down meanwhile: what
            is no tensor of Python's, such as workspaces, is in it, too. None elsewhere.

    Notebook: 05_where_memory_goes
    """

    def __init__(self, tracer: Tracer):
        self.allocator: Snapshot | None = None
        self._tracer = tracer

    def step(self) -> None:
        """A step begins here."""
        self._tracer.step()

    def timeline(self, device: str | None = None) -> Timeline:
        """All blocks on a device.

        Args:
            device: such as `cpu` or `cuda:0`; the fullest if None.

        Raises:
            ValueError: nothing was allocated there.
        """
        there = self._tracer.devices
        if not there or device not in (None, *there):
            names = ", ".join(there) or "none"
            raise ValueError(f"nothing was allocated on {device or 'a device'}; seen: {names}")
        return self._tracer.timeline(device or there[0])

    def fullest(self, device: str | None = None) -> Fullest:
        """The peak on a device, and who holds it."""
        timeline = self.timeline(device)
        peak, event = timeline.peak()
        return Fullest(timeline, event, peak)

    def write_snapshot(self, path: str | Path, device: str | None = None) -> Path:
        """A pickle for https://pytorch.org/memory_viz and `memory.snapshot.read`.

        Raises:
            OSError: it cannot be written.
        """
        return write_snapshot(path, self.timeline(device))

    def __str__(self) -> str:
        found = self.fullest()
        return f"peak {in_words(found.peak)} on {found.timeline.device}\n{found.table()}"


@contextmanager
def trace(
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    inputs: Iterable[Tensor] = (),
    stacks: bool = True,
) -> Iterator[Trace]:
    """Record every allocation and release of tensors in a region.

    Parameters are found when modules are called, states when optimizers step. What is named here is
    known from the beginning, so it is in the timeline before it is used.

    Args:
        model: whose parameters, buffers and gradients are there already.
        optimizer: whose state is there already.
        inputs: tensors that are there already.
        stacks: whether to keep the lines of Python that asked for memory.

    Notebook: 05_where_memory_goes

    >>> import torch
    >>> layer, x = nn.Linear(8, 8), torch.zeros(4, 8)
    >>> with trace(layer, inputs=[x]) as seen:
    ...     layer(x).relu().sum().backward()
    >>> seen.fullest().by_category()["parameter"]  # 8 · 8 weights and 8 biases of 4 bytes
    288
    """
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


@contextmanager
def _history_of_allocator(seen: Trace) -> Iterator[None]:
    if not torch.cuda.is_initialized():  # starting CUDA to record nothing would cost its context
        yield
        return
    started_by_others = torch._C._cuda_isHistoryEnabled()
    with nullcontext() if started_by_others else record():
        yield
        seen.allocator = read(torch.cuda.memory._snapshot())
