"""Results and tables out of the lines that were written on a GPU.

    python3 benchmarks/gpu.py report events.jsonl…

It works on an unfinished run and on several runs together: the latest measurement counts. Each
kind of measurement becomes `results/<name>-gpu.json`, with the machine beside its rows, and
predictions become a plot as well. The tables are printed, for README.md.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import record
from events import read

MACHINE = ("gpu_name", "memory_gib", "driver", "torch", "cuda", "cudnn", "python", "cores")
CHOICES = ("network", "seconds", "batch", "precision", "attention", "checkpointed", "train")
# For each kind: the file, the keys of a row, and its measurements.
KINDS = {
    "smoke": (
        "smoke",
        ("check",),
        ("float32", "bfloat16", "copy_gb_per_s", "bfloat16_tflop_per_s", "seconds", "message"),
    ),
    "prediction": (
        "memory_prediction",
        (*CHOICES, "gpu", "claim"),
        ("predicted", "measured", "workspace", "error", "error_gross", "milliseconds"),
    ),
    "hmm": ("hmm", ("way", "what", "task"), ("ms", "claim_ms", "peak_mib", "own_mib")),
    "staged": (
        "eight_stages",
        ("run",),
        (
            "planned",
            "failed",
            "planned_gib",
            "measured_gib",
            "left_gib",
            "seconds",
            "second_seconds",
        ),
    ),
    "lean": (
        "lean",
        ("run",),
        (
            *("seconds_per_step", "audio_seconds_per_second", "peak_gib"),
            *("largest", "value", "knee", "true"),
        ),
    ),
    "leak": ("leaks", ("set", "script"), ("verdict", "right", "named", "leak or not", "seconds")),
    "separation": (
        "separation",
        ("way", "batch", "precision"),
        ("times_real_time", "torch's fused kernel", "scores written out", "share"),
    ),
    "bsseval": (
        "bsseval",
        ("what", "song_seconds", "where"),
        ("cold_s", "warm_s", "s", "structured_s", "cholesky_s", "difference_db"),
    ),
    "training": (
        "training",
        ("run",),
        ("audio_seconds_per_second", "seconds_per_step", "peak_gib", "share"),
    ),
    "trace": ("memory_trace", (), ("seconds", "ratio")),
    "claim": ("claims", ("claim", "mode"), ("predicted", "measured")),
    "snapshot": ("snapshots", ("recording",), ("bytes", "allocated", "reserved", "message")),
    "mir1k": ("mir1k-training", (), ("steps", "minutes", "seconds_of_audio_per_second")),
    "test": ("tests", ("test",), ("outcome", "seconds")),
    "lesson": ("lessons", ("name",), ("seconds", "peak_bytes", "error")),
    "job": ("jobs", ("name",), ("seconds", "limit", "ended", "last")),
}
WITHOUT_RESULT = ("does_not_fit", "out_of_memory")


def rows_of(lines: list[dict], kind: str) -> list[dict]:
    """The latest row of a kind for each set of keys."""
    _, of, _ = KINDS[kind]
    latest = {}
    for line in lines:
        if line["kind"] == kind:
            latest[json.dumps([line.get(name) for name in of])] = line
    return [
        {name: value for name, value in line.items() if name not in ("kind", "at", *MACHINE)}
        for line in latest.values()
    ]


def machine_of(lines: list[dict], kind: str) -> dict:
    """The machine of a kind's last line."""
    line = [line for line in lines if line["kind"] == kind][-1]
    return {name: line[name] for name in MACHINE if name in line}


def summary(kind: str, rows: list[dict]) -> dict:
    """Numbers that stand for all rows."""
    if kind == "prediction":
        errors = [abs(row["error"]) for row in rows if "error" in row]
        gross = [abs(row["error_gross"]) for row in rows if "error" in row]
        return {
            "configurations": len(errors),
            "median_error": statistics.median(errors) if errors else None,
            "worst_error": max(errors, default=None),
            "median_error_gross": statistics.median(gross) if gross else None,
            "worst_error_gross": max(gross, default=None),
        }
    if kind == "leak":
        counted = ("right", "named", "leak or not")
        return {"scripts": len(rows)} | {
            name: sum(row.get(name, False) for row in rows) for name in counted
        }
    if kind == "test":
        outcomes = [row["outcome"] for row in rows]
        return {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
    return {}


def table(kind: str, rows: list[dict]) -> str:
    """Markdown, without columns that are empty."""
    _, of, found = KINDS[kind]
    names = [name for name in (*of, *found, *WITHOUT_RESULT) if any(name in row for row in rows)]
    return record.table(names, ([_cell(name, row.get(name)) for name in names] for row in rows))


def _cell(name: str, value: object) -> str:
    if value is None:
        return ""
    if name in ("predicted", "measured", "workspace"):
        return f"{value / 2**30:.3f} GiB"
    if name.startswith("error"):
        return f"{value:+.2%}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(key, each)}" for key, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(rows: list[dict], machine: dict, path: Path) -> None:
    """Predicted over measured, and the error below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    marks = dict(zip(dict.fromkeys(row["network"] for row in rows), "o^s", strict=False))
    for network, mark in marks.items():
        some = [row for row in rows if row["network"] == network]
        measured = [(row["measured"] - row["workspace"]) / 2**30 for row in some]
        predicted = [row["predicted"] / 2**30 for row in some]
        top.plot(measured, predicted, mark, alpha=0.7, label=network)
        bottom.plot(measured, [100 * row["error"] for row in some], mark, alpha=0.7)
    top.axline((1, 1), slope=1, color="black", linewidth=0.8)
    top.set(xscale="log", yscale="log", ylabel="predicted, GiB allocated")
    top.set_title(f"{machine.get('gpu_name')}, torch {machine.get('torch')}", loc="left")
    top.legend()
    bottom.axhline(0, color="black", linewidth=0.8)
    bottom.set(xlabel="measured less cuBLAS's workspace, GiB allocated", ylabel="error in %")
    figure.savefig(path, dpi=120)


def write(lines: list[dict], results: Path) -> None:
    """One file for each kind that there are lines of, and its table."""
    for kind, (name, _, _) in KINDS.items():
        rows = rows_of(lines, kind)
        if not rows:
            continue
        machine, in_short = machine_of(lines, kind), summary(kind, rows)
        record.record(name, "cuda", {"machine": machine, **in_short, "rows": rows}, results)
        print(f"\n## {name}\n\n{_cell('', machine)}\n{_cell('', in_short)}\n")
        print(table(kind, rows))
        measured = [row for row in rows if "error" in row]
        if kind == "prediction" and measured:
            plot(measured, machine, results / "memory_prediction-gpu.png")


def main(arguments: list[str], results: Path = record.RESULTS) -> None:
    """Read lines, write results, print tables and what failed."""
    if not arguments:
        sys.exit("report what? name the events: gpu.py report OUT/events.jsonl")
    lines, cut = read(map(Path, arguments))
    write(lines, results)
    for line in lines:
        if line["kind"] == "failed":
            what = {name: line[name] for name in line if name not in ("kind", "at", *MACHINE)}
            print("\nFAILED", *(f"{name}: {value}" for name, value in what.items()), sep="\n")
    print(f"\n{len(lines)} lines, {cut} cut")
