"""How long does it take to read a stranger's snapshot, and how much memory?

    python benchmarks/snapshots.py [--mosaic FOLDER --mosaic-python PYTHON] [--entries N ...]

Synthetic snapshots with the structure of `torch.cuda.memory._snapshot()`, up to 1.2 GB: the report
of `tfswa-lab memory report`, with and without its page. The peer is facebookresearch/mosaic, which
is in no registry: give the folder of a clone and a Python with its dependencies (omegaconf, altair,
pandas, click). Its peak report and its profile by category run on the same files; what fails is
recorded with its error. Without a clone, the result says "not measured".
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from record import record, table
from synthetic_snapshot import write_synthetic

ENTRIES = (90_000, 6_200_000)  # of a file of 18 MB, and of one of 1.2 GB
# Runs a command, then prints its seconds and the most memory that it had.
MEASURED = """
import json, re, sys, time
began = time.perf_counter()
error = ""
try:
    exec(sys.argv[1])
except BaseException as failed:
    if not (isinstance(failed, SystemExit) and not failed.code):
        error = f"{type(failed).__name__}: {failed}"
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 2**20
seconds = time.perf_counter() - began
print(json.dumps({"seconds": round(seconds, 1), "GiB": round(peak, 2), "error": error[:90]}))
"""
OURS = "sys.argv = ['tfswa-lab', 'memory', 'report', {file!r}{more}]\n"
OURS += "from tfswa_lab.cli import app; app()"
MOSAIC = {
    "mosaic: peak": "from mosaic.cmd.entry_point import get_memory_usage_peak as peak\n"
    "peak({file!r}, '', '', 'alloc', False, True, False)",
    "mosaic: profile by category": "from mosaic.cmd.entry_point import get_memory_profile\n"
    "get_memory_profile({file!r}, {page!r}, 'categories', sampling_rate=100)",
}


def measured(python: str, code: str, **environment: str) -> dict:
    """Seconds, most memory and the error of some code in a process of its own."""
    done = subprocess.run(
        [python, "-c", MEASURED, code],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    if done.returncode:  # such as -9: the system ended it, because memory ran out
        return {"seconds": None, "GiB": None, "error": f"ended with {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def on_file(file: Path, mosaic: Path | None, python: str) -> dict[str, dict]:
    """All ways to read a file."""
    page = str(file.with_suffix(".html"))
    more = f", '--html', {page!r}, '--by', 'category'"
    ways = {
        "report": measured(sys.executable, OURS.format(file=str(file), more="")),
        "report and page": measured(sys.executable, OURS.format(file=str(file), more=more)),
    }
    ways["report and page"]["page MiB"] = round(Path(page).stat().st_size / 2**20, 2)
    for name, code in MOSAIC.items() if mosaic else ():
        code = code.format(file=str(file), page=page)
        ways[name] = measured(python, code, PYTHONPATH=str(mosaic))
    return ways


def commit_of(folder: Path) -> str:
    """The commit of a clone."""
    asked = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    done = subprocess.run(asked, capture_output=True, text=True)
    return done.stdout.strip() or "unknown: not a clone"


def main() -> None:
    """Write the files, read them, record, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mosaic", type=Path, help="folder of a clone")
    parser.add_argument("--mosaic-python", default=sys.executable)
    parser.add_argument("--mosaic-commit", help="where the folder is no clone")
    parser.add_argument("--entries", type=int, nargs="+", default=ENTRIES)
    given = parser.parse_args()
    result, rows = {"mosaic": "not measured"}, []
    if given.mosaic:
        result["mosaic"] = given.mosaic_commit or commit_of(given.mosaic)
    for entries in given.entries:
        with tempfile.TemporaryDirectory() as folder:
            file = write_synthetic(Path(folder) / "snapshot.pickle", entries)
            size = round(file.stat().st_size / 1e6)
            found = on_file(file, given.mosaic, given.mosaic_python)
        result[f"{size} MB"] = {"entries": entries} | found
        for name, one in found.items():
            rows.append((f"{size} MB", name, one["seconds"], one["GiB"], one["error"]))
            print(*rows[-1], flush=True)
    record("snapshots", "cpu", result)
    print(table(["file", "way", "seconds", "GiB", "error"], rows))


if __name__ == "__main__":
    main()
