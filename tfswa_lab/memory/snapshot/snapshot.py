"""CUDA memory snapshots: read safely, and what they say.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from tfswa_lab.memory.snapshot.emit import SEPARATOR
from tfswa_lab.memory.snapshot.history import (
    Allocations,
    OverTime,
    allocations_of,
    over_time,
    reserved_at,
    subtract,
)
from tfswa_lab.memory.snapshot.pickles import (
    LARGEST,
    SnapshotError,
    no_garbage_collection,
    read_plain,
)
from tfswa_lab.memory.snapshot.report import (
    AllocationSite,
    Change,
    Fragmentation,
    OutOfMemoryReport,
    allocation_sites,
    changes,
    fragmentation,
)
from tfswa_lab.memory.snapshot.schema import Contents, History, Segment, parse
from tfswa_lab.memory.trace.stacks import Frame, user_frame
from tfswa_lab.memory.trace.timeline import Block, Timeline

NOWHERE = "(no stack was recorded)"
NOBODY = "(no line outside of torch: its own threads, such as the backward pass)"
BYTES_EACH = 8  # the least that a block or an entry takes in a file


def read(
    source: str | Path | dict | list, last: int | None = None, largest: int = LARGEST
) -> Snapshot:
    """Read a snapshot that any version of torch wrote; nothing in a file is executed.

    Args:
        source: a file, or what `torch.cuda.memory._snapshot()` returned.
        last: how many of the newest entries of each device to keep, for files that are too long to
            draw; None for all. The memory at the first of them is known all the same, from the end.
        largest: the most bytes that the file may have. Reading takes about six times as much
            memory, and the result a tenth of that.

    Raises:
        FileNotFoundError: there is no such file.
        SnapshotError: it is damaged, hostile, not a snapshot, or too large; a ValueError.
    """
    if last is not None and last < 1:
        raise ValueError(f"last={last} entries; keep at least 1, or None for all")
    if isinstance(source, dict | list):
        return Snapshot(parse(source, last))
    path = Path(source)
    with no_garbage_collection():
        raw = read_plain(path, largest)
        try:
            return Snapshot(parse(raw, last, path.stat().st_size // BYTES_EACH))
        except SnapshotError as error:
            raise SnapshotError(f"{path}: {error}") from None


@dataclass(eq=False)
class Snapshot:
    """The memory of one or several devices, and the history that led to it.

    Every method takes `device`, a number; it may be left out if the snapshot has only one device.

    Args:
        contents: of the snapshot.
    """

    contents: Contents

    def __post_init__(self):
        self._allocations: dict[int, Allocations] = {}

    @property
    def notes(self) -> list[str]:
        """Entries that were left out, values that were not understood."""
        return self.contents.notes

    @property
    def devices(self) -> list[int]:
        """The devices that have segments or entries."""
        return sorted({s.device for s in self.contents.segments} | self.contents.histories.keys())

    def segments(self, device: int | None = None) -> list[Segment]:
        """Memory that the allocator has taken from the device."""
        device = self._one(device)
        return [segment for segment in self.contents.segments if segment.device == device]

    def history(self, device: int | None = None) -> History:
        """The history, as columns."""
        nothing = History(*np.zeros((7, 0), np.int64))
        return self.contents.histories.get(self._one(device), nothing)

    def allocations(self, device: int | None = None) -> Allocations:
        """Every allocation that the snapshot records, with its birth and its death."""
        device = self._one(device)
        if device not in self._allocations:
            allocations, unrecorded = allocations_of(self.history(device), self.segments(device))
            self._allocations[device] = allocations
            if unrecorded:
                self.notes.append(f"device {device}: {unrecorded} releases were not recorded")
        return self._allocations[device]

    def over_time(self, device: int | None = None) -> OverTime:
        """Bytes allocated, active and reserved, after each entry of the history."""
        return over_time(self.history(device), self.segments(device), self.allocations(device))

    def fragmentation(self, device: int | None = None) -> Fragmentation:
        """How the reserved memory is used at the end."""
        return fragmentation(self.segments(device))

    def allocation_sites(
        self, event: int | None = None, device: int | None = None
    ) -> list[AllocationSite]:
        """The user's lines that allocated the memory in use, largest first.

        Args:
            event: right after this entry, counted from 1; None for the end.
        """
        event = len(self.history(device)) if event is None else event
        return allocation_sites(self.allocations(device), event, self.lines)

    def oom_report(self, device: int | None = None) -> OutOfMemoryReport:
        """The last out-of-memory: the request, the memory in use, and what would have fitted.

        Raises:
            ValueError: the history has no such failure.
        """
        history, allocations = self.history(device), self.allocations(device)
        failures = np.flatnonzero(history.where("oom"))
        if not len(failures):
            raise ValueError("the history has no oom entry; dump at the failure with dump_on_oom")
        entry = int(failures[-1])
        event = entry + 1
        alive = allocations.alive(event)
        address, size = allocations.address[alive], allocations.size[alive]
        taken = list(zip(address.tolist(), (address + size).tolist(), strict=True))
        ranges = reserved_at(event, history, self.segments(device))
        gaps = subtract(ranges, taken)
        return OutOfMemoryReport(
            event,
            requested=int(history.size[entry]),
            allocated=int(size.sum()),
            reserved=sum(stop - start for start, stop in ranges),
            largest_free=max((stop - start for start, stop in gaps), default=0),
            device_free=int(history.device_free[entry]),
            allocation_sites=self.allocation_sites(event, device),
        )

    def timeline(self, device: int | None = None) -> Timeline:
        """The history as blocks, for the plots and tables of a trace.

        A snapshot written by `emit` has categories and modules. In any other, the category is
        `unknown` and the module is the text of `user_metadata`.
        """
        allocations, end = self.allocations(device), len(self.history(device))
        names = ("requested", "size", "born", "died", "stack", "text")
        columns = (getattr(allocations, name).tolist() for name in names)
        blocks = []
        for requested, size, born, died, stack, text in zip(*columns, strict=True):
            category, separator, module = self.contents.texts[text].partition(SEPARATOR)
            about = (category, module) if separator else ("unknown", category)
            death = died if died <= end else None
            block = Block(requested, size, born, death, *about)
            block.frames = self.contents.stacks[stack]
            blocks.append(block)
        return Timeline(blocks, end, device=f"cuda:{self._one(device)}")

    def metadata(self, event: int | None = None, device: int | None = None) -> Counter[str]:
        """Bytes alive right after an event (or at the end) by `user_metadata`."""
        event = len(self.history(device)) if event is None else event
        allocations = self.allocations(device)
        alive = allocations.alive(event)
        numbers, texts = allocations.text[alive], self.contents.texts
        held = np.zeros(len(texts), np.int64)
        np.add.at(held, numbers, allocations.size[alive])
        return Counter({texts[number]: int(held[number]) for number in np.unique(numbers)})

    @cached_property
    def lines(self) -> list[str]:
        """The user's line of each stack."""
        return [site_of(stack) for stack in self.contents.stacks]

    def _one(self, device: int | None) -> int:
        if device is not None:
            return device
        if len(self.devices) > 1:
            raise ValueError(f"the snapshot has devices {self.devices}; choose one with device=")
        return self.devices[0] if self.devices else 0


def site_of(stack: Sequence[Frame]) -> str:
    """The user's line of a stack, or why there is none."""
    if frame := user_frame(stack):
        return str(frame)
    return NOBODY if stack else NOWHERE


def diff(before: Snapshot, after: Snapshot, device: int | None = None) -> list[Change]:
    """What grew and shrank between two snapshots, by the line that allocated it."""
    return changes(before.allocation_sites(device=device), after.allocation_sites(device=device))
