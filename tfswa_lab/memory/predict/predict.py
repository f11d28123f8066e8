"""How much GPU memory a step will take, found out without a GPU.

The step runs once or twice on tensors that have a shape and no values, with CUDA's kernels, casts
and rounding. The prediction is the peak of that run. It takes seconds, whatever the sizes are.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from tfswa_lab.memory.predict.allocator import replay
from tfswa_lab.memory.predict.cuda_kernels import cuda_like, error_budget, workspace
from tfswa_lab.memory.predict.fake_tensors import fake_tensors
from tfswa_lab.memory.sizes import format_bytes, rounded
from tfswa_lab.memory.trace.timeline import Moment
from tfswa_lab.memory.trace.tracer import Tracer

Step = Callable[[], Any]


@dataclass(frozen=True)
class Prediction(Moment):
    """The memory that a step will take, and who will hold it at the peak.

    Args:
        peak: bytes that `torch.cuda.max_memory_allocated` would report. It may be a little above
            the sum of the blocks: the allocator does not split a large one for less than 1 MiB.
        reserved: bytes that a simulated allocator takes from the GPU.
        budget: one sentence for each kind of memory that a prediction cannot see.
        seconds: how long the prediction took.
    """

    peak: int
    reserved: int
    budget: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        peak, reserved = format_bytes(self.peak), format_bytes(self.reserved)
        head = f"peak {peak} allocated, about {reserved} reserved"
        unseen = "".join(f"\n  {sentence}" for sentence in self.budget)
        return f"{head}\n{self.table()}\nnot in these numbers:{unseen}"


def predict(
    make_step: Callable[[], Step], attention: str = "auto", steps: int = 2, gpu: str | None = None
) -> Prediction:
    """The memory of a step on a CUDA GPU.

    Args:
        make_step: makes the model, the optimizer and the input, and returns a function without
            arguments that runs one step. All of it runs on tensors without values. It may be
            written for the CPU or for a GPU, `torch.autocast("cuda", …)` included.
        attention: kernel of `scaled_dot_product_attention`, see `cuda_like`.
        steps: how many to run; the second step finds the optimizer's state already allocated.
        gpu: the GPU that attention="auto" chooses for: "hopper" (H100, H200, B200) or "ampere" (all
            others); None for the GPU of this machine, or "ampere" where there is none.

    Raises:
        TypeError: `make_step` does not return a function.
        ValueError: the attention kernel or the GPU is unknown, or the kernel does not support these
            inputs.
        NotImplementedError: the step depends on values, which a prediction does not have; the
            message names the operation and the line.

    >>> from torch import nn
    >>> def make_step():
    ...     model, x = nn.Linear(1024, 1024, bias=False), torch.empty(512, 1024)
    ...     return lambda: model(x).sum().backward()
    >>> predict(make_step).peak / 2**20  # 4 of weights, 4 and 4 of gradients, 2 of input
    14.0009765625
    """
    began = time.perf_counter()
    tracer = FakeTracer()
    with torch.random.fork_rng(devices=()), cuda_like(attention, gpu), fake_tensors(), tracer:
        step = make_step()
        if not callable(step):
            raise TypeError(
                f"make_step must return a function that runs one step, not {type(step).__name__}"
            )
        for _ in range(steps):
            tracer.step()
            step()
    timeline = tracer.timeline("cpu")
    del step
    gc.collect()
    operators = {block.op for block in timeline.blocks}
    replayed = replay(timeline)  # counts the blocks that the allocator leaves unsplit
    (peak, event), (reserved, _) = replayed.peak_allocated, replayed.peak_reserved
    seconds = time.perf_counter() - began
    return Prediction(timeline, event, peak, reserved, error_budget(operators), seconds)


class FakeTracer(Tracer):
    """Records the requests that CUDA's allocator would get."""

    def rounded(self, size: int, device: str) -> int:
        """As on a GPU, although the tensors are on the CPU."""
        return rounded(size)

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run an operator; one that needs values is named in the error."""
        try:
            return func(*args, **kwargs)
        except (
            DataDependentOutputException,
            DynamicOutputShapeException,
            UnsupportedOperatorException,
        ) as error:
            where = next(iter(self._sites.here()), "an unknown line")
            raise NotImplementedError(
                f"{func} at {where} depends on the values of a tensor, and a prediction has no "
                "values; keep it out of the step, or give it a fixed size"
            ) from error

    def scratch(self, func: Any, args: tuple, result: Any) -> int:
        """Bytes of the operator's workspace, if its size is known."""
        return workspace(func, args)


OF_PREDICT = ("attention", "steps", "gpu")  # arguments of `predict`, the rest are `make_step`'s


@dataclass(frozen=True)
class Row:
    """A configuration and the memory of its step.

    Args:
        choices: names and values, such as `{"batch": 4, "attention": "flash"}`.
        prediction: the memory of one step.
    """

    choices: dict[str, Any]
    prediction: Prediction


def compare(make_step: Callable[..., Step], choices: Mapping[str, Sequence[Any]]) -> Iterator[Row]:
    """Predict all combinations, one after the other.

    Args:
        make_step: as for `predict`. It takes the choices as keyword arguments, except `attention`,
            `steps` and `gpu`, which are passed to `predict`.
        choices: values to try, by name; the last one changes fastest.
    """
    for values in product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        yield Row(chosen, predict_choices(make_step, chosen))


def predict_choices(make_step: Callable[..., Step], choices: Mapping[str, Any]) -> Prediction:
    """Predict one combination."""
    of_predict = {name: choices[name] for name in OF_PREDICT if name in choices}
    of_step = {name: value for name, value in choices.items() if name not in OF_PREDICT}
    return predict(lambda: make_step(**of_step), **of_predict)


def to_markdown(rows: Sequence[Row], budget: int | None = None) -> str:
    """A table of configurations, and whether each fits.

    Args:
        rows: of `compare`.
        budget: bytes that are available; None for a table without the column "fits".
    """
    names = list(rows[0].choices)
    columns = [*names, "peak", "reserved, about", *(["fits"] if budget else [])]
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        found = row.prediction
        cells = [*(str(row.choices[name]) for name in names)]
        cells += [format_bytes(found.peak), format_bytes(found.reserved)]
        lines.append(cells + (["yes" if found.peak <= budget else "no"] if budget else []))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def max_batch_size(
    make_step: Callable[[int], Step], budget: int, slack: float = 0.05, **of_predict: Any
) -> int:
    """The largest batch whose step is predicted to fit.

    The peak grows by the same amount with each example. Two predictions therefore give the largest
    batch, and a third one checks it.

    Args:
        make_step: as for `predict`; takes the batch size.
        budget: bytes that may be *allocated*.
        slack: share of the budget to leave free, for memory that a prediction cannot see.
        of_predict: arguments of `predict`.

    Returns:
        Examples in a batch, 0 if not even one fits.

    Raises:
        ValueError: the budget is not above 0, the slack is not in [0, 1), or the peak does not grow
            with the batch.
    """
    if not (budget > 0 and 0 <= slack < 1):
        raise ValueError(f"budget={budget} must be above 0 and slack={slack} in [0, 1)")
    room = budget * (1 - slack)

    def peak(batch: int) -> int:
        return predict(lambda: make_step(batch), **of_predict).peak

    low, high = 2, 4
    at_low, at_high = peak(low), peak(high)
    if at_high <= at_low:
        raise ValueError(
            f"a batch of {high} takes no more than one of {low} ({format_bytes(at_low)}); does "
            "make_step use its batch size?"
        )
    per_example = (at_high - at_low) / (high - low)
    batch = max(0, int(low + (room - at_low) // per_example))
    while batch and peak(batch) > room:  # small batches may have their peak elsewhere
        batch -= 1
    return batch
