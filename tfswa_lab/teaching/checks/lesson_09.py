"""Checks of lesson 09: the knee of a curve, a step in parts, a search that changes nothing.

Notebook: 09_running_lean
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import ref

import torch
from torch import Tensor, nn

from tfswa_lab.teaching.checks import mismatch, mismatch_or_mistake, verdict

# Exercise 1 --------------------------------------------------------------------------------------

CURVES = (  # size and seconds of a step, in the order of a search
    [(1, 0.011), (2, 0.012), (4, 0.014), (16, 0.0215), (32, 0.0415), (64, 0.087), (99, 0.15)],
    [(24, 0.235), (8, 0.080), (64, 0.7), (32, 0.315), (16, 0.155), (1, 0.03), (4, 0.041)],
    [(1, 0.5), (2, 0.6), (3, 2.0)],
)


def check_knee(found: Callable[[list], object]) -> bool:
    """Exercise 1: `knee(rows)`, the smallest size with 95 % of the best items per second."""
    for rows in CURVES:
        rates = {size: size / seconds for size, seconds in rows}
        enough = [size for size, rate in rates.items() if rate >= 0.95 * max(rates.values())]
        least = min(seconds for _, seconds in rows)
        mistakes = {
            "that is the fastest size; a smaller one has nearly its rate": max(
                rates, key=rates.get
            ),
            "that is a rate, and not a size": max(rates.values()),
            "that is the largest size with so many; the smallest was asked for": max(enough),
            "that is the largest size": max(rates),
            "compare items per second, not seconds": min(
                size for size, seconds in rows if seconds <= least / 0.95
            ),
            "rows come in any order; the first with so many need not be the smallest": enough[0],
        }
        if hint := mismatch_or_mistake(found(list(rows)), min(enough), mistakes):
            return verdict("knee", f"rows {rows}: {hint}")
    return verdict("knee", None)


# Exercise 2 --------------------------------------------------------------------------------------

ROOM = 3  # items at once, in the exercise
WHOLE, PARTS = slice(None), (slice(0, 3), slice(3, 6), slice(6, 7))  # of a batch of 7


class _Training:
    """A layer in float64 with a gradient left over, and a loss that has no room for a batch."""

    def __init__(self, room: int = ROOM, fails_in_backward: bool = False):
        with torch.device("meta"):  # which draws no random numbers
            self.net = nn.Linear(3, 1, bias=False, dtype=torch.float64)
        self.net.weight = nn.Parameter(torch.ones(1, 3, dtype=torch.float64))
        self.net.weight.grad = torch.ones(1, 3, dtype=torch.float64)
        self.net.weight.register_post_accumulate_grad_hook(self._after_gradient)
        generator = torch.Generator().manual_seed(0)
        self.batch = torch.randn(7, 3, generator=generator, dtype=torch.float64)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.optimizer.register_step_post_hook(self._count)
        self.room, self.fails_in_backward = room, fails_in_backward
        self.failed, self.too_large, self.alive, self.steps = None, False, False, 0

    def _count(self, *_: object) -> None:
        self.steps += 1

    def loss_of(self, part: Tensor) -> Tensor:
        """The mean loss; too many items fail here, or when their gradient is there."""
        if self.failed is not None and self.failed() is not None:
            gc.collect()
            self.alive |= self.failed() is not None
        off = self.net(part) - 1
        self.too_large = len(part) > self.room
        if self.too_large:
            self.failed = ref(off)
            if not self.fails_in_backward:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return off.square().mean()

    def _after_gradient(self, _: Tensor) -> None:
        if self.too_large:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def weights_after(self, parts: list[tuple[float, slice]], kept: float = 0.0) -> Tensor:
        """The weights after one step on a weighed sum of the mean losses of parts.

        Args:
            parts: weight and items of each.
            kept: is added to each number of the gradient.
        """
        weight = self.net.weight.detach().clone().requires_grad_()
        losses = [
            share * (self.batch[part] @ weight.mT - 1).square().mean() for share, part in parts
        ]
        (gradient,) = torch.autograd.grad(sum(losses), weight)
        return (weight - 0.1 * (gradient + kept)).detach()


def check_step_in_parts(step_in_parts: Callable) -> bool:
    """Exercise 2: `step_in_parts(loss_of, batch, optimizer, size)` makes one step, returns size."""
    hint = (
        _step_hint(step_in_parts, _Training(), "memory runs out in the forward pass")
        or _step_hint(step_in_parts, _Training(fails_in_backward=True), "… in the backward pass")
        or _error_hint(step_in_parts)
    )
    return verdict("step_in_parts", hint)


def _step_hint(step_in_parts: Callable, training: _Training, case: str) -> str | None:
    right, mistakes = training.weights_after([(1.0, WHOLE)]), _mistakes(training)
    try:
        size = step_in_parts(training.loss_of, training.batch, training.optimizer, 7)
    except torch.OutOfMemoryError:
        return f"{case}: the error came out; catch it, and try again with half of the size"
    if training.alive:
        return (
            f"{case}: when the next try began, the failed one was still in memory; "
            "leave the except block, and try again outside of it"
        )
    if training.steps > 1:
        return f"{case}: the optimizer made {training.steps} steps; one, after the last part"
    hint = mismatch_or_mistake(training.net.weight.detach(), right, mistakes, 1e-9)
    hint = hint or mismatch(size, ROOM)
    return hint and f"{case}: {hint}"


def _mistakes(training: _Training) -> dict[str, Tensor]:
    """The weights that each usual mistake leads to."""
    weighed = list(zip((3 / 7, 3 / 7, 1 / 7), PARTS, strict=True))
    steps = {
        "each part counts alike; a part of 1 item must weigh less than one of 3": (
            [(1 / 3, part) for part in PARTS]
        ),
        "the means of the parts are added up; weigh each by its share of the items": (
            [(1.0, part) for part in PARTS]
        ),
        "the failed try has left gradients behind; drop them before the next one": (
            [(1.0, WHOLE), *weighed]
        ),
        "the last items are missing": weighed[:2],
    }
    return {
        "the weights have not moved": training.net.weight.detach().clone(),
        "old gradients are still in it; drop them before the first part": (
            training.weights_after(weighed, kept=1.0)
        ),
    } | {hint: training.weights_after(parts) for hint, parts in steps.items()}


def _error_hint(step_in_parts: Callable) -> str | None:
    """What must come out: other errors, and an out-of-memory error at the smallest size."""
    training = _Training()

    def broken(part: Tensor) -> Tensor:
        raise RuntimeError("shapes do not match")

    for loss_of, error, what in (
        (broken, RuntimeError, "an error that is no out-of-memory error"),
        (_Training(room=0).loss_of, torch.OutOfMemoryError, "one item that does not fit"),
    ):
        try:
            step_in_parts(loss_of, training.batch, training.optimizer, 7)
        except error:
            continue
        return f"{what} must come out as the error that it is"
    return None


# Exercise 3 --------------------------------------------------------------------------------------

LIMIT = 40  # items in the data, in the exercise


class _Search:
    """A training that changes all kinds of state, on a memory that Adam's state shares."""

    def __init__(self, largest: int, adam: int = 0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.net[1].eval()  # a part in another mode than the rest
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.1)
        self.largest, self.adam, self.tried = largest, adam, []

    def step(self, n: int) -> None:
        """One training step; from the second on, Adam's state takes memory, too."""
        self.tried.append(n)
        self.net.train()
        self.optimizer.zero_grad()
        loss = self.net(torch.randn(2, 4)).square().mean()
        if n + self.adam * bool(self.optimizer.state) > self.largest + self.adam:
            raise torch.OutOfMemoryError("CUDA out of memory")
        loss.backward()
        self.optimizer.step()

    def state(self) -> dict[str, list]:
        """Copies of all that a search must leave alone, by kind."""
        saved = self.optimizer.state_dict()["state"].values()
        gradients = [weight.grad for weight in self.net.parameters()]
        return copy.deepcopy(
            {
                "weights": [weight.detach() for weight in self.net.parameters()],
                "statistics of batch norm": list(self.net.buffers()),
                "optimizer": [value for each in saved for value in each.values()],
                "gradients": gradients,
                "modes": [module.training for module in self.net.modules()],
                "random generator": [torch.get_rng_state()],
            }
        )


ADVICE = {
    "optimizer": "state_dict() and load_state_dict() share their tensors with it: use deepcopy",
    "gradients": "where there was none (None), there must be none again",
    "modes": "remember `training` of each module; net.train() sets all of them alike",
    "random generator": "torch.get_rng_state() before, torch.set_rng_state(…) after",
}


def check_largest_batch(largest_batch: Callable) -> bool:
    """Exercise 3: `largest_batch(step, net, optimizer, limit)`, and all is as before."""
    hint = (
        _answer_hint(largest_batch)
        or _kept_hint(largest_batch, _Search(13), "a fresh training")
        or _kept_hint(largest_batch, _in_mid_training(), "in mid-training")
        or _interrupted_hint(largest_batch)
    )
    return verdict("largest_batch", hint)


def _answer_hint(largest_batch: Callable) -> str | None:
    for largest, adam, right, what in (
        (13, 0, 13, "13 items fit"),
        (16, 0, 16, "16 items fit"),
        (100, 0, LIMIT, f"all of limit={LIMIT} fit"),
        (0, 0, 0, "not even one item fits"),
        (13, 6, 13, "13 items fit beside Adam's state"),
    ):
        search = _Search(largest, adam)
        with _generator_kept():
            answer = largest_batch(search.step, search.net, search.optimizer, LIMIT)
        if max(search.tried, default=0) > LIMIT:
            return f"{max(search.tried)} items were tried, and limit={LIMIT}"
        mistakes = {"a power of two is where doubling ends; halve the gap above it": 8}
        if adam:
            mistakes["one step is not enough: the second has Adam's state beside it"] = 19
        if hint := mismatch_or_mistake(answer, right, mistakes if right else {}):
            return f"{what}: {hint}"
    return None


def _in_mid_training() -> _Search:
    search = _Search(13)
    with _generator_kept():
        search.step(1)
    search.net[1].eval()
    return search


def _kept_hint(largest_batch: Callable, search: _Search, when: str) -> str | None:
    before = search.state()
    with _generator_kept():
        before["random generator"] = [torch.get_rng_state()]
        largest_batch(search.step, search.net, search.optimizer, LIMIT)
        after = search.state()
    for kind, values in before.items():
        if not _same(values, after[kind]):
            advice = f"; {ADVICE[kind]}" if kind in ADVICE else ""
            return f"{when}: {kind} changed{advice}"
    return None


def _interrupted_hint(largest_batch: Callable) -> str | None:
    search = _Search(13)
    before = search.state()

    def step(n: int) -> None:
        search.step(n)
        if n > 1:
            raise KeyboardInterrupt

    with _generator_kept():
        before["random generator"] = [torch.get_rng_state()]
        try:
            largest_batch(step, search.net, search.optimizer, LIMIT)
        except KeyboardInterrupt:
            after = search.state()
        else:
            return "Ctrl-C did not come out of it; catch torch.OutOfMemoryError, nothing else"
    changed = [kind for kind, values in before.items() if not _same(values, after[kind])]
    if changed:
        return f"after Ctrl-C, {changed[0]} had changed; restore in a `finally`"
    return None


@contextmanager
def _generator_kept() -> Iterator[None]:
    """Leave torch's generator alone, whatever the reader's function does to it."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _same(before: list, after: list) -> bool:
    if len(before) != len(after):
        return False
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y
        for x, y in zip(before, after, strict=True)
    )
