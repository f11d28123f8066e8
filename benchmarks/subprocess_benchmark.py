"""One measurement in a process of its own: nothing is warm, and its peak memory is its own.

A script ends with `subprocess_benchmark.start(main, measure)`. Its `main` calls
`subprocess_benchmark.run(__file__, **job)`, which starts the script again for `measure(**job)` and
returns the result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

from tfswa_lab.memory import gauges
from tfswa_lab.memory.sizes import GIB

ONE = "--one"  # starts a script for one measurement


def start(main: Callable[[], None], measure: Callable[..., dict]) -> None:
    """Run a benchmark or, where `run` started the process, its one measurement."""
    if sys.argv[1:2] != [ONE]:
        return main()
    print(json.dumps(measure(**json.loads(sys.argv[2]))))


def run(script: str, threads: int | None = None, **job) -> dict:
    """The result of a script's `measure(**job)`, with so many threads, or as many as usual."""
    number = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    done = subprocess.run(
        [sys.executable, script, ONE, json.dumps(job)],
        env=os.environ | (number if threads else {}),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def peak_gib(device: str = "cpu") -> float:
    """Most memory so far, to two decimals: of tensors on a GPU, or of this process."""
    peak = gauges.process_peak() if device == "cpu" else gauges.peak_allocated()
    return round(peak / GIB, 2)
