"""What a terminal shows of a run: how far, how good, how fast, how much memory.

Notebook: 07_training
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm

from tfswa_lab.memory import gauges
from tfswa_lab.memory.sizes import MIB


def memory_mib(device: torch.device) -> dict[str, float]:
    """Memory in MiB by kind: what torch allocated and reserved on a card, else the process's RSS.

    >>> list(memory_mib(torch.device("cpu")))
    ['process_rss']
    """
    if device.type != "cuda":
        return {"process_rss": gauges.process_rss() / MIB}
    return {
        "allocated": gauges.allocated(device) / MIB,
        "reserved": gauges.reserved(device) / MIB,
    }


def progress_bar(step: int, total: int, shown: bool) -> tqdm:
    """A bar from `step` on; where it is not shown, it costs nothing."""
    return tqdm(initial=step, total=total, unit="it", disable=not shown, dynamic_ncols=True)


def advance(bar: tqdm, scalars: dict[str, float], device: torch.device) -> None:
    """One step more, with loss, learning rate and memory beside the speed."""
    if not bar.disable:
        memory = " ".join(f"{name} {mib:.0f} MiB" for name, mib in memory_mib(device).items())
        note = f"loss {scalars['loss']:.4g} lr {scalars['lr']:.2g} {memory}"
        bar.set_postfix_str(note, refresh=False)
    bar.update()


class Pace:
    """How fast steps are made, and how much of the time they wait for data."""

    def __init__(self):
        self._begin()

    def _begin(self) -> None:
        self.waited = 0.0
        self.steps = 0
        self.since = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what fetches the data of one step."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Steps per second and the share of waiting since the last reading."""
        seconds = time.perf_counter() - self.since
        scalars = {"steps_per_second": self.steps / seconds, "data_share": self.waited / seconds}
        self._begin()
        return scalars
