"""A widget that shows memory over time."""

from __future__ import annotations

import threading
import time
from collections import deque

import torch

from tfswa_lab.memory.gauges import Status, status
from tfswa_lab.memory.sizes import format_bytes


class Monitor:
    """A widget for notebooks that shows `status` over time.

    Args:
        interval_seconds: between two readings.
        device: as for `status`.
        keep: how many readings to show.

    Raises:
        ModuleNotFoundError: ipywidgets is not installed.
        ValueError: the device does not exist, or the interval is not above 0.
    """

    def __init__(
        self,
        interval_seconds: float = 1.0,
        device: torch.device | str | int | None = None,
        keep: int = 300,
    ):
        if not interval_seconds > 0:
            raise ValueError(f"interval_seconds={interval_seconds}; it must be above 0")
        self.interval_seconds, self.device = interval_seconds, device
        self.readings: deque[tuple[float, Status]] = deque(maxlen=keep)
        self.widget = _html_widget()
        self._stop, self._thread = threading.Event(), None
        self.update()

    def start(self) -> Monitor:
        """Start reading, in a thread that ends with `stop` or with the process."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name="memory monitor", daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        """Stop reading; the drawing stays."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def update(self) -> None:
        """Read once and update the drawing."""
        self.readings.append((time.monotonic(), status(self.device)))
        self.widget.value = _picture(list(self.readings))

    def __enter__(self) -> Monitor:
        return self.start()

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)

    def _run(self) -> None:
        while not self._stop.wait(self.interval_seconds):
            self.update()


def _html_widget() -> object:
    try:
        from ipywidgets import HTML
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the monitor needs ipywidgets: pip install "tfswa-lab[lab]"; '
            "without it, print(status()) reads the same gauges"
        ) from error
    return HTML()


# Colours of different lightness that colour-blind readers can tell apart.
_GAUGES = {
    "allocated": "#0072b2",
    "reserved": "#56b4e9",
    "device_used": "#e69f00",
    "host_rss": "#999999",
}


def _picture(readings: list[tuple[float, Status]]) -> str:
    """The last reading as text, and each gauge as a line between 0 and the highest reading."""
    began, latest = readings[0][0], readings[-1][1]
    gauges = {
        name: [getattr(reading, name) for _, reading in readings]
        for name in _GAUGES
        if getattr(latest, name) is not None
    }
    most = max(max(values) for values in gauges.values())
    span = max(readings[-1][0] - began, 1e-9)
    lines, names = [], []
    for name, values in gauges.items():
        points = " ".join(
            f"{400 * (when - began) / span:.1f},{100 - 100 * value / most:.1f}"
            for (when, _), value in zip(readings, values, strict=True)
        )
        colour = _GAUGES[name]
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
        names.append(f'<span style="color:{colour}">━ {name.replace("_", " ")}</span>')
    return (
        f"<div>{latest}</div>"
        f'<svg viewBox="0 -2 400 104" width="400" height="104">{"".join(lines)}</svg>'
        f"<div>{' '.join(names)} · 0 to {format_bytes(most)}, the last {span:.0f} s</div>"
    )
