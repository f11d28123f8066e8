"""Tests, full lessons and benchmarks on a CUDA card, in nine minutes and without network.

    python3 benchmarks/gpu.py [--wheels .whl] [--device cpu]

For a borrowed machine: a checkout, that machine's own Python with its own torch, and a folder
of wheels (`make wheels`) for the packages which that Python lacks. Nothing is installed into it.
`--device cpu` rehearses the same on any machine, and keeps its results out of the repository.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
BUILD = CHECKOUT / "build" / "gpu"
SITE = BUILD / "site"


def lacks(wheel: Path) -> bool:
    """Whether this Python has no version of the wheel's package."""
    try:
        version(wheel.name.split("-")[0])
    except PackageNotFoundError:
        return True
    return False


def add_site(wheels: Path) -> None:
    """Make the checkout and the missing packages importable, here and in every process below."""
    files = [str(wheel) for wheel in sorted(wheels.glob("*.whl")) if lacks(wheel)]
    if files:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        command += ["--no-compile", "--upgrade", "--target", str(SITE), *files]
        subprocess.run(command, check=True)
    folders = [str(CHECKOUT), str(SITE)]
    sys.path[1:1] = folders
    importlib.invalidate_caches()
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(folders + ([inherited] if inherited else []))
    print(f"{len(files)} packages from {wheels}", flush=True)


def stand_in_for_ffmpeg() -> None:
    """Let musdb list WAV files where there is no ffmpeg; decoding with it fails and says why."""
    scripts = {
        "ffmpeg": "echo 'this machine has no ffmpeg' >&2; exit 1",
        "ffprobe": f"exec '{sys.executable}' -S -E '{CHECKOUT}/benchmarks/wav_probe.py' \"$@\"",
    }
    folder = BUILD / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    for name, script in scripts.items():
        if shutil.which(name) is None:
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)
    os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], str(folder)])


def describe(device: str) -> dict[str, str]:
    """The card, its driver, and the torch that drives it."""
    import torch

    about = {"device": device, "torch": torch.__version__, "python": sys.version.split()[0]}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        about |= {"card": card.name, "memory_gib": f"{card.total_memory / 2**30:.1f}"}
        about |= {"driver": driver, "cuda": torch.version.cuda}
    return about


def run_script(name: str, command: list, limit_seconds: float) -> dict:
    """Run a program and note its time, and its last line as the result."""
    start = time.perf_counter()
    print(f"== {name}", flush=True)
    try:
        done = subprocess.run(
            command, cwd=CHECKOUT, text=True, timeout=limit_seconds, capture_output=True
        )
        print(done.stdout[-4000:], done.stderr[-4000:], flush=True)
        last = (done.stdout.strip().splitlines() or [""])[-1]
        good = done.returncode == 0
    except subprocess.TimeoutExpired:
        good, last = False, f"not finished after {limit_seconds:.0f} s"
    return {"name": name, "seconds": time.perf_counter() - start, "ok": good, "result": last}


def run_lesson(path: Path, device: str, limit_seconds: float) -> dict:
    """Execute a lesson in full."""
    from tfswa_lab.teaching.runner import try_notebook

    print(f"== {path.stem}", flush=True)
    parameters = {"quick": False, "device": device}
    run = try_notebook(path, BUILD / "notebooks" / path.name, parameters, limit_seconds)
    print(f"{run.seconds:.1f} s {run.error}", flush=True)
    row = {"name": run.name, "seconds": run.seconds, "ok": not run.error}
    row |= {"result": run.error or "ran in full"}
    return row if run.peak_bytes is None else row | {"peak_host_mib": run.peak_bytes // 2**20}


def jobs(device: str) -> list[Callable[[float], dict]]:
    """What there is to run, in order: each takes its time limit and returns a row."""
    from run_all import scripts

    python = sys.executable
    tests = [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    todo = [partial(run_script, "tests marked gpu", tests)]
    for path in sorted((CHECKOUT / "notebooks").glob("*.ipynb")):
        todo.append(partial(run_lesson, path, device))
    for path in scripts(gpu=True):
        todo.append(partial(run_script, path.stem, [python, path, "--device", device]))
    return todo


def run_within(budget_seconds: float, todo: list[Callable[[float], dict]]) -> list[dict]:
    """Run the jobs; each may take twice its equal share of the time that is left, the last all."""
    deadline = time.monotonic() + budget_seconds
    rows = []
    for left, job in zip(range(len(todo), 0, -1), todo, strict=True):
        share = 2 * (deadline - time.monotonic()) / (left + 1)
        rows.append(job(max(share, 1.0)))
    return rows


def markdown(about: dict[str, str], rows: list[dict]) -> str:
    """The same as a table for people."""
    title = about.get("card", "rehearsal on the CPU")
    facts = ", ".join(f"{key} {value}" for key, value in about.items() if key != "card")
    lines = [f"# {title}", "", facts, "", "| what | seconds | host MiB | result |"]
    lines += ["| --- | ---: | ---: | --- |"]
    for row in rows:
        result = row["result"] if row["ok"] else f"**failed**: {row['result']}"
        cells = (row["name"], f"{row['seconds']:.1f}", str(row.get("peak_host_mib", "")), result)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def write_report(folder: Path, about: dict[str, str], rows: list[dict]) -> None:
    """JSON for scripts and Markdown for people, named after the card."""
    slug = re.sub(r"\W+", "-", about.get("card", "rehearsal").lower())
    report = json.dumps({"machine": about, "runs": rows}, indent=2) + "\n"
    (folder / f"gpu-{slug}.json").write_text(report)
    (folder / f"gpu-{slug}.md").write_text(markdown(about, rows))


def refuse_without_card(device: str) -> None:
    """Say at once what is missing: everything after this takes minutes."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            f"torch {torch.__version__} of {sys.executable} sees no CUDA card; run this on a "
            "machine that has one, or rehearse it on the CPU: make gpu ARGS='--device cpu'"
        )


def main() -> None:
    """Run everything within the time; exit 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, default=CHECKOUT / ".whl")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything")
    options = parser.parse_args()
    start = time.monotonic()
    refuse_without_card(options.device)
    add_site(options.wheels)
    stand_in_for_ffmpeg()
    from tfswa_lab.data.band import ensure_band

    ensure_band()
    folder = CHECKOUT / "benchmarks" / "results" if options.device == "cuda" else BUILD
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TFSWA_LAB_RESULTS"] = str(folder)
    about = describe(options.device)
    rows = run_within(options.budget - (time.monotonic() - start), jobs(options.device))
    write_report(folder, about, rows)
    print(markdown(about, rows))
    sys.exit(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    main()
