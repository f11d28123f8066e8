"""CUDA memory snapshots: recorded, dumped, read safely, and asked what they mean.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from tfswa_lab.memory.snapshot.emit import SEPARATOR
from tfswa_lab.memory.snapshot.history import (
    Lives,
    OverTime,
    lives_of,
    over_time,
    reserved_at,
    without,
)
from tfswa_lab.memory.snapshot.pickles import (
    LARGEST,
    SnapshotError,
    no_garbage_collection,
    read_plain,
)
from tfswa_lab.memory.snapshot.recording import dump, dump_on_oom, record
from tfswa_lab.memory.snapshot.report import (
    Change,
    Fragmentation,
    Holder,
    OutOfMemoryReport,
    changes,
    fragmentation,
    holders,
)
from tfswa_lab.memory.snapshot.schema import Contents, Segment, Trace, understand
from tfswa_lab.memory.trace.stacks import user_line
from tfswa_lab.memory.trace.timeline import Block, Timeline

__all__ = ["Snapshot", "SnapshotError", "diff", "dump", "dump_on_oom", "read", "record"]

BYTES_EACH = 8  # of a file, at least, for every block and entry


def read(
    source: str | Path | dict | list, last: int | None = None, largest: int = LARGEST
) -> Snapshot:
    """Read a snapshot of any torch, from a stranger too: nothing in a file is executed.

    Args:
        source: a file, or what `torch.cuda.memory._snapshot()` returned.
        last: keep only so many of the newest entries of each device; what they start from is
            known from the end all the same. For files too long to draw.
        largest: bytes that the file may have. Reading takes about six times as much memory, and
            leaves a tenth of it.

    Raises:
        FileNotFoundError: there is no such file.
        SnapshotError: it is damaged, hostile, no snapshot, or too large; a ValueError.
    """
    if last is not None and last < 1:
        raise ValueError(f"last={last} entries; keep at least 1, or None for all")
    if isinstance(source, dict | list):
        return Snapshot(understand(source, last))
    path = Path(source)
    with no_garbage_collection():
        raw = read_plain(path, largest)
        try:
            return Snapshot(understand(raw, last, path.stat().st_size // BYTES_EACH))
        except SnapshotError as error:
            raise SnapshotError(f"{path}: {error}") from None


@dataclass(eq=False)
class Snapshot:
    """One or several devices' memory, and the history that led to it.

    Every method takes `device`, a number; it may be left out where only one device has anything.

    Args:
        contents: as they were understood.
    """

    contents: Contents

    def __post_init__(self):
        self._lives: dict[int, Lives] = {}

    @property
    def notes(self) -> list[str]:
        """What a reader should know: entries left out, things that were not understood."""
        return self.contents.notes

    @property
    def devices(self) -> list[int]:
        """Those that have segments or entries."""
        return sorted({s.device for s in self.contents.segments} | self.contents.traces.keys())

    def segments(self, device: int | None = None) -> list[Segment]:
        """Memory that the allocator has from the device."""
        device = self._one(device)
        return [segment for segment in self.contents.segments if segment.device == device]

    def trace(self, device: int | None = None) -> Trace:
        """The history, as columns."""
        nothing = Trace(*np.zeros((7, 0), np.int64))
        return self.contents.traces.get(self._one(device), nothing)

    def lives(self, device: int | None = None) -> Lives:
        """Every allocation that the snapshot knows of, with its birth and its death."""
        device = self._one(device)
        if device not in self._lives:
            lives, unrecorded = lives_of(self.trace(device), self.segments(device))
            self._lives[device] = lives
            if unrecorded:
                self.notes.append(f"device {device}: {unrecorded} releases were not recorded")
        return self._lives[device]

    def over_time(self, device: int | None = None) -> OverTime:
        """Bytes allocated, active and reserved, after each entry of the history."""
        return over_time(self.trace(device), self.segments(device), self.lives(device))

    def fragmentation(self, device: int | None = None) -> Fragmentation:
        """How the reserved memory is used at the end."""
        return fragmentation(self.segments(device))

    def holders(self, event: int | None = None, device: int | None = None) -> list[Holder]:
        """Who holds memory, by the innermost line that is not torch's, largest first.

        Args:
            event: right after which entry, counted from 1; the end if left out.
        """
        event = len(self.trace(device)) if event is None else event
        return holders(self.lives(device), event, self.lines)

    def oom_report(self, device: int | None = None) -> OutOfMemoryReport:
        """What was asked for at the last out-of-memory, what there was, what would have fitted.

        Raises:
            ValueError: the history has none.
        """
        trace, lives = self.trace(device), self.lives(device)
        failures = np.flatnonzero(trace.where("oom"))
        if not len(failures):
            raise ValueError("the history has no oom entry; dump on the failure: dump_on_oom")
        entry = int(failures[-1])
        event = entry + 1
        alive = lives.alive(event)
        address, size = lives.address[alive], lives.size[alive]
        taken = list(zip(address.tolist(), (address + size).tolist(), strict=True))
        ranges = reserved_at(event, trace, self.segments(device))
        gaps = without(ranges, taken)
        return OutOfMemoryReport(
            event,
            requested=int(trace.size[entry]),
            allocated=int(size.sum()),
            reserved=sum(stop - start for start, stop in ranges),
            largest_free=max((stop - start for start, stop in gaps), default=0),
            device_free=int(trace.device_free[entry]),
            holders=self.holders(event, device),
        )

    def timeline(self, device: int | None = None) -> Timeline:
        """The history as blocks, for all that draws and counts the timeline of a trace.

        Categories and modules are in snapshots that `emit` wrote; elsewhere they are `unknown`
        and empty. What `user_metadata` says otherwise becomes the module.
        """
        lives, end = self.lives(device), len(self.trace(device))
        names = ("requested", "size", "born", "died", "stack", "text")
        columns = (getattr(lives, name).tolist() for name in names)
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
        event = len(self.trace(device)) if event is None else event
        lives = self.lives(device)
        alive = lives.alive(event)
        held = Counter()
        for text, size in zip(lives.text[alive].tolist(), lives.size[alive].tolist(), strict=True):
            held[self.contents.texts[text]] += size
        return held

    @cached_property
    def lines(self) -> list[str]:
        """The user's line of each stack."""
        return [user_line(stack) for stack in self.contents.stacks]

    def _one(self, device: int | None) -> int:
        if device is not None:
            return device
        if len(self.devices) > 1:
            raise ValueError(f"the snapshot has devices {self.devices}; say which one: device=")
        return self.devices[0] if self.devices else 0


def diff(before: Snapshot, after: Snapshot, device: int | None = None) -> list[Change]:
    """What grew and shrank between two snapshots, by the line that allocated it."""
    return changes(before.holders(device=device), after.holders(device=device))
