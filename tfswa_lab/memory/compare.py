"""Which configuration fits: predictions of many, and the largest batch of one.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from tfswa_lab.memory.predict import Prediction, Step, predict
from tfswa_lab.memory.sizes import in_words

OF_PREDICT = ("attention", "steps", "gpu")  # choices that are not for `make_step`


@dataclass(frozen=True)
class Row:
    """A configuration and what it takes.

    Args:
        choices: names and values, such as `{"batch": 4, "attention": "flash"}`.
        prediction: of a step.

    Notebook: 05_where_memory_goes
    """

    choices: dict[str, Any]
    prediction: Prediction


def compare(make_step: Callable[..., Step], choices: Mapping[str, Sequence[Any]]) -> Iterator[Row]:
    """Predict all combinations, one after the other.

    Args:
        make_step: as for `predict`; takes the choices by name, but for `attention`, `steps` and
            `gpu`, which are `predict`'s.
        choices: values to try, by name; the last one changes fastest.

    Notebook: 05_where_memory_goes
    """
    for values in product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        yield Row(chosen, predict_choices(make_step, chosen))


def predict_choices(make_step: Callable[..., Step], choices: Mapping[str, Any]) -> Prediction:
    """Predict one combination.

    Notebook: 05_where_memory_goes
    """
    of_predict = {name: choices[name] for name in OF_PREDICT if name in choices}
    of_step = {name: value for name, value in choices.items() if name not in OF_PREDICT}
    return predict(lambda: make_step(**of_step), **of_predict)


def to_markdown(rows: Sequence[Row], budget: int | None = None) -> str:
    """A table of configurations, and whether each fits.

    Args:
        rows: of `compare`.
        budget: bytes that there are; None for no such column.

    Notebook: 05_where_memory_goes
    """
    names = list(rows[0].choices)
    columns = [*names, "peak", "reserved, about", *(["fits"] if budget else [])]
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        found = row.prediction
        cells = [*(str(row.choices[name]) for name in names)]
        cells += [in_words(found.peak), in_words(found.reserved)]
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

    Notebook: 05_where_memory_goes
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
            f"a batch of {high} takes no more than one of {low} ({in_words(at_low)}); does "
            "make_step use its batch size?"
        )
    per_example = (at_high - at_low) / (high - low)
    batch = max(0, int(low + (room - at_low) // per_example))
    while batch and peak(batch) > room:  # small batches may have their peak elsewhere
        batch -= 1
    return batch
