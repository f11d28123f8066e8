"""Is a leak called a leak, and is its cause named?

    python benchmarks/leaks.py

All planted scripts of the tests: sound ones, leaks of tensors and graphs, leaks by what holds them,
and two sets that were written after the rules. Right is the verdict; named is a cause that says
what a reader has to know. The sets were then used to mend the rules, so these counts are a
demonstration and not a prediction for scripts of yours.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

import torch
from record import record

from tfswa_lab.memory.leaks import diagnose

SETS = {
    "sound": ("planted_healthy", "SOUND"),
    "tensors and graphs": ("planted_tensors", "TENSOR_LEAKS"),
    "by holder": ("planted_holders", "HELD_LEAKS"),
    "written later": ("planted_second", "SECOND"),
    "written last": ("planted_unseen", "UNSEEN"),
    "once got wrong": ("planted_judged", "JUDGED"),
}


def judge(script) -> dict:
    """What is said of one script."""
    torch.manual_seed(0)
    made = script.make()
    step, arguments = made if isinstance(made, tuple) else (made, {})
    began = time.perf_counter()
    found = diagnose(step, **arguments)
    seconds = round(time.perf_counter() - began, 2)
    said = f"{found.verdict} {found.cause}".lower()
    named = all(word.lower() in said for word in script.words)
    return {"name": script.name, "verdict": found.verdict, "seconds": seconds} | {
        "right": found.verdict in script.verdicts,
        "named": named,
    }


def main() -> None:
    """Judge all, record, print."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "memory"))
    torch.set_num_threads(1)
    result = {}
    print("| scripts | number | verdict right | cause named | median seconds |")
    print("|---|---|---|---|---|")
    for name, (module, corpus) in SETS.items():
        rows = [judge(script) for script in getattr(importlib.import_module(module), corpus)]
        right, named = (sum(row[key] for row in rows) for key in ("right", "named"))
        median = sorted(row["seconds"] for row in rows)[len(rows) // 2]
        result[name] = {"rows": rows, "number": len(rows), "right": right, "named": named}
        print(f"| {name} | {len(rows)} | {right} | {named} | {median} |", flush=True)
    record("leaks", result)


if __name__ == "__main__":
    main()
