"""`%memory`, `%memory who` and `%%memory` in a notebook, after `%load_ext tfswa_lab.memory`.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class
from IPython.display import display

from tfswa_lab.memory.display import Shown, page
from tfswa_lab.memory.gauges import process_rss, status
from tfswa_lab.memory.leaks.referrers import of_types
from tfswa_lab.memory.sizes import format_bytes
from tfswa_lab.memory.trace.timeline import Block, Peak, Timeline, by_line, top
from tfswa_lab.memory.trace.trace import trace
from tfswa_lab.memory.trace.tracer import has_storage
from tfswa_lab.memory.who.names import forget_error
from tfswa_lab.memory.who.who import who

LINES = 6  # of each table
PLAIN = (torch.Tensor, torch.nn.Parameter)  # others may run code of their own
PROBES = 200  # operators that are timed with and without a trace
OLDER = "there before"  # a category, and a line
CELL = re.compile(r"\S*ipykernel_\d+/\d+\.py|<ipython-input-[^>]*>")  # files of cells


def load_ipython_extension(shell: Any) -> None:
    """What `%load_ext tfswa_lab.memory` calls."""
    shell.register_magics(MemoryMagics)


@magics_class
class MemoryMagics(Magics):
    """The magic commands."""

    @line_cell_magic
    def memory(self, line: str, cell: str | None = None) -> Any:
        """Memory now, what holds it, or what a cell does with it.

        `%memory` reads all gauges. `%memory who` names what holds the memory of tensors, and the
        line that frees it; `%memory forget` frees the variables that the last error keeps. A cell
        that begins with `%%memory` shows its peak and what stays.
        """
        if cell is not None:
            return self._measure(line, cell)
        commands = {"": status, "who": partial(who, self.shell), "forget": forget_error}
        if line.strip() not in commands:
            known = "%memory, %memory who, %memory forget or %%memory"
            raise UsageError(f"%memory {line.strip()}: use {known}")
        return commands[line.strip()]()

    def _measure(self, line: str, cell: str) -> None:
        if line.strip():
            raise UsageError(f"%%memory {line.strip()}: it takes no words, only a cell")
        transformed = self.shell.transform_cell(cell)
        if self.shell.should_run_async(cell, transformed_cell=transformed):
            raise UsageError("%%memory cannot run a cell with `await`; measure a function without")
        results = []
        measured = cell_memory(lambda: results.append(self.shell.run_cell(cell)))
        if results[0].error_before_exec is None:
            display(measured)


@dataclass(frozen=True, repr=False)
class CellMemory(Shown):
    """What a cell did with the memory of one device.

    Args:
        peak: when tensors held the most, and who did.
        before: bytes of the tensors that were there before.
        lines: bytes at the peak, by line.
        stays: bytes of what the cell made and left, by line.
        host: bytes by which the process grew in the host's memory.
        seconds: that the cell took, with the trace.
        overhead: seconds that the trace adds to an operator, measured on small ones.
    """

    peak: Peak
    before: int
    lines: dict[str, int]
    stays: dict[str, int]
    host: int
    seconds: float
    overhead: float

    @property
    def brief(self) -> str:
        """The peak, and what stays."""
        sizes = self.peak.allocated, sum(self.stays.values()), self.before
        peak, left, before = map(format_bytes, sizes)
        return f"{self.peak.timeline.device}: peak {peak}; {left} stay, {before} were there before"

    @property
    def tables(self) -> dict[str, dict[str, int]]:
        """Bytes by name, by title."""
        return {
            "at the peak, by category": self.peak.by_category(),
            "at the peak, by line": dict(top(Counter(self.lines), LINES)),
            "stays, by line": dict(top(Counter(self.stays), LINES)),
        }

    @property
    def cost(self) -> str:
        """Time, and what the trace adds to it."""
        return (
            f"{self.seconds:.2f} s with the trace, which adds about {self.overhead * 1e6:.0f} µs "
            f"to an operator; the process grew by {format_bytes(self.host)}"
        )

    def __str__(self) -> str:
        lines = [self.brief]
        for title, sizes in self.tables.items():
            rows = [f"{format_bytes(size):>12}  {name}" for name, size in sizes.items()]
            lines += [f"{title}:", *rows] if rows else []
        return "\n".join([*lines, self.cost])

    def _repr_html_(self) -> str:
        return page(self.brief, self.tables, {"time, and the host": [self.cost]})


def cell_memory(run: Callable[[], Any]) -> CellMemory:
    """Run a cell under a trace, and tell what it did with memory.

    The device is a GPU if the cell, or what was there before, uses one.
    """
    overhead, before = _overhead(), process_rss()
    known = (each for each in of_types((torch.Tensor,)) if type(each) in PLAIN)
    older = [tensor for tensor in known if has_storage(tensor)]
    with trace(inputs=older) as seen:
        del older
        seen.step()
        began = time.perf_counter()
        run()
        seconds = time.perf_counter() - began
    on_gpu = [device for device in seen.devices if device.startswith("cuda")]
    timeline = seen.timeline((on_gpu or seen.devices or ["cpu"])[0])
    return _measured(timeline, process_rss() - before, seconds, overhead)


def _measured(timeline: Timeline, host: int, seconds: float, overhead: float) -> CellMemory:
    began = timeline.steps[0]
    for block in timeline.blocks:
        if block.born <= began and block.category == "input":
            block.category = OLDER

    def line(block: Block) -> str:
        return OLDER if block.born <= began else CELL.sub("cell", by_line(block))

    peak = timeline.peak(began)
    stays = timeline.held_by(timeline.events, line)
    del stays[OLDER]
    before = sum(block.rounded for block in timeline.alive(began))
    lines = timeline.held_by(peak.event, line)
    return CellMemory(peak, before, lines, stays, host, seconds, overhead)


def _overhead() -> float:
    """Seconds that a trace adds to an operator."""

    def timed() -> float:
        number = torch.zeros(1)
        began = time.perf_counter()
        for _ in range(PROBES):
            number.add(1)
        return time.perf_counter() - began

    alone = timed()
    with trace():
        return max(0.0, timed() - alone) / PROBES
