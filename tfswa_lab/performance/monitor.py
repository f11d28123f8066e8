"""Memory, use and speed over time: as a widget in notebooks, and as lines in a file.

Notebook: 09_running_lean
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from tfswa_lab.memory.gauges import Status, status
from tfswa_lab.memory.sizes import format_bytes
from tfswa_lab.performance.timing import real_time_factor

if TYPE_CHECKING:
    from tfswa_lab.training.trainer import Trainer


@dataclass(frozen=True)
class Reading:
    """All gauges at one time; None is what this machine cannot tell, or not yet.

    Args:
        seconds: of a clock that never goes back; only differences have a meaning.
        status: bytes in use.
        cpu_percent: time that all cores of the machine were busy since the last reading, of 100.
        gpu_percent: time that a kernel ran in the last moment, of 100, as NVML says.
        items_per_second: counted since the last reading.
        real_time_factor: seconds of audio per second since the last reading.
    """

    seconds: float
    status: Status
    cpu_percent: float | None = None
    gpu_percent: float | None = None
    items_per_second: float | None = None
    real_time_factor: float | None = None

    def __str__(self) -> str:
        speeds = (
            (self.cpu_percent, "CPU {:.0f} %"),
            (self.gpu_percent, "GPU {:.0f} %"),
            (self.items_per_second, "{:.3g} items/s"),
            (self.real_time_factor, "{:.3g} s of audio per s"),
        )
        told = [words.format(value) for value, words in speeds if value is not None]
        return " · ".join([str(self.status), *told])


class Monitor:
    """Reads the gauges from time to time, draws them in a notebook, and writes them to a file.

    It is its own callback for `Trainer`, which starts it, tells it each step, and stops it.

    Args:
        interval_seconds: between two readings.
        device: as for `status`.
        keep: how many readings to show.
        log: a file that gets a line of JSON for each reading, after those that it has already. Each
            line is written at once and whole, so those of a killed process are there.
        shown: whether there is a widget; without one, ipywidgets is not needed.

    Raises:
        ModuleNotFoundError: ipywidgets is not installed.
        ValueError: the device does not exist, or the interval is not above 0 or not finite.
        OSError: the file cannot be written.
    """

    def __init__(
        self,
        interval_seconds: float = 1.0,
        device: torch.device | str | int | None = None,
        keep: int = 300,
        log: str | Path | None = None,
        shown: bool = True,
    ):
        if not 0 < interval_seconds <= threading.TIMEOUT_MAX:
            raise ValueError(f"interval_seconds={interval_seconds}; it must be above 0 and finite")
        self.interval_seconds, self.device = interval_seconds, device
        self.readings: deque[Reading] = deque(maxlen=keep)
        self.log = None if log is None else Path(log)
        self.widget = _html_widget() if shown else None
        self._stop, self._thread = threading.Event(), None
        self._lock = threading.Lock()  # counts come from another thread
        self._items, self._audio_seconds, self._busy = 0, 0.0, None
        self.update()

    def start(self) -> Monitor:
        """Start reading, in a thread that ends with `stop` or with the process."""
        if self._thread is None:
            self._stop.clear()
            self.update()  # what was before is no part of the first reading
            self._thread = threading.Thread(target=self._run, name="memory monitor", daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        """Read a last time and stop; the drawing stays."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self.update()

    def count(self, items: int, audio_seconds: float = 0.0) -> None:
        """Tell it what was done: items, and how long all of them together sound."""
        with self._lock:
            self._items += items
            self._audio_seconds += audio_seconds

    def after_step(self, trainer: Trainer, batches: Sequence[Mapping[str, Any]]) -> None:
        """Count what a process has trained on in one step; `Trainer` calls it.

        Args:
            trainer: whose separator knows the sample rate.
            batches: `mixture` is `(b, c, s)`.
        """
        rate = trainer.separator.sample_rate
        shapes = [batch["mixture"].shape for batch in batches]
        self.count(sum(b for b, _, _ in shapes), sum(b * s for b, _, s in shapes) / rate)

    def update(self) -> None:
        """Read once, update the drawing, and write a line."""
        reading = self._read()
        self.readings.append(reading)
        if self.widget is not None:
            self.widget.value = _picture(list(self.readings))
        if self.log is not None:
            append_line(self.log, {"time": time.time()} | asdict(reading))

    def _read(self) -> Reading:
        with self._lock:
            items, audio_seconds = self._items, self._audio_seconds
            self._items, self._audio_seconds = 0, 0.0
        before, self._busy = self._busy, _cpu_seconds()
        now = time.monotonic()
        spent = now - self.readings[-1].seconds if self.readings else 0.0
        return Reading(
            now,
            status(self.device),
            _percent_between(before, self._busy),
            gpu_percent(self.device),
            items / spent if items and spent else None,
            real_time_factor(spent, audio_seconds) if audio_seconds and spent else None,
        )

    def __enter__(self) -> Monitor:
        return self.start()

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget if self.widget is not None else str(self.readings[-1]))

    def _run(self) -> None:
        while not self._stop.wait(self.interval_seconds):
            self.update()


# Gauges of use -----------------------------------------------------------------------------------


def gpu_percent(device: torch.device | str | int | None = None) -> float | None:
    """Of the last moment, the part in which a kernel ran, as NVML measures it, of 100.

    None without CUDA, without the package nvidia-ml-py, or where the driver does not tell.
    """
    if not torch.cuda.is_available():
        return None
    try:
        from pynvml import NVMLError
    except ImportError:
        return None
    try:
        return float(torch.cuda.utilization(device))
    except (NVMLError, ImportError, RuntimeError):
        return None


def _cpu_seconds() -> tuple[float, float]:
    """Seconds since the machine's start that all its cores were busy, and all seconds."""
    times = psutil.cpu_times()
    total = sum(times)
    return total - times.idle - getattr(times, "iowait", 0.0), total


def _percent_between(
    before: tuple[float, float] | None, after: tuple[float, float]
) -> float | None:
    """None at the first reading, and where the clock of the system has not moved since the last."""
    if before is None or after[1] <= before[1]:
        return None
    return 100 * (after[0] - before[0]) / (after[1] - before[1])


# The file ----------------------------------------------------------------------------------------


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Add a line of JSON to a file, in one call of the system.

    If the last line has no end, as after a full disk, a new one is begun.

    Raises:
        OSError: the file cannot be written, or not whole.
    """
    line = json.dumps(values).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.lseek(descriptor, 0, os.SEEK_END):
            os.lseek(descriptor, -1, os.SEEK_END)
            line = line if os.read(descriptor, 1) == b"\n" else b"\n" + line
        if os.write(descriptor, line) < len(line):
            raise OSError(f"{path}: the disk is full; free some space")
    finally:
        os.close(descriptor)


# The widget --------------------------------------------------------------------------------------


def _html_widget() -> object:
    try:
        from ipywidgets import HTML
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the monitor needs ipywidgets: pip install "tfswa-lab[lab]"; '
            "without it, use shown=False and log=FILE, or print(status())"
        ) from error
    return HTML()


# Colours of different lightness that colour-blind readers can tell apart.
_GAUGES = {
    "allocated": "#0072b2",
    "reserved": "#56b4e9",
    "device_used": "#e69f00",
    "host_rss": "#999999",
}


def _picture(readings: list[Reading]) -> str:
    """The last reading as text, and bytes as lines between 0 and the highest reading."""
    began, latest = readings[0].seconds, readings[-1]
    gauges = {
        name: [getattr(reading.status, name) for reading in readings]
        for name in _GAUGES
        if getattr(latest.status, name) is not None
    }
    most = max(max(values) for values in gauges.values())
    span = max(latest.seconds - began, 1e-9)
    lines, names = [], []
    for name, values in gauges.items():
        points = " ".join(
            f"{400 * (reading.seconds - began) / span:.1f},{100 - 100 * value / most:.1f}"
            for reading, value in zip(readings, values, strict=True)
        )
        colour = _GAUGES[name]
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
        names.append(f'<span style="color:{colour}">━ {name.replace("_", " ")}</span>')
    return (
        f"<div>{latest}</div>"
        f'<svg viewBox="0 -2 400 104" width="400" height="104">{"".join(lines)}</svg>'
        f"<div>{' '.join(names)} · 0 to {format_bytes(most)}, the last {span:.0f} s</div>"
    )
