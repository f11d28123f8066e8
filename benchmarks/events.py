"""Results as lines of JSON, each written to the disk at once.

`gpu.py` names the file in the environment; without one, `emit` only returns what it was given, so
benchmarks can be run by hand. `gpu_report.py` turns lines into results and tables.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

FILE = "TFSWA_LAB_EVENTS"  # variables of the environment: the file of the lines,
MACHINE = "TFSWA_LAB_MACHINE"  # the description of the machine in every line,
REHEARSED = "TFSWA_LAB_REHEARSAL"  # and whether sizes are tiny, because there is no GPU

REHEARSAL = REHEARSED in os.environ


def emit(kind: str, **facts) -> dict:
    """Write a line, whole and synced to the disk, and return it.

    Args:
        kind: of measurement, such as `prediction`.
        facts: the measurement, in JSON's types.
    """
    line = {"kind": kind, "at": time.time(), **machine(), **facts}
    if FILE in os.environ:
        append(Path(os.environ[FILE]), line)
    return line


def attempt(kind: str, measure: Callable[[], dict], **facts) -> dict:
    """Emit and print the result of `measure()`, or why there is none; the next row can be tried.

    Running out of memory is a result. Every other exception is a line of kind `failed`.

    Args:
        kind: of measurement.
        measure: returns the measurement.
        facts: the choices of this measurement; part of the line in any case.
    """
    try:
        facts |= measure()
    except Exception as error:
        from tfswa_lab.memory.out_of_memory import is_out_of_memory  # gpu.py has no torch yet

        if is_out_of_memory(error):
            facts["out_of_memory"] = str(error).splitlines()[0]
        else:
            kind, facts = "failed", {"of": kind, **facts, "traceback": traceback.format_exc()}
    print(kind, *(f"{name}={value}" for name, value in facts.items()), flush=True)
    return emit(kind, **facts)


def machine() -> dict:
    """GPU, driver, torch and cuDNN, as `gpu.py` found them."""
    return json.loads(os.environ.get(MACHINE, "{}"))


def append(path: Path, line: dict) -> None:
    """Add a line to a file, in one piece, after repairing a last line that was cut."""
    data = json.dumps(line).encode() + b"\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            data = data if file.read() == b"\n" else b"\n" + data
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read(paths: Iterable[Path]) -> tuple[list[dict], int]:
    """All whole lines of some files, and how many were cut."""
    lines, cut = [], 0
    for path in paths:
        for text in Path(path).read_text(errors="replace").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                cut += bool(text.strip())
    return lines, cut
