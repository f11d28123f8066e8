"""Snapshots of several processes of one training: is one of them out of balance, and why?

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from tfswa_lab.memory.display import Shown, bars
from tfswa_lab.memory.sizes import format_bytes
from tfswa_lab.memory.snapshot.pickles import SnapshotError
from tfswa_lab.memory.snapshot.report import AllocationSite, Change, changes
from tfswa_lab.memory.snapshot.snapshot import read

ENDINGS = (".pickle", ".pkl", ".pickle.gz", ".pkl.gz", ".pickle.zip", ".pkl.zip")
BALANCED = 1.05  # of the highest peak to the median: below, nobody is out of balance
SHOWN = 16  # ranks in a text


@dataclass(frozen=True)
class Rank:
    """One device of one process; sizes are bytes.

    Args:
        name: of the file, and of the device if the file has several.
        peak: most bytes allocated.
        reserved: most bytes reserved.
        sites: who held the memory at the peak.
    """

    name: str
    peak: int
    reserved: int
    sites: list[AllocationSite]


@dataclass(frozen=True, repr=False)
class Ranks(Shown):
    """The processes of a training.

    Args:
        ranks: in the order of the numbers in their names.
        notes: on files that cannot be read.
    """

    ranks: list[Rank]
    notes: list[str] = field(default_factory=list)

    @property
    def imbalance(self) -> float:
        """The highest peak as a multiple of the median."""
        return self.highest.peak / max(1, median(rank.peak for rank in self.ranks))

    @property
    def highest(self) -> Rank:
        """The rank with the highest peak."""
        return max(self.ranks, key=lambda rank: rank.peak)

    @property
    def typical(self) -> Rank:
        """The rank whose peak is nearest to the median."""
        middle = median(rank.peak for rank in self.ranks)
        return min(self.ranks, key=lambda rank: abs(rank.peak - middle))

    @property
    def changes(self) -> list[Change]:
        """What the highest rank holds more, and less, than the typical one."""
        return changes(self.typical.sites, self.highest.sites)

    @property
    def brief(self) -> str:
        """How far they are from balance."""
        high = self.highest
        plural = "" if len(self.ranks) == 1 else "s"
        text = (
            f"{len(self.ranks)} rank{plural}, peak {format_bytes(high.peak)} at most ({high.name})"
        )
        if self.imbalance < BALANCED:
            return f"{text}: balanced"
        return f"{text}, {self.imbalance:.2f} times the median: out of balance"

    def __str__(self) -> str:
        return "\n".join(self.lines(SHOWN))

    def lines(self, top: int) -> Iterator[str]:
        """The text, with this many rows."""
        yield self.brief
        for rank in sorted(self.ranks, key=lambda rank: -rank.peak)[:top]:
            sizes = f"{format_bytes(rank.peak):>12} {format_bytes(rank.reserved):>12}"
            yield f"{sizes} reserved  {rank.name}"
        if self.imbalance >= BALANCED:
            yield f"{self.highest.name} against {self.typical.name}, at their peaks:"
            yield from map(str, self.changes[:8])
        yield from (f"note: {note}" for note in self.notes)

    def _repr_html_(self) -> str:
        rows = [(rank.peak, format_bytes(rank.reserved), rank.name) for rank in self.ranks]
        return bars(self.brief, ("reserved", "rank"), rows)

    def as_dict(self) -> dict:
        """All of it as plain data, for JSON."""
        about = {"imbalance": self.imbalance, "highest": self.highest.name}
        return about | {"changes": list(map(asdict, self.changes))} | asdict(self)


def compare(folder: str | Path) -> Ranks:
    """Read all snapshots of a folder, one after another; only what is compared stays in memory.

    Args:
        folder: with one file for each process.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: it has no snapshot that can be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: no such folder; give one with a snapshot per process")
    paths = [path for path in folder.iterdir() if path.name.endswith(ENDINGS)]
    ranks, notes = [], []
    for path in sorted(paths, key=_in_order):
        try:
            ranks += _ranks_in(path)
        except SnapshotError as error:
            notes.append(str(error))
    if not ranks:
        known = "; ".join(notes) or f"files end in {', '.join(ENDINGS)}"
        raise ValueError(f"{folder} has no snapshot with memory: {known}")
    return Ranks(ranks, notes)


def _in_order(path: Path) -> list:
    """Numbers in a name count as numbers: rank 10 comes after rank 9."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _ranks_in(path: Path) -> Iterator[Rank]:
    snapshot = read(path)
    for device in snapshot.devices:
        curves = snapshot.over_time(device)
        sites = snapshot.held_by("line", snapshot.event("peak", device), device)
        name = path.name if len(snapshot.devices) == 1 else f"{path.name} cuda:{device}"
        yield Rank(name, int(curves.allocated.max()), int(curves.reserved.max()), sites)
