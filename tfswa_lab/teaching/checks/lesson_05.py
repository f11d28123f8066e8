"""Checks of lesson 05: what does not depend on the batch, the peak of a timeline, segments.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tfswa_lab.memory.sizes import rounded
from tfswa_lab.memory.trace import Trace, trace
from tfswa_lab.memory.trace.timeline import Block, Timeline, by_category
from tfswa_lab.teaching.checks import mismatch, mismatch_or_mistake, verdict

NUMBERS = {"sgd": 2, "momentum": 3, "adamw": 4}  # per parameter: itself, its gradient, the state

Sizes = list[tuple[int, int, int | None]]


def check_state_bytes(state_bytes: Callable[[int, str], object]) -> bool:
    """Exercise 1: `state_bytes(parameters, optimizer)` of parameters, gradients and state."""
    for optimizer, numbers in NUMBERS.items():
        for parameters in (1, 1_000_000):
            got = state_bytes(parameters, optimizer)
            if hint := _state_hint(got, parameters, numbers):
                return verdict("state_bytes", f"{parameters} parameters, {optimizer}: {hint}")
    return verdict("state_bytes", None)


def _state_hint(got: object, parameters: int, numbers: int) -> str | None:
    mistakes = {
        "that counts numbers; a float32 has four bytes": numbers * parameters,
        "one number per parameter is missing: the gradient, or one of AdamW's two moments": (
            4 * (numbers - 1) * parameters
        ),
    }
    return mismatch_or_mistake(got, 4 * numbers * parameters, mistakes)


def check_peak_bytes(peak_bytes: Callable[[Sizes], object]) -> bool:
    """Exercise 2: `peak_bytes(blocks)` of `(size, born, died)`, sizes rounded up to 512."""
    generator = random.Random(0)
    cases = {
        "one block of 1 byte": [(1, 0, 1)],
        "three blocks, one after the other": [(512, 0, 1), (512, 1, 2), (512, 2, None)],
        "two blocks, one never released": [(1024, 0, None), (512, 3, 5)],
        "100 random blocks": [_random_block(generator) for _ in range(100)],
    }
    for name, blocks in cases.items():
        if hint := _peak_hint(peak_bytes(list(blocks)), blocks):
            return verdict("peak_bytes", f"{name}: {hint}")
    return verdict("peak_bytes", None)


def _random_block(generator: random.Random) -> tuple[int, int, int | None]:
    born = generator.randrange(200)
    died = None if generator.random() < 0.1 else born + generator.randint(1, 60)
    return generator.randint(1, 5000), born, died


def _peak_hint(got: object, blocks: Sizes) -> str | None:
    given = [(rounded(size), born, died) for size, born, died in blocks]
    one_longer = [(size, born, died and died + 1) for size, born, died in given]
    released = [block for block in given if block[2] is not None]
    mistakes = {
        "the allocator gives multiples of 512 bytes; round every size up": _peak(blocks),
        "that is the sum of all sizes; most blocks were not there at the same time": (
            sum(size for size, *_ in given)
        ),
        "after the event `died` the block is gone, and may make room for another": (
            _peak(one_longer)
        ),
        "blocks that are never released count as well": _peak(released),
    }
    return mismatch_or_mistake(got, _peak(given), mistakes, 0.0)


def _peak(blocks: Sizes) -> int:
    events = max([born for _, born, _ in blocks] + [died or 0 for *_, died in blocks])
    return Timeline([Block(size, size, *ends) for size, *ends in blocks], events).peak().allocated


def check_run_in_segments(
    run_in_segments: Callable[[Sequence[nn.Module], Tensor, int], object],
) -> bool:
    """Exercise 3: `run_in_segments(blocks, x, segments)` keeps the input of each segment."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(12))
        x = torch.randn(4096, 32, requires_grad=True)
    expected = nn.Sequential(*blocks)(x)
    gradients = _gradients(expected, blocks, x)
    for segments in (1, 3, 5, 12):
        with trace(stacks=False) as seen:
            got = run_in_segments(blocks, x, segments)
        if hint := _segments_hint(got, expected, seen, segments):
            return verdict("run_in_segments", f"12 blocks, {segments} segments: {hint}")
        if _far(_gradients(got, blocks, x), gradients):
            return verdict("run_in_segments", f"{segments} segments: gradients differ")
    return verdict("run_in_segments", None)


def _segments_hint(got: object, expected: Tensor, seen: Trace, segments: int) -> str | None:
    if not isinstance(got, Tensor):
        return f"expected a tensor, got {type(got).__name__}"
    if hint := mismatch(got.detach(), expected.detach()):
        return hint
    if not got.requires_grad:
        return "the output has no gradient; checkpoint does not need no_grad"
    timeline = seen.timeline()
    kept = timeline.held_by(timeline.events, by_category)["activation"] / expected.nbytes
    if round(kept) > segments:
        return f"{kept:.0f} maps are kept, not {segments}: is every segment checkpointed?"
    if round(kept) < segments:
        return f"only {kept:.0f} maps are kept, not {segments}: is it cut into so many segments?"
    return None


def _gradients(output: Tensor, blocks: nn.Module, x: Tensor) -> list[Tensor | None]:
    inputs = [x, *blocks.parameters()]
    return torch.autograd.grad(output.square().sum(), inputs, allow_unused=True)


def _far(got: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    pairs = zip(got, expected, strict=True)
    return any(one is None or mismatch(one, other, 1e-4) is not None for one, other in pairs)
