"""On a GPU: the eight models of a public pipeline at full size, within 12 GB.

    python benchmarks/eight_stages.py --device cuda    started by gpu.py

Loaded together within 9.21 GB, the budget that a public error report leaves to tensors, they should
fail in the last one. Then each policy runs twice within 11.75 GB; the plan's peak stands beside the
allocator's. Weights are random and made on the GPU; no file is read. GB are 10^9 bytes. The CPU's
figures are those of staged.py.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from events import REHEARSAL, attempt
from torch import Tensor, nn

from tfswa_lab.memory import gauges
from tfswa_lab.memory.out_of_memory import attempt as run_out
from tfswa_lab.performance.eight_stages import NARROWEST, SIZES, build
from tfswa_lab.performance.stage import Stage
from tfswa_lab.performance.staged import StagedPipeline
from tfswa_lab.performance.timing import seconds_of

SCALE, TOKENS = (1e-3, 64) if REHEARSAL else (1, 4096)
GUIDE, CARD = (1e12, 1e12) if REHEARSAL else (9.21e9, 11.75e9)  # bytes
POLICIES = ("sequential", "auto", "offload")


def load(name: str) -> nn.Module:
    """A model with random weights, on the GPU from the beginning."""
    with torch.device("meta"):
        module = build(name, SCALE, TOKENS)
    module = module.to_empty(device="cuda")
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.01)
    return module


def call(module: nn.Module, value: Tensor) -> Tensor:
    """The next value."""
    return module(value)


def pipeline(policy: str, budget: float) -> StagedPipeline:
    """The eight stages, whose weights are known before they are loaded."""
    stages = [
        Stage(name, partial(load, name), call, weights=partial(build, name, SCALE, TOKENS))
        for name in SIZES
    ]
    return StagedPipeline(stages, "cuda", policy, budget, context=0)


def limit(size: float) -> None:
    """Let torch's allocator have so many bytes of the GPU."""
    if not REHEARSAL:
        torch.cuda.set_per_process_memory_fraction(size / gauges.device_memory().total)


def together(value: Tensor) -> dict:
    """Where the models fail that are loaded together."""
    limit(GUIDE)
    with pipeline("resident", GUIDE) as resident:
        planned = resident._plan().policy("resident").fails_at
        _, error = run_out(lambda: resident.run(value))
    return {"planned": planned, "failed": error.__notes__[0] if error else "it did not"}


def with_policy(policy: str, value: Tensor) -> dict:
    """Planned and measured peak in GiB, seconds of the first and the second run, what is left."""
    limit(CARD)
    with pipeline(policy, CARD) as staged:
        planned = staged.plan(value).policy(policy).peak
        first, second = (seconds_of(lambda: staged.run(value)) for _ in range(2))
        peak = max(each.peak for each in staged.status().values())
        staged.outputs.clear()
        left = gauges.allocated()
    return {
        "planned_gib": round(planned / 2**30, 4),
        "measured_gib": round(peak / 2**30, 4),
        "left_gib": round(left / 2**30, 4),
        "seconds": round(first, 3),
        "second_seconds": round(second, 3),
    }


def main() -> None:
    """A line for the models together, and one for each policy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda"], required=True)
    parser.parse_args()
    value = torch.rand(1, TOKENS, NARROWEST)
    attempt("staged", partial(together, value), run="together, 9.21 GB")
    for policy in POLICIES:
        attempt("staged", partial(with_policy, policy, value), run=f"{policy}, 11.75 GB")


if __name__ == "__main__":
    main()
