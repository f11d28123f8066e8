"""How much memory of a card a step will take, found out without one.

The step runs once or twice on tensors that have a shape and no values, with CUDA's kernels, casts
and rounding. What is alive at the fullest moment is the prediction. It takes seconds, whatever the
sizes are.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from tfswa_lab.memory.card.allocator import replay
from tfswa_lab.memory.card.error_budget import error_budget
from tfswa_lab.memory.card.fake import without_values
from tfswa_lab.memory.card.kernels import cuda_like
from tfswa_lab.memory.card.workspaces import workspace
from tfswa_lab.memory.rounding import rounded
from tfswa_lab.memory.sizes import in_words
from tfswa_lab.memory.tracing.fullest import Fullest
from tfswa_lab.memory.tracing.tracer import Tracer

Step = Callable[[], Any]


@dataclass(frozen=True)
class Prediction(Fullest):
    """What a step will take: `peak` is what `torch.cuda.max_memory_allocated` would say.

    Args:
        reserved: bytes that the allocator will have taken from the card by then, as a simulation
            has it.
        budget: what cannot be seen, a sentence each.
        seconds: that the prediction took.

    Notebook: 05_where_memory_goes
    """

    reserved: int
    budget: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        head = f"peak {in_words(self.peak)} allocated, about {in_words(self.reserved)} reserved"
        unseen = "".join(f"\n  {sentence}" for sentence in self.budget)
        return f"{head}\n{self.table()}\nnot in these numbers:{unseen}"


def predict(
    make_step: Callable[[], Step],
    attention: str = "auto",
    steps: int = 2,
    gpu: str | None = None,
) -> Prediction:
    """The memory of a step on a CUDA card.

    Args:
        make_step: makes the model, the optimizer and the input, and returns a function without
            arguments that is one step. All of it happens with tensors without values; it may be
            written for the CPU or for a card, `torch.autocast("cuda", …)` included.
        attention: kernel of `scaled_dot_product_attention`, see `cuda_like`.
        steps: how many to run; the second finds the optimizer's state there.
        gpu: whose choice "auto" is: "hopper" (H100, H200, B200) or "ampere" (all others); None for
            the GPU of this machine, or "ampere" where there is none.

    Raises:
        TypeError: `make_step` returns no function.
        ValueError: the attention kernel or the GPU is unknown, or the kernel cannot do what it is
            asked for.
        NotImplementedError: the step depends on values, so it cannot be known in advance; names
            the operation and the line.

    Notebook: 05_where_memory_goes

    >>> from torch import nn
    >>> def make_step():
    ...     model, x = nn.Linear(1024, 1024, bias=False), torch.empty(512, 1024)
    ...     return lambda: model(x).sum().backward()
    >>> predict(make_step).peak / 2**20  # 4 of weights, 4 and 4 of gradients, 2 of input
    14.0009765625
    """
    began = time.perf_counter()
    tracer = FakeTracer()
    with torch.random.fork_rng(devices=()), cuda_like(attention, gpu), without_values(), tracer:
        step = make_step()
        if not callable(step):
            raise TypeError(
                f"make_step must return a function that is one step, not {type(step).__name__}"
            )
        for _ in range(steps):
            tracer.step()
            step()
    timeline = tracer.timeline("cpu")
    del step
    gc.collect()
    operators = {block.op for block in timeline.blocks}
    card = replay(timeline)  # blocks that are not worth splitting count whole
    (peak, event), (reserved, _) = card.peak_allocated, card.peak_reserved
    seconds = time.perf_counter() - began
    return Prediction(timeline, event, peak, reserved, error_budget(operators), seconds)


class FakeTracer(Tracer):
    """A tracer of what CUDA's allocator would be asked for.

    Notebook: 05_where_memory_goes
    """

    def rounded(self, size: int, device: str) -> int:
        """As on a card, whatever the device is called."""
        return rounded(size)

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run an operator; what has no answer without values is named."""
        try:
            return func(*args, **kwargs)
        except (
            DataDependentOutputException,
            DynamicOutputShapeException,
            UnsupportedOperatorException,
        ) as error:
            where = next(iter(self._sites.here()), "an unknown line")
            raise NotImplementedError(
                f"{func} at {where} depends on the values of a tensor, and there are none in a "
                "prediction; keep it out of the step, or give it a fixed size"
            ) from error

    def scratch(self, func: Any, args: tuple, result: Any) -> int:
        """Bytes of the workspaces that are known."""
        return workspace(func, args)
