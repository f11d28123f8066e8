"""One measurement in a process of its own: nothing is warm, and the peak of memory is its alone.

A script ends with `apart.start(main, measure)`. Its `main` calls `apart.run(__file__, **job)`,
which starts the script again for `measure(**job)` and returns what that returned.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ONE = "--one"  # what a script is started with for one measurement


def start(main: Callable[[], None], measure: Callable[..., dict]) -> None:
    """Run a benchmark or, where `run` started the process, its one measurement."""
    if sys.argv[1:2] != [ONE]:
        return main()
    print(json.dumps(measure(**json.loads(sys.argv[2]))))


def run(script: str, threads: int | None = None, **job) -> dict:
    """What `measure(**job)` of a script returns, with so many threads, or as many as usual."""
    number = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    done = subprocess.run(
        [sys.executable, script, ONE, json.dumps(job)],
        env=os.environ | (number if threads else {}),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def peak_gib() -> float:
    """Most memory that this process has held so far, to two decimals.

    Not getrusage's ru_maxrss: a process inherits that from the one that started it.
    """
    status = Path("/proc/self/status").read_text()
    return round(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20, 2)
