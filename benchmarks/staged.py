"""What does each policy of a staged pipeline take, in memory and seconds, and is the plan right?

    python benchmarks/staged.py [--scale 0.02] [--tokens 1024]

The eight models of a public pipeline, with random weights (`performance.eight_stages`), run with
each policy in a process of its own. Its peak of resident memory, beyond what it had before loading,
is compared with the plan's; for this the C library gives freed memory back at once, and seconds are
taken in another process, where it keeps some. Beside the policies: all modules built and loaded as
usual, and accelerate's `cpu_offload_with_hook`; and, for the largest stage alone, what it costs to
hold one layer at a time. On a CPU nothing moves, so what leaves a GPU and what stays there is
predicted: `memory.predict` runs accelerate's hooks and ours on tensors without values.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from record import record, table
from safetensors.torch import load_file
from subprocess_benchmark import run, start
from torch import Tensor, nn

from tfswa_lab.memory import gauges, predict
from tfswa_lab.memory.sizes import MIB
from tfswa_lab.performance.eight_stages import NARROWEST, build, eight_stages
from tfswa_lab.performance.plan import Plan, total
from tfswa_lab.performance.precision import largest_layer_bytes, layerwise
from tfswa_lab.performance.stage import Stage
from tfswa_lab.performance.staged import StagedPipeline

POLICIES = ("resident", "lazy", "sequential", "offload", "auto")
PEERS = ("usual", "cpu_offload_with_hook")
BY_LAYER = ("whole", "layerwise", "cpu_offload")
LARGEST = "slat_generator"
AT_ONCE = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "131072")
LARGE = 10**15  # bytes of a GPU on which everything fits
Run = Callable[[Tensor], Any]


def value(tokens: int) -> Tensor:
    """What the first stage is given."""
    return torch.rand(1, tokens, NARROWEST, generator=torch.Generator().manual_seed(0))


# Ways to run the stages --------------------------------------------------------------------------


def of_policy(stages: list[Stage], policy: str, budget: int | None, device: str = "cpu") -> Run:
    """Our pipeline; it forgets the outputs, as the others do."""
    pipeline = StagedPipeline(stages, device, policy, budget, context=0)

    def go(x: Tensor) -> Tensor:
        output = pipeline.run(x)
        pipeline.outputs.clear()
        return output

    return go


def usual(stages: list[Stage]) -> Run:
    """All modules at once, each built with random weights that the file's are copied over."""
    modules = []
    for stage in stages:
        make, path = stage.load.args
        modules.append(make())
        modules[-1].load_state_dict(load_file(path))
    return partial(chained, modules)


def with_hooks(stages: list[Stage], device: str = "cpu") -> Run:
    """accelerate's way: each model leaves the device when the next one runs."""
    modules, hook = [], None
    for stage in stages:
        module, hook = cpu_offload_with_hook(stage.load(), torch.device(device), hook)
        modules.append(module)
    return partial(chained, modules)


@torch.no_grad()
def chained(modules: list[nn.Module], x: Tensor) -> Tensor:
    """All outputs are kept until the end, as in our pipeline."""
    outputs = [x]
    for module in modules:
        outputs.append(module(outputs[-1]))
    return outputs[-1]


def in_layers(stages: list[Stage], way: str) -> Run:
    """The largest stage alone, whole or layer by layer."""
    (module,) = (stage.load() for stage in stages if stage.name == LARGEST)
    if way == "layerwise":
        layerwise(module, "cpu")
    elif way == "cpu_offload":
        cpu_offload(module, torch.device("cpu"))
    return partial(chained, [module])


def made(way: str, stages: list[Stage], budget: int | None) -> Run:
    """The way of that name; models are loaded here or in the run."""
    if way in POLICIES:
        return of_policy(stages, way, budget)
    if way in BY_LAYER:
        return in_layers(stages, way)
    return usual(stages) if way == "usual" else with_hooks(stages)


# Measurements ------------------------------------------------------------------------------------


def measure(
    way: str, folder: str, scale: float, tokens: int, known: dict, budget: int | None = None
) -> dict:
    """Peak of two runs and rest, in MiB beyond what was there before, and seconds of each."""
    stages = [replace(stage, **known[stage.name]) for stage in eight_stages(folder, scale, tokens)]
    made("sequential", stages, None)(value(tokens))  # what libraries import and keep
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = gauges.process_rss()
    began = time.perf_counter()
    go = made(way, stages, budget)
    go(value(tokens))
    between = time.perf_counter()
    checksum = go(value(tokens)).double().sum().item()
    ended = time.perf_counter()
    peak = gauges.process_peak() - before
    give_back()
    left = gauges.process_rss() - before
    return {
        "peak_mib": round(peak / MIB, 1),
        "left_mib": round(left / MIB, 1),
        "base_mib": round(before / MIB, 1),
        "seconds": round(between - began, 2),
        "second_seconds": round(ended - between, 2),
        "checksum": checksum,
    }


def give_back() -> None:
    """Return to the system what Python and the C library keep for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def memory_and_seconds(way: str, **job: Any) -> dict:
    """Of two processes: one that gives freed memory back at once, and a usual one."""
    os.environ |= AT_ONCE
    memory = run(__file__, 1, way=way, **job)
    for name in AT_ONCE:
        del os.environ[name]
    usual = run(__file__, 1, way=way, **job)
    return memory | {name: usual[name] for name in ("seconds", "second_seconds")}


def planned(stages: list[Stage], x: Tensor) -> Plan:
    """Found out without a run; the budget of "auto" is halfway between the other policies."""
    pipeline = StagedPipeline(stages, device="cpu")
    plan = pipeline.plan(x)
    pipeline.budget = (plan.policy("sequential").peak + plan.policy("resident").peak) // 2
    return pipeline.plan()


def predicted_on_gpu(make: Callable[[], Run], x: Tensor) -> dict[str, float]:
    """MiB of tensors on a GPU, at most and after a run, beside the input."""

    def make_step() -> Callable[[], Any]:
        go, given = make(), x.cuda()
        return lambda: [go(given)].clear()

    room = gauges.DeviceMemory(LARGE, LARGE)
    with patch.object(gauges, "device_memory", lambda device: room):
        allocated = predict(make_step, steps=1).timeline.allocated()
    peak, left = max(allocated), allocated[-1] - x.nbytes
    return {"peak_mib": round(peak / MIB, 1), "left_mib": round(left / MIB, 1)}


def all_on_gpu(stages: list[Stage], x: Tensor) -> dict[str, dict[str, float]]:
    """Each policy, and accelerate's hooks."""
    ways = {"cpu_offload_with_hook": partial(with_hooks, stages, "cuda")}
    for policy in POLICIES[:-1]:  # the first run of "auto" measures
        ways[policy] = partial(of_policy, stages, policy, LARGE, "cuda")
    return {way: predicted_on_gpu(make, x) for way, make in ways.items()}


def main() -> None:
    """Measure, record, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1 / 50)
    parser.add_argument("--tokens", type=int, default=1024)
    asked = parser.parse_args()
    sizes = {"scale": asked.scale, "tokens": asked.tokens}
    with tempfile.TemporaryDirectory() as folder:
        stages, x = eight_stages(folder, **sizes), value(asked.tokens)
        plan = planned(stages, x)
        print(plan)
        known = {
            each.name: {"activations": each.activations, "carries": total(each.hands_on)}
            for each in plan.sizes
        }
        on_gpu = all_on_gpu(stages, x)
        job = {"folder": folder, "known": known, **sizes}
        budget = {"auto": plan.room.budget}
        rows = {
            way: memory_and_seconds(way, budget=budget.get(way), **job)
            for way in (*POLICIES, *PEERS, *BY_LAYER)
        }
    for policy in POLICIES:
        rows[policy]["planned_mib"] = round(plan.policy(policy).peak / MIB, 1)
    result = {"ways": rows, "predicted_on_gpu": on_gpu, **sizes}
    with torch.device("meta"):
        layer = largest_layer_bytes(build(LARGEST, **sizes))
    record("staged", "cpu", result | {"largest_layer_mib": round(layer / MIB, 2)})
    show(result)


def show(result: dict) -> None:
    """The tables."""
    columns = "way", "planned, MiB", "peak, MiB", "left, MiB", "first run, s", "second, s"
    keys = "peak_mib", "left_mib", "seconds", "second_seconds"
    lines = [
        (way, row.get("planned_mib", "—"), *(row[key] for key in keys))
        for way, row in result["ways"].items()
    ]
    print(table(columns, lines))
    columns = "predicted on a GPU", "peak, MiB", "left, MiB"
    print(table(columns, [(way, *row.values()) for way, row in result["predicted_on_gpu"].items()]))


if __name__ == "__main__":
    start(main, measure)
