"""What does it cost to watch every allocation?

    python benchmarks/memory_trace.py [--device cuda]

A training step of a small TF-Locoformer, alone and traced, with and without the lines of Python, in
turns. The peer is torch's MemTracker, which keeps no timeline and no lines.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext

import torch
from events import emit
from record import record, table
from torch.distributed._tools.mem_tracker import MemTracker

from tfswa_lab.device import pick_device
from tfswa_lab.memory.trace import trace
from tfswa_lab.models.tf_locoformer import SIZES, TFLocoformer
from tfswa_lab.performance.timing import seconds_of

REPEATS = 5


def make_step(device: torch.device) -> tuple[torch.nn.Module, torch.optim.Optimizer, Callable]:
    """Model, optimizer and step."""
    torch.manual_seed(0)
    model = TFLocoformer(4, 16, **SIZES["tiny"]).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(1, 4, 64, 129, device=device)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def tracked(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> MemTracker:
    """The peer, ready to be entered."""
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    return tracker


def main() -> None:
    """Time in turns, record, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    device = pick_device(parser.parse_args().device)
    model, optimizer, step = make_step(device)
    ways = {
        "alone": nullcontext,
        "traced": lambda: trace(model, optimizer),
        "traced, without lines": lambda: trace(model, optimizer, stacks=False),
        "MemTracker": lambda: tracked(model, optimizer),
    }
    spent = defaultdict(list)
    for _ in range(1 + REPEATS):
        for name, watching in ways.items():
            with watching():
                spent[name].append(seconds_of(step))
    seconds = {name: statistics.median(times[1:]) for name, times in spent.items()}
    ratios = {name: round(each / seconds["alone"], 2) for name, each in seconds.items()}
    rounded = {name: round(each, 4) for name, each in seconds.items()}
    if device.type == "cuda":
        emit("trace", seconds=rounded, ratio=ratios)
    else:
        record("memory_trace", "cpu", {"seconds": rounded, "ratio": ratios})
    rows = [(name, rounded[name], ratio) for name, ratio in ratios.items()]
    print(table(["step", "seconds", "ratio"], rows))


if __name__ == "__main__":
    main()
