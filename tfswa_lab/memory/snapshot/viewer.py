"""Snapshots as one HTML page that stays small: the timeline, who held the memory, and the stacks.

A page holds at most `SAMPLES` moments and `SITES` allocation sites of a history, whatever its
length. It needs no network, and it executes nothing of what a snapshot contains.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from importlib.resources import files
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tfswa_lab.durable import parts_of
from tfswa_lab.memory.sizes import format_bytes
from tfswa_lab.memory.snapshot.groups import groups, numbered
from tfswa_lab.memory.snapshot.history import OverTime
from tfswa_lab.memory.snapshot.schema import Annotation
from tfswa_lab.memory.snapshot.snapshot import Snapshot

SAMPLES = 1_500  # moments of a history
SITES = 100  # allocation sites with a row of their own
STACKS = 5  # of a site
OOMS = 20  # failures that are kept as moments, the newest
MARKS = 200  # annotations
DEEPEST = 100  # lines of a stack
LONGEST = 300  # letters of a line
NOTHING = np.zeros(0, np.int64)  # the indices of no allocations


class Grouping(NamedTuple):
    """What the rows of a page are.

    Args:
        by: as in `Snapshot.held_by`.
        rules: for `rule`, regular expressions by the name of their group.
    """

    by: str = "line"
    rules: Mapping[str, str] = {}


LINES = Grouping()


def write_html(
    path: str | Path,
    snapshots: Mapping[str, Snapshot],
    device: int | None = None,
    grouping: Grouping = LINES,
) -> Path:
    """Write a page that shows snapshots, side by side if there are several.

    Args:
        path: of the page.
        snapshots: by name.
        device: None for all; the page then has a selector.
        grouping: what the rows are.

    Raises:
        ValueError: there is no snapshot, or none has this device; the grouping is unknown.
        OSError: the folder cannot be written to.
    """
    path, text = Path(path), page(views(snapshots, device, grouping))
    path.parent.mkdir(parents=True, exist_ok=True)
    with parts_of([path]) as (part,), part.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
    return path


def page(data: list[list[dict]]) -> str:
    """The page for what `views` returned.

    Its policy allows the page's own script and style by their hashes, and nothing else.
    """
    template = files(__package__).joinpath("viewer.html").read_text(encoding="utf-8")
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hash(template, 'script')}",
            f"style-src {_hash(template, 'style')}",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    return template.replace("__POLICY__", policy).replace("__DATA__", embedded(data))


def _hash(template: str, tag: str) -> str:
    """The source expression that allows the text of an element, for a Content-Security-Policy."""
    text = re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def embedded(data: object) -> str:
    r"""JSON that cannot end the `<script>` element around it; half a UTF-16 pair becomes `?`.

    >>> embedded("</script>")
    '"\\u003c/script\\u003e"'
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    text = text.encode("utf-8", "replace").decode()
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def views(
    snapshots: Mapping[str, Snapshot], device: int | None = None, grouping: Grouping = LINES
) -> list[list[dict]]:
    """The data of a page: groups of views to show side by side, one group for each device.

    Snapshots of one device each are compared even if the numbers of their devices differ, as those
    of two processes do.

    Args:
        snapshots: by name.
        device: None for all.
        grouping: what the rows are.

    Raises:
        ValueError: there is no snapshot, or none has this device.
    """
    if not snapshots:
        raise ValueError("no snapshot to show; give at least one, such as {'before': snapshot}")
    numbers = {name: snapshot.devices or [0] for name, snapshot in snapshots.items()}
    known = sorted(set().union(*numbers.values()))
    if device is not None and device not in known:
        raise ValueError(f"device={device}; the snapshots have {known}")
    if device is None and all(len(each) == 1 for each in numbers.values()):
        sides = [{name: each[0] for name, each in numbers.items()}]
    else:
        wanted = known if device is None else [device]
        sides = [{name: one for name in snapshots if one in numbers[name]} for one in wanted]
    return [_side_by_side(snapshots, numbers, grouping) for numbers in sides]


def _side_by_side(
    snapshots: Mapping[str, Snapshot], devices: Mapping[str, int], grouping: Grouping
) -> list[dict]:
    """Views with the same sites, so that each site's difference is exact."""
    sampled = {name: Sampled(snapshots[name], one, grouping) for name, one in devices.items()}
    highest = Counter()
    for one in sampled.values():
        highest |= one.highest  # the larger of the two
    lines = [line for line, _ in highest.most_common(SITES)]
    return [{"name": name} | one.view(lines) for name, one in sampled.items()]


class Sampled:
    """A device's memory at a few moments of its history.

    Args:
        snapshot: of one or several devices.
        device: its number.
        grouping: what its sites are.
    """

    def __init__(self, snapshot: Snapshot, device: int, grouping: Grouping = LINES):
        self.snapshot, self.device = snapshot, device
        self.allocations = snapshot.allocations(device)
        self.curves = snapshot.over_time(device)
        self.entries = len(snapshot.history(device))
        self.ooms = np.flatnonzero(snapshot.history(device).where("oom"))[-OOMS:] + 1
        self.events = sampled_events(self.curves, self.ooms)
        self.members = self._members(grouping)
        times = self.curves.time_us if len(self.curves.time_us) else np.zeros(1, np.int64)
        self.times = np.maximum.accumulate(times)  # threads can record slightly out of order
        self._frames: dict[str, int] = {}  # the number of each distinct line

    def _members(self, grouping: Grouping) -> dict[str, np.ndarray]:
        """The indices of the allocations of each site."""
        found = groups(self.snapshot, grouping.by, self.device, grouping.rules)
        names, number = numbered(map(clipped, found.names))
        site = number[found.of]
        order = np.argsort(site, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(site[order])) + 1)
        return {names[site[part[0]]]: part for part in parts if len(part)}

    @cached_property
    def highest(self) -> Counter[str]:
        """The most bytes that each site holds at any sample."""
        return Counter(
            {line: int(self.held(group)[0].max()) for line, group in self.members.items()}
        )

    def held(self, group: np.ndarray) -> np.ndarray:
        """Bytes (row 0) and blocks (row 1) that some allocations hold at each sample."""
        size = self.allocations.size[group]
        change = np.zeros((2, len(self.events) + 1), np.int64)
        for times, sign in ((self.allocations.born, 1), (self.allocations.died, -1)):
            at = np.searchsorted(self.events, times[group])
            np.add.at(change[0], at, sign * size)
            np.add.at(change[1], at, sign)
        return np.cumsum(change, axis=1)[:, :-1]

    def view(self, lines: Sequence[str]) -> dict:
        """Plain data for the page.

        Bytes and blocks of `sites` and `others` are changes from sample to sample, the first from
        0, and bytes are in units of `unit`: short numbers make a small page. `peak`, `ooms` and a
        site's `peak` are indices of samples; a stack's `frames` are indices into `frames`.

        Args:
            lines: sites with a row of their own; the others are added up.
        """
        unit = int(np.gcd.reduce(self.allocations.size)) or 1
        sites = [self._site(line, unit) for line in lines]
        rest = [self.members[line] for line in self.members.keys() - set(lines)]
        return {
            "facts": self._facts(),
            "oom": str(self.snapshot.oom_report(self.device)) if len(self.ooms) else "",
            "entries": self.entries,
            "samples": self._samples(),
            "peak": self._sample(self.curves.allocated.argmax()),
            "ooms": [self._sample(event) for event in self.ooms],
            "marks": self._marks(),
            "unit": unit,
            "sites": sites,
            "others": {"sites": len(rest)} | self._changes(np.concatenate([NOTHING, *rest]), unit),
            "frames": list(self._frames),
        }

    def _facts(self) -> dict[str, str]:
        """Sentences about the whole history by title, empty where there is nothing to say."""
        segments = self.snapshot.segments(self.device)
        return {
            "device": str(self.device),
            "peak allocated": self._peak(self.curves.allocated),
            "peak reserved": self._peak(self.curves.reserved),
            "at the end": str(self.snapshot.fragmentation(self.device)) if segments else "",
            "drawn": self._drawn(),
            "notes": "\n".join(self.snapshot.notes),
        }

    def _peak(self, curve: np.ndarray) -> str:
        size = format_bytes(int(curve.max()))
        return f"{size} (entry {curve.argmax():,})" if self.entries else size

    def _drawn(self) -> str:
        if not self.entries:
            return "no history: only the moment of the snapshot is known"
        if len(self.events) > self.entries:
            return f"all {self.entries:,} entries"
        return (
            f"{len(self.events):,} of {self.entries:,} entries; peaks are kept: of each stretch, "
            "the moment with the most allocated is shown"
        )

    def _samples(self) -> dict[str, list[int]]:
        """The moments as columns; the first entry has time 0."""
        columns = {
            name: getattr(self.curves, name)[self.events].tolist()
            for name in ("allocated", "active", "reserved")
        }
        times = self._since_start(self.times[self.events].tolist())
        return {"event": self.events.tolist(), "time_us": times} | columns

    def _since_start(self, times: Iterable[int]) -> list[int]:
        """Microseconds after the first entry, in Python's integers, which cannot overflow."""
        start = int(self.times[0])
        return [time - start for time in times]

    def _sample(self, event: int) -> int:
        """The index of the sample of an event."""
        return int(np.searchsorted(self.events, event))

    def _marks(self) -> list[dict]:
        """Annotations from the last one before the history on, thinned out evenly."""
        here = (one for one in self.snapshot.contents.annotations if one.device == self.device)
        annotations = sorted(here, key=attrgetter("time_us"))
        times = np.array([one.time_us for one in annotations], np.int64)
        first = max(np.searchsorted(times, self.times[0], "right") - 1, 0)
        kept = slice(first, None, -(-len(times[first:]) // MARKS) or 1)
        events = np.searchsorted(self.times[1:], times[kept], "right").tolist()
        since = self._since_start(np.maximum(times[kept], self.times[0]).tolist())
        return [
            {"name": _label(one), "event": event, "time_us": time}
            for one, event, time in zip(annotations[kept], events, since, strict=True)
        ]

    def _site(self, line: str, unit: int) -> dict:
        group = self.members.get(line, NOTHING)
        peak = int(self.held(group)[0].argmax())
        stacks = self._stacks(group, int(self.events[peak]))
        return {"line": line, "peak": peak, "stacks": stacks} | self._changes(group, unit)

    def _changes(self, group: np.ndarray, unit: int) -> dict[str, list[int]]:
        size, blocks = np.diff(self.held(group), prepend=0)
        return {"bytes": (size // unit).tolist(), "blocks": blocks.tolist()}

    def _stacks(self, group: np.ndarray, event: int) -> list[dict]:
        """The stacks of a site that hold the most right after an event."""
        alive = group[self.allocations.alive(event)[group]]
        stacks, which = np.unique(self.allocations.stack[alive], return_inverse=True)
        size = np.zeros(len(stacks), np.int64)
        np.add.at(size, which, self.allocations.size[alive])
        blocks = np.bincount(which, minlength=len(stacks))
        largest = np.argsort(-size, kind="stable")[:STACKS]
        return [
            {"bytes": int(size[k]), "blocks": int(blocks[k]), "frames": self._numbers(stacks[k])}
            for k in largest
        ]

    def _numbers(self, stack: int) -> list[int]:
        """The numbers of a stack's lines."""
        frames = self.snapshot.contents.stacks[stack]
        lines = [clipped(str(frame)) for frame in frames[:DEEPEST]]
        if len(frames) > DEEPEST:
            lines.append(f"… {len(frames) - DEEPEST} more lines")
        return [self._frames.setdefault(line, len(self._frames)) for line in lines]


def _label(annotation: Annotation) -> str:
    starts = annotation.stage == "START"
    return clipped(annotation.name if starts else f"{annotation.name} ({annotation.stage.lower()})")


def sampled_events(curves: OverTime, ooms: Iterable[int]) -> np.ndarray:
    """At most `SAMPLES` events of a history, in order.

    The first, the last, both peaks and the failures are among them; the others are, of stretches of
    equal length, the event at which the most is allocated.

    Args:
        curves: of the whole history.
        ooms: events.
    """
    count = len(curves.allocated)
    if count <= SAMPLES:
        return np.arange(count)
    kept = {0, count - 1, curves.allocated.argmax(), curves.reserved.argmax(), *ooms}
    edges = np.linspace(0, count, SAMPLES - len(kept) + 1).astype(int)
    kept |= {start + curves.allocated[start:stop].argmax() for start, stop in pairwise(edges)}
    return np.array(sorted(kept))


def clipped(text: str) -> str:
    """A long text without its middle.

    >>> clipped("train.py:3 (step)")
    'train.py:3 (step)'
    >>> len(clipped("x" * 1_000_000))
    301
    """
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]}…{text[-half:]}"
