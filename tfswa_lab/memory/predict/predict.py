"""How much memory of a card a step will take, found out without one.

The step runs once or twice on tensors that have a shape and no values, with CUDA's kernels, casts
and rounding. What is alive at the fullest moment is the prediction. It takes seconds, whatever the
sizes are.

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
from tfswa_lab.memory.predict.fake_tensors import without_values
from tfswa_lab.memory.sizes import format_bytes, rounded
from tfswa_lab.memory.trace.timeline import Fullest
from tfswa_lab.memory.trace.tracer import Tracer

Step = Callable[[], Any]


@dataclass(frozen=True)
class Prediction(Fullest):
    """What a step will take: `peak` is what `torch.cuda.max_memory_allocated` would say.

    Args:
        reserved: bytes that the allocator will have taken from the card by then, as a simulation
            has it.
        budget: what cannot be seen, a sentence each.
        seconds: that the prediction took.
    """

    reserved: int
    budget: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        peak, reserved = format_bytes(self.peak), format_bytes(self.reserved)
        head = f"peak {peak} allocated, about {reserved} reserved"
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
    """A tracer of what CUDA's allocator would be asked for."""

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


OF_PREDICT = ("attention", "steps", "gpu")  # choices that are not for `make_step`


@dataclass(frozen=True)
class Row:
    """A configuration and what it takes.

    Args:
        choices: names and values, such as `{"batch": 4, "attention": "flash"}`.
        prediction: of a step.
    """

    choices: dict[str, Any]
    prediction: Prediction


def compare(make_step: Callable[..., Step], choices: Mapping[str, Sequence[Any]]) -> Iterator[Row]:
    """Predict all combinations, one after the other.

    Args:
        make_step: as for `predict`; takes the choices by name, but for `attention`, `steps` and
            `gpu`, which are `predict`'s.
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
        budget: bytes that there are; None for no such column.
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

    The peak grows by the same amount with each example, so two predictions say where the budget
    ends; a third one makes sure.

    Args:
        make_step: as for `predict`; takes the batch size.
        budget: bytes *allocated* that there may be.
        slack: share of the budget to leave free, for what a prediction cannot see.
        of_predict: arguments of `predict`.

    Returns:
        Examples in a batch, 0 if not even one fits.

    Raises:
        ValueError: the budget is not above 0, the slack no share, or the peak does not grow with
            the batch.
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
