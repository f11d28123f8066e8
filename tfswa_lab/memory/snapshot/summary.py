"""What a snapshot says, in short: peak, reserved memory, who held it, why it ran out.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from tfswa_lab.memory.display import Shown, bars, page
from tfswa_lab.memory.sizes import format_bytes
from tfswa_lab.memory.snapshot.history import OverTime
from tfswa_lab.memory.snapshot.report import (
    AllocationSite,
    Change,
    Fragmentation,
    OutOfMemoryReport,
    changes,
)

if TYPE_CHECKING:
    from tfswa_lab.memory.snapshot.snapshot import Snapshot

SHOWN = 8  # rows of a table in a text


@dataclass(frozen=True, repr=False)
class Summary(Shown):
    """One device of a snapshot. Sizes are bytes, events are entries counted from 1.

    Args:
        device: its number.
        entries: of the history.
        seconds: from the first entry to the last; 0 if a trace made it, which has no clock.
        peak: most bytes allocated.
        peak_event: when.
        peak_reserved: most bytes reserved.
        at: the moment of the tables, such as `peak`.
        event: the same moment as an event.
        allocated: bytes allocated at that moment.
        by: what the groups are, such as `line`.
        groups: who held them, the largest first.
        categories: bytes by category at that moment.
        guessed: whether the categories are guessed from the functions in the stacks.
        end: how the reserved memory is used at the end.
        oom: the last request that failed, None if there is none.
        annotations: bytes allocated when an annotation started or ended, in their order.
        notes: what was left out or not understood.
    """

    device: int
    entries: int
    seconds: float
    peak: int
    peak_event: int
    peak_reserved: int
    at: str
    event: int
    allocated: int
    by: str
    groups: list[AllocationSite]
    categories: dict[str, int]
    guessed: bool
    end: Fragmentation
    oom: OutOfMemoryReport | None
    annotations: list[tuple[str, int]]
    notes: list[str]

    @property
    def brief(self) -> str:
        """Device and peaks."""
        allocated, reserved = map(format_bytes, (self.peak, self.peak_reserved))
        return f"cuda:{self.device}: peak {allocated} allocated, {reserved} reserved"

    @property
    def title(self) -> str:
        """What the table of groups shows."""
        when = "" if self.at.isdigit() else f" ({self.at})"
        held = format_bytes(self.allocated)
        return f"{held} after entry {self.event:,}{when}, by {self.by.replace('_', ' ')}"

    @property
    def by_category(self) -> str:
        """The title of the categories."""
        return "by category" + ", guessed from the functions in the stacks" * self.guessed

    def __str__(self) -> str:
        return "\n".join(self.lines(SHOWN))

    def lines(self, top: int) -> Iterator[str]:
        """The text, with this many rows of the tables."""
        span = f" (recorded in {_span(self.seconds)})" if self.seconds else ""
        yield f"{self.brief}, at entry {self.peak_event:,} of {self.entries:,}{span}"
        yield f"at the end: {self.end}" if self.end.reserved else "no segments at the end"
        yield f"{self.title}:"
        yield from map(str, self.groups[:top])
        if rest := self.groups[top:]:
            blocks = sum(site.blocks for site in rest)
            others = f"{len(rest)} other{'' if len(rest) == 1 else 's'}"
            yield str(AllocationSite(others, sum(site.size for site in rest), blocks))
        if self.by != "category":
            parts = (f"{name} {format_bytes(size)}" for name, size in self.categories.items())
            yield f"{self.by_category}: {', '.join(parts)}"
        if self.oom:
            yield from ("", "out of memory:", *self.oom.sentences)
        if self.annotations:
            parts = (f"{name} {format_bytes(size)}" for name, size in self.annotations[:top])
            more = f" … {len(self.annotations) - top} more" * (len(self.annotations) > top)
            yield f"allocated at annotations: {', '.join(parts)}{more}"
        yield from (f"note: {note}" for note in self.notes)

    def _repr_html_(self) -> str:
        rows = [(each.size, f"{each.blocks:,}", each.line) for each in self.groups[:SHOWN]]
        details = {"the reserved memory at the end": [str(self.end)], "notes": self.notes}
        if self.oom:
            details["out of memory"] = self.oom.sentences
        head = page(self.brief, {self.by_category: self.categories}, {})
        lists = {title: texts for title, texts in details.items() if texts}
        return head + bars(self.title, ("blocks", self.by), rows) + page("", {}, lists)

    def as_dict(self) -> dict:
        """All of it as plain data, for JSON."""
        plain = asdict(self)
        if self.oom:
            plain["oom"] |= {"fits": self.oom.fits, "is_fragmentation": self.oom.is_fragmentation}
        return plain


def summary(
    snapshot: Snapshot,
    by: str = "line",
    at: str | int = "peak",
    device: int | None = None,
    rules: Mapping[str, str] | None = None,
) -> Summary:
    """What a snapshot says of one device.

    Args:
        snapshot: with a history or without.
        by: what memory is grouped by, as in `Snapshot.held_by`.
        at: when, as in `Snapshot.event`.
        device: its number; it may be left out if there is only one.
        rules: for `by="rule"`, regular expressions by name.

    Raises:
        ValueError: there is no such grouping, moment or device.
    """
    device = snapshot.one_device(device)
    curves, event = snapshot.over_time(device), snapshot.event(at, device)
    failed = snapshot.history(device).where("oom").any()
    categories = snapshot.held_by("category", event, device)
    times = curves.time_us if len(curves.time_us) else np.zeros(1)
    return Summary(
        device=device,
        entries=len(snapshot.history(device)),
        seconds=0.0 if snapshot.has_categories else float(np.ptp(times)) / 1e6,
        peak=int(curves.allocated.max()),
        peak_event=int(curves.allocated.argmax()),
        peak_reserved=int(curves.reserved.max()),
        at=str(at),
        event=event,
        allocated=int(curves.allocated[event]),
        by=by,
        groups=snapshot.held_by(by, event, device, rules),
        categories={site.line: site.size for site in categories},
        guessed=not snapshot.has_categories,
        end=snapshot.fragmentation(device),
        oom=snapshot.oom_report(device) if failed else None,
        annotations=_at_annotations(snapshot, device, curves),
        notes=[note for note in snapshot.notes if _concerns(note, device)],
    )


def _span(seconds: float) -> str:
    """A time in the unit that suits it.

    >>> _span(5e-5), _span(0.25), _span(6200.0)
    ('50 µs', '250 ms', '6,200 s')
    """
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= 10 * unit or name == "µs":
            return f"{seconds / unit:,.0f} {name}"
    return ""


def _concerns(note: str, device: int) -> bool:
    """Whether a note is about a device, or about none."""
    return not note.startswith("device ") or note.startswith(f"device {device}:")


def _at_annotations(snapshot: Snapshot, device: int, curves: OverTime) -> list[tuple[str, int]]:
    """Bytes allocated when each annotation starts and ends."""
    here = sorted(
        (one for one in snapshot.contents.annotations if one.device == device),
        key=lambda one: one.time_us,
    )
    events = np.searchsorted(curves.time_us[1:], [one.time_us for one in here], "right")
    pairs = zip(here, curves.allocated[events].tolist(), strict=True)
    return [(f"{one.name} {one.stage}", size) for one, size in pairs]


@dataclass(frozen=True, repr=False)
class Difference(Shown):
    """Two snapshots, and what grew and shrank between their moments.

    Args:
        before: bytes allocated in the first.
        after: bytes allocated in the second.
        at: which moments are compared.
        changes: the largest first.
    """

    before: int
    after: int
    at: str
    changes: list[Change]

    @property
    def brief(self) -> str:
        """The change of the whole."""
        first, last, more = map(
            format_bytes, (self.before, self.after, abs(self.after - self.before))
        )
        sign = "+" if self.after >= self.before else "−"
        return f"at the {self.at}: {first}, then {last} ({sign}{more})"

    def __str__(self) -> str:
        return "\n".join(self.lines(SHOWN))

    def lines(self, top: int) -> Iterator[str]:
        """The text, with this many rows of each direction."""
        yield self.brief
        for title, sign in (("more in the second", 1), ("less in the second", -1)):
            found = [change for change in self.changes if sign * change.growth > 0]
            yield f"{title}: {len(found) or 'nothing'}"
            yield from map(str, found[:top])

    def _repr_html_(self) -> str:
        grown = {c.line: c.growth for c in self.changes[:SHOWN] if c.growth > 0}
        shrunk = {c.line: -c.growth for c in self.changes[:SHOWN] if c.growth < 0}
        return page(self.brief, {"more in the second": grown, "less in the second": shrunk}, {})

    def as_dict(self) -> dict:
        """All of it as plain data, for JSON."""
        return asdict(self)


def difference(
    before: Snapshot,
    after: Snapshot,
    by: str = "line",
    at: str = "peak",
    device: int | None = None,
    rules: Mapping[str, str] | None = None,
) -> Difference:
    """Compare the same moment of two snapshots; arguments as for `summary`."""
    sides = []
    for name, one in (("first", before), ("second", after)):
        try:
            number = one.one_device(device)
            sides.append(one.held_by(by, one.event(at, number), number, rules))
        except ValueError as error:
            raise ValueError(f"the {name} snapshot: {error}") from None
    totals = (sum(site.size for site in side) for side in sides)
    return Difference(*totals, at, changes(*sides))
