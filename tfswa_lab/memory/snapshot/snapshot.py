"""CUDA memory snapshots: read safely, and what they say.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tfswa_lab.memory.display import Shown
from tfswa_lab.memory.leaks.referrers import no_garbage_collection
from tfswa_lab.memory.sizes import format_bytes
from tfswa_lab.memory.snapshot.emit import SEPARATOR
from tfswa_lab.memory.snapshot.files import LARGEST, opened
from tfswa_lab.memory.snapshot.groups import groups
from tfswa_lab.memory.snapshot.history import (
    Allocations,
    OverTime,
    allocations_of,
    over_time,
    reserved_at,
    subtract,
)
from tfswa_lab.memory.snapshot.pickles import Reader
from tfswa_lab.memory.snapshot.report import (
    AllocationSite,
    Change,
    Fragmentation,
    OutOfMemoryReport,
    fragmentation,
    sites_of,
)
from tfswa_lab.memory.snapshot.schema import Contents, Entries, History, Segment, parse
from tfswa_lab.memory.snapshot.summary import difference, summary
from tfswa_lab.memory.trace.timeline import Block, Timeline

MOST = 16  # devices in a text
BYTES_EACH = 8  # the least that a block or an entry takes in a file


def read(
    source: str | Path | dict | list, last: int | None = None, largest: int = LARGEST
) -> Snapshot:
    """Read a snapshot that any version of torch wrote; nothing in a file is executed.

    Args:
        source: a file (a pickle, in a gzip file or alone in a zip, too), or what
            `torch.cuda.memory._snapshot()` returned.
        last: how many of the newest entries of each device to keep, for files that are too long to
            draw; None for all. The memory at the first of them is known all the same, from the end.
        largest: the most bytes that the file may have, unpacked. Reading takes 1.3 to 1.5 times as
            much memory, and the history a third (measured with 6 million entries of 190 bytes).

    Raises:
        FileNotFoundError: there is no such file.
        SnapshotError: it is damaged, hostile, not a snapshot, or too large; a ValueError.
    """
    if last is not None and last < 1:
        raise ValueError(f"last={last}; keep at least 1 entry, or leave it out for all")
    if isinstance(source, dict | list):
        return Snapshot(parse(source, last))
    entries = Entries()
    with no_garbage_collection(), opened(source, largest) as program:
        raw = Reader(program, entries.maker).load()
        return Snapshot(parse(raw, last, len(program) // BYTES_EACH, entries))


@dataclass(eq=False, repr=False)
class Snapshot(Shown):
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
        device = self.one_device(device)
        return [segment for segment in self.contents.segments if segment.device == device]

    def history(self, device: int | None = None) -> History:
        """The history, as columns."""
        nothing = History(*np.zeros((8, 0), np.int64))
        return self.contents.histories.get(self.one_device(device), nothing)

    def allocations(self, device: int | None = None) -> Allocations:
        """Every allocation that the snapshot records, with its birth and its death."""
        device = self.one_device(device)
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
        return self.held_by("line", event, device)

    def held_by(
        self,
        by: str,
        event: int | None = None,
        device: int | None = None,
        rules: Mapping[str, str] | None = None,
    ) -> list[AllocationSite]:
        """Who holds the memory in use, largest first.

        Args:
            by: `line` (the user's), `file`, `stack`, `category`, `annotation` (the innermost
                `record_function` range that was open), `compile_context`, `metadata`, or `rule`.
            event: right after this entry, counted from 1; None for the end.
            rules: for `rule`, regular expressions by the name of their group; a stack belongs to
                the first one that is found in a file or function of it.

        Raises:
            ValueError: there is no such grouping, or a rule is no regular expression.
        """
        event = len(self.history(device)) if event is None else event
        found = groups(self, by, device, rules or {})
        return sites_of(found, self.allocations(device), event)

    def event(self, at: str | int, device: int | None = None) -> int:
        """The number of an entry, counted from 1.

        Args:
            at: `peak` (of allocated memory), `end`, `oom` (the last), the number of an entry, or an
                address such as `0x7f00`: when memory was allocated there for the last time.

        Raises:
            ValueError: the history has no such moment.
        """
        history = self.history(device)
        if at == "peak":
            return int(self.over_time(device).allocated.argmax())
        if at == "end":
            return len(history)
        if at == "oom":
            found = np.flatnonzero(history.where("oom"))
        elif str(at).lower().startswith("0x"):
            here = history.address == _address(at)
            found = np.flatnonzero(here & history.where("alloc"))
        else:
            found = np.arange(len(history))[_index(at)]
        if not len(found):
            raise ValueError(
                f"at={at!r}: the history of {len(history):,} entries has no such moment; choose "
                "peak, end, oom, the number of an entry, or an address such as 0x7f00"
            )
        return int(found[-1]) + 1

    summary = summary  # a function of a snapshot is its method

    @property
    def brief(self) -> str:
        """The peak of each device."""
        peaks = {each: int(self.over_time(each).allocated.max()) for each in self.devices[:MOST]}
        parts = (f"cuda:{each}: peak {format_bytes(size)}" for each, size in peaks.items())
        return "; ".join(parts) or "empty"

    def __str__(self) -> str:
        parts = [self.summary(device=each) for each in self.devices[:MOST]]
        if len(parts) > 1:
            return "\n".join(each.brief for each in parts)
        return str(parts[0]) if parts else "no memory and no history"

    def _repr_html_(self) -> str:
        parts = (self.summary(device=each)._repr_html_() for each in self.devices[:MOST])
        return "".join(parts) or "no memory and no history"

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
        return Timeline(blocks, end, device=f"cuda:{self.one_device(device)}")

    @property
    def has_categories(self) -> bool:
        """Whether a trace made it, with a category for each allocation; else they are guessed."""
        return any(SEPARATOR in text for text in self.contents.texts)

    def one_device(self, device: int | None = None) -> int:
        """The number of a device: the given one, or that of the only one.

        Raises:
            ValueError: there is no such device, or there are several.
        """
        known = self.devices
        if device is None and len(known) > 1:
            raise ValueError(f"the snapshot has devices {known}; choose one with device=")
        if device is not None and known and device not in known:
            raise ValueError(f"device={device}; the snapshot has {known}")
        return device if device is not None else (known or [0])[0]


def diff(before: Snapshot, after: Snapshot, device: int | None = None) -> list[Change]:
    """What grew and shrank from the end of a snapshot to that of another, by line of the user."""
    return difference(before, after, at="end", device=device).changes


def _index(number: str | int) -> slice:
    """Where the entry with a number is; nowhere if it is no number."""
    at = int(number) - 1 if str(number).isdigit() else -1
    return slice(at, at + 1) if at >= 0 else slice(0)


def _address(text: str) -> int:
    """A hexadecimal number; -1, which no block has, if it is none."""
    try:
        return int(text, 16)
    except ValueError:
        return -1
