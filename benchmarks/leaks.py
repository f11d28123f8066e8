"""Is a leak called a leak, and is its cause named?

    python benchmarks/leaks.py
    python benchmarks/leaks.py --device cuda    with tensors on a GPU, started by gpu.py

All planted scripts of the tests: sound ones, leaks of tensors and graphs, leaks by what holds them,
two sets that were written after the rules, what a judge found them to get wrong, and what needs a
rule that no other script needs. Right is the verdict; named is a cause that tells a reader what to
fix. The sets were then used to fix the rules, so these counts are a demonstration and not a
prediction for your own scripts.

The peer is what people do by hand: count the bytes of all tensors that the garbage collector
knows, after step 2 and after step 12, and call an increase a leak. It can only say leak or no leak.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from events import REHEARSAL, attempt
from record import record, table

from tfswa_lab.memory.leaks import diagnose
from tfswa_lab.memory.leaks.traced_steps import StepCaller
from tfswa_lab.memory.leaks.verdicts import LEAKS
from tfswa_lab.memory.trace.tracer import has_storage

SETS = {
    "sound": ("planted_healthy", "SOUND"),
    "tensors and graphs": ("planted_tensors", "TENSOR_LEAKS"),
    "by holder": ("planted_holders", "HELD_LEAKS"),
    "written later": ("planted_second", "SECOND"),
    "written last": ("planted_unseen", "UNSEEN"),
    "once got wrong": ("planted_judged", "JUDGED"),
    "by rule": ("planted_rules", "RULES"),
    "beyond one process": ("planted_beyond", "BEYOND"),
}

# On a GPU: first the scripts that need one, then those whose verdict must be the CPU's.
GPU_SETS = {"on a GPU": ("planted_gpu", "ON_GPU")}
GPU_SETS |= {name: SETS[name] for name in ("sound", "tensors and graphs", "by holder")}
# All of them would take longer than they may: of these, every second one.
GPU_EVERY = {"tensors and graphs": 2, "by holder": 2}

COUNTED = ("right", "named", "leak or not", "leak or not, by counting")


def judge(script) -> dict:
    """The diagnosis of one script."""
    step, arguments = script.prepare()
    began = time.perf_counter()
    found = diagnose(step, **arguments)
    seconds = round(time.perf_counter() - began, 2)
    return {"name": script.name, "verdict": found.verdict, "seconds": seconds} | {
        "right": found.verdict in script.verdicts,
        "named": script.is_named_in(found),
        "leak or not": found.leaks == _leaks(script),
    }


def judge_both(script) -> dict:
    """The same, and whether counting tensors is right."""
    by_counting = _called_a_leak_by_counting(script) == _leaks(script)
    return judge(script) | {"leak or not, by counting": by_counting}


def _leaks(script) -> bool:
    return not LEAKS.isdisjoint(script.verdicts)


def _called_a_leak_by_counting(script) -> bool:
    call, counts = StepCaller(script.prepare()[0]), []
    for _ in range(12):
        call()
        gc.collect()
        tensors = (thing for thing in gc.get_objects() if has_storage(thing))
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
        counts.append(sum(storages.values()))
    return counts[-1] > counts[2]


def scripts(module: str, corpus: str) -> list:
    """The planted scripts of a set."""
    return getattr(importlib.import_module(module), corpus)


def on_gpu() -> None:
    """A line for each script; tensors are on the GPU where a script does not say otherwise."""
    torch.set_default_device("cuda")
    for name, source in GPU_SETS.items():
        for script in scripts(*source)[: 1 if REHEARSAL else None : GPU_EVERY.get(name, 1)]:
            attempt("leak", partial(judge, script), set=name, script=script.name)


def main() -> None:
    """Judge all, record, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "memory"))
    torch.set_num_threads(1)
    if parser.parse_args().device == "cuda":
        return on_gpu()
    result, lines = {}, []
    for name, (module, corpus) in SETS.items():
        rows = [judge_both(script) for script in scripts(module, corpus)]
        counts = {key: sum(row[key] for row in rows) for key in COUNTED}
        median = statistics.median(row["seconds"] for row in rows)
        result[name] = {"rows": rows, "number": len(rows)} | counts
        lines.append((name, len(rows), *counts.values(), f"{median:.1f}"))
        print(*lines[-1], flush=True)
    record("leaks", "cpu", result)
    print(table(["scripts", "number", *COUNTED, "median seconds"], lines))


if __name__ == "__main__":
    main()
