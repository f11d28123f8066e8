"""Jobs in processes of their own: each has a limit, its output streams, and nothing outlives it.

A job is known by a variable of the environment, which all that it starts inherits. So children that
moved to another session, or whose parent is gone, are found as well.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from events import FILE, emit

CHECKOUT = Path(__file__).resolve().parents[1]
NAME = "TFSWA_LAB_JOB"
KEPT_LINES = 60  # of the output of a job that failed, in its event


@dataclass(frozen=True)
class Job:
    """A command and its limit of time.

    Args:
        name: of the job.
        seconds: until it is ended.
        command: arguments of Python: a script and its own.
        alone: whether the training in the background rests meanwhile, because time is measured.
        python_path: its PYTHONPATH, if it is another than this process's.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    alone: bool = True
    python_path: str | None = None

    @property
    def known_by(self) -> str:
        """The mark in the environment of its processes."""
        return f"{CHECKOUT}: {self.name}"


class Session:
    """Runs jobs one after the other, or several at once from threads.

    Args:
        out: folder of the events and of the log.
        deadline: of `time.monotonic` for everything; None for none, on a machine of one's own.
        resting: a job in the background that stands still while times are measured.

    Attributes:
        good: whether all jobs have ended well so far.
    """

    PATIENCE = 10  # limits are so many times longer where there is no deadline

    def __init__(self, out: Path, deadline: float | None, resting: Job):
        out.mkdir(parents=True, exist_ok=True)
        os.environ[FILE] = str(out / "events.jsonl")
        self.deadline, self.patience = (deadline, 1) if deadline else (math.inf, self.PATIENCE)
        self.resting, self.good = resting, True
        self._file = (out / "log.txt").open("a", buffering=1, errors="replace")
        self._lock = threading.Lock()

    def log(self, line: str) -> None:
        """Write a line to the log and to the terminal now."""
        with self._lock:
            self._file.write(f"{line}\n")
            print(line, flush=True)

    def run(self, job: Job) -> str:
        """Run a job until it ends, or until its limit or the deadline; emit how it went.

        Returns:
            How it ended: `exit 0` if well.
        """
        limit = min(self.patience * job.seconds, self.deadline - time.monotonic())
        with stopped(self.resting) if job.alone else nullcontext():
            began, (ended, output) = time.monotonic(), self._until(job, limit)
        good = ended == "exit 0"
        facts = {"name": job.name, "seconds": round(time.monotonic() - began, 2), "ended": ended}
        emit("job", **facts, ok=good, limit=job.seconds, last=output[-1] if output else "")
        if not good:
            emit("failed", of="job", **facts, output="\n".join(output))
            self.good = False
        self.log(f"== {job.name}: {ended}, {facts['seconds']:.1f} s")
        return ended

    def _until(self, job: Job, limit: float) -> tuple[str, deque[str]]:
        output: deque[str] = deque(maxlen=KEPT_LINES)
        if limit < 1:
            return "no time was left", output
        self.log(f"== {job.name}, at most {limit:.0f} s")
        process = start(job, subprocess.PIPE)
        pump = threading.Thread(target=self._pump, args=(job, process, output), daemon=True)
        pump.start()
        try:
            ended = f"exit {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            ended = f"not finished after {limit:.0f} s"
        finally:
            end(job)  # and what it left behind
        pump.join(5)
        return ended, output

    def _pump(self, job: Job, process: subprocess.Popen, output: deque[str]) -> None:
        for line in map(str.rstrip, process.stdout):
            self.log(f"[{job.name}] {line}")
            if line:
                output.append(line)


def start(job: Job, output: int | object) -> subprocess.Popen:
    """Start a job in a session of its own."""
    variables = {NAME: job.known_by, "PYTHONUNBUFFERED": "1"}
    if job.python_path is not None:
        variables["PYTHONPATH"] = job.python_path
    return subprocess.Popen(
        (sys.executable, *job.command),
        cwd=CHECKOUT,
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def start_in_background(job: Job, output: Path) -> None:
    """Start a job that goes on when this process has ended."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w") as file:
        start(job, file)


def members(known_by: str) -> list[psutil.Process]:
    """All processes, but this one, whose job is known by something that begins like this."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(NAME, "").startswith(known_by) and process.pid != os.getpid():
                found.append(process)
    return found


def end(job: Job, seconds: float = 0) -> None:
    """Ask all processes of a job to end, if they are given time for it, and kill those left."""
    if seconds and (some := members(job.known_by)):
        for number in (signal.SIGCONT, signal.SIGTERM):
            _signal(some, number)
        psutil.wait_procs(some, timeout=seconds)
    _kill(job.known_by)


def end_left_over(spared: Job) -> None:
    """Kill what an earlier run, killed itself, left behind in this checkout; one job continues."""
    spare = members(spared.known_by)
    _signal(spare, signal.SIGCONT)
    _kill(f"{CHECKOUT}: ", {process.pid for process in spare})


def _kill(known_by: str, spare: frozenset[int] | set[int] = frozenset()) -> None:
    """Kill processes, and those that they start meanwhile."""
    while left := [process for process in members(known_by) if process.pid not in spare]:
        _signal(left, signal.SIGKILL)
        psutil.wait_procs(left, timeout=1)


@contextmanager
def stopped(job: Job) -> Iterator[None]:
    """The job stands still meanwhile."""
    _signal(members(job.known_by), signal.SIGSTOP)
    try:
        yield
    finally:
        _signal(members(job.known_by), signal.SIGCONT)


def _signal(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(number)
