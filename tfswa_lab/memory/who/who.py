"""What holds the memory of tensors now, and which line of code would free it.

It needs no step that can be repeated, so it answers after an out-of-memory error, too.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, UntypedStorage

from tfswa_lab.memory.display import Shown, bars
from tfswa_lab.memory.gauges import Status, status
from tfswa_lab.memory.leaks.referrers import no_garbage_collection
from tfswa_lab.memory.leaks.traced_steps import FROZEN_BY_PYTHON
from tfswa_lab.memory.sizes import format_bytes
from tfswa_lab.memory.who.describe import class_name, first_holder, parts_of_thing, what_it_is
from tfswa_lab.memory.who.heap import Heap, Ways
from tfswa_lab.memory.who.names import Kept, Name, Session

SHOWN = 12  # holders in HTML
LINES = 20  # of a text
DETAILED = 100  # holders that are described; the rest is added up
PLAIN = (Tensor, UntypedStorage, dict, list, tuple)  # of a cycle, these say little
COLLECT = "import gc; gc.collect()"


@dataclass(frozen=True, repr=False)
class Holder(Shown):
    """Something that keeps tensors alive.

    Args:
        names: under which the session keeps it. Several things are listed with " and " between
            them where these tensors are only free once all of them are gone.
        what: what it is.
        size: bytes that would be freed.
        free: the line of Python that frees them; empty if no line can.
        parts: containers, hooks and caches in it that can be emptied alone.
    """

    names: str
    what: str
    size: int
    free: str = ""
    parts: tuple[Holder, ...] = ()

    @property
    def brief(self) -> str:
        """Name and bytes."""
        return f"{self.names}: {format_bytes(self.size)}"

    def __str__(self) -> str:
        what = f": {self.what}" if self.what else ""
        free = f"  →  {self.free}" if self.free else ""
        lines = [f"{format_bytes(self.size):>12}  {self.names}{what}{free}"]
        lines += [f"{'of it':>14}{part}" for part in self.parts]
        return "\n".join(lines)


@dataclass(frozen=True, repr=False)
class Held(Shown):
    """What holds the memory of tensors.

    Args:
        sizes: bytes of all tensors by device, shared ones counted once.
        holders: the largest first. Their sizes add up to those of `sizes`.
        gauges: what the process, the allocator and the GPU report.
        frozen: the number of objects that `gc.freeze` has hidden; `gc.unfreeze()` shows them.
    """

    sizes: Mapping[str, int]
    holders: tuple[Holder, ...]
    gauges: Status
    frozen: int = 0

    @property
    def head(self) -> str:
        """A sentence."""
        sizes = ", ".join(f"{format_bytes(n)} on {name}" for name, n in self.sizes.items())
        hidden = f"; {self.frozen:,} objects are hidden by gc.freeze()" if self.frozen else ""
        return f"tensors hold {sizes or 'no memory'}; {self.gauges}{hidden}"

    @property
    def brief(self) -> str:
        """How much, by how many."""
        return f"{format_bytes(sum(self.sizes.values()))}, {len(self.holders)} holders"

    def __str__(self) -> str:
        lines, rest = [self.head], list(self.holders)
        while rest and len(lines) + 1 + len(rest[0].parts) <= LINES:
            lines += str(rest.pop(0)).splitlines()
        if rest:
            size = format_bytes(sum(holder.size for holder in rest))
            lines.append(f"{size:>12}  {len(rest)} others")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = []
        for holder in self.holders[:SHOWN]:
            rows += [holder, *(replace(part, names=f"⤷ {part.names}") for part in holder.parts)]
        cells = [(row.size, row.names, row.what, row.free) for row in rows]
        return bars(self.head, ("held by", "", "this line frees it"), cells)


def who(shell: Any = None) -> Held:
    """What holds the memory of tensors now, and which line would free it.

    All names of the session are looked at: variables, IPython's outputs, the last error, open
    figures, attributes of modules and classes, running functions; and reference cycles that wait
    for the garbage collector. It takes about a second for 200,000 objects, which a session with
    torch has, and no memory of the GPU. Objects that `gc.freeze` has hidden are not seen.

    Args:
        shell: IPython's shell, None for that of this session, if there is one.

    >>> import torch
    >>> cache = {"window": torch.zeros(2**20)}
    >>> held = who()
    >>> held.sizes["cpu"] >= 4 * 2**20
    True
    """
    with no_garbage_collection(), closing(Heap()) as heap:
        session = Session(shell or _running_shell())
        holders = sorted(_holders(heap, session), key=lambda holder: -holder.size)
        sizes = Counter()
        for memory in heap.storages.values():
            sizes[memory.device] += memory.size
    frozen = gc.get_freeze_count()
    shown = tuple(each for each in holders if each.size)
    return Held(dict(sizes.most_common()), shown, status(), frozen * (frozen > FROZEN_BY_PYTHON))


def _running_shell() -> Any:
    """IPython's shell, if this session has one."""
    known = sys.modules.get("IPython")
    return known.get_ipython() if known else None


def _holders(heap: Heap, session: Session) -> Iterator[Holder]:
    ways = heap.ways(session.ends(heap.objects))
    garbage = heap.garbage()[ways.numbers]
    kept = _kept(ways, [*session.names(), *session.of_classes(heap.objects)])
    times = np.zeros(ways.links.count, np.int64)  # how many things lead to a number
    owners: dict[int, list[int]] = {at: [] for at in np.flatnonzero(ways.sizes).tolist()}
    for number, each in enumerate(kept):
        reached = np.unique(np.concatenate([ways.links.order(start) for start in each.starts]))
        times[reached] += 1
        for storage in reached[ways.sizes[reached] > 0].tolist():
            owners[storage].append(number)
    lost = garbage & (times == 0)
    yield from _garbage(ways, lost)
    groups: dict[tuple[int, ...], list[int]] = {}
    for storage, numbers in owners.items():
        if not lost[storage]:
            groups.setdefault(tuple(numbers), []).append(storage)
    yield from _nameless(ways, groups.pop((), []))
    sizes = {numbers: int(ways.sizes[storages].sum()) for numbers, storages in groups.items()}
    largest = sorted(sizes, key=lambda numbers: -sizes[numbers])
    for numbers in largest[:DETAILED]:
        yield _holder(ways, [kept[number] for number in numbers], groups[numbers], times)
    if rest := largest[DETAILED:]:
        yield Holder(f"{len(rest)} others", "", sum(sizes[numbers] for numbers in rest))


def _kept(ways: Ways, names: Iterable[Name]) -> list[Kept]:
    """The things with names, those with several names once."""
    kept: dict[int | str, Kept] = {}
    for name in names:
        at = ways.number(name.thing)
        if at is not None:
            known = kept.get(at) or kept.get(name.together)
            each = kept[at] = known or Kept([], [])
            each.names.append(name)
            if name.together:
                kept[name.together] = each
            if at not in each.starts:
                each.starts.append(at)
    return list({id(each): each for each in kept.values()}.values())


def _garbage(ways: Ways, lost: np.ndarray) -> Iterator[Holder]:
    """What waits for the garbage collector."""
    size = int(ways.sizes[lost].sum())
    if size:
        kinds = {type(ways.things[at]) for at in np.flatnonzero(lost & (ways.sizes == 0))}
        telling = [kind for kind in kinds if not issubclass(kind, PLAIN)] or kinds
        yield Holder("reference cycles", ", ".join(sorted(map(class_name, telling))), size, COLLECT)


def _nameless(ways: Ways, storages: Iterable[int]) -> Iterator[Holder]:
    """What is in use, although no name leads to it."""
    sizes = Counter()
    for storage in storages:
        sizes[first_holder(ways, storage)] += int(ways.sizes[storage])
    for first, size in sizes.items():
        yield Holder("(no name leads to it)", first, size)


def _holder(ways: Ways, kept: list[Kept], storages: list[int], times: np.ndarray) -> Holder:
    """Who keeps some storages that the same things lead to.

    Args:
        ways: to the storages.
        kept: these things.
        storages: their numbers.
        times: how many things lead to each number.
    """
    size = int(ways.sizes[storages].sum())
    line = dropping(kept, _goes_at_once(ways, kept, storages, times > 0))
    names = " and ".join(each.text for each in kept)
    if len(kept) > 1:
        return Holder(names, "", size, line)
    alone = (times == 1) & ways.links.reached(kept[0].starts)
    parts = [Holder(*part) for part in parts_of_thing(ways, kept[0], alone)]
    return Holder(names, what_it_is(ways, kept[0], storages), size, line, tuple(parts))


def dropping(kept: Sequence[Kept], at_once: bool = True) -> str:
    """A line that removes all names of some things; empty if a name cannot be removed.

    Args:
        kept: the things.
        at_once: whether they go at once; else the garbage collector has to run.

    >>> x, y = Name("x", 1, "del x", "x"), Name("y", 2, "del y", "y")
    >>> dropping([Kept([x], [0]), Kept([y, Name("Out[3]", 2, "%xdel _3", "_3")], [1])])
    'del x; get_ipython().run_line_magic("xdel", "y")'
    """
    gone, copies, others = [], [], []
    for names, _ in kept:
        emptied = [name.drop for name in names if name.empties]
        if emptied:
            others.append(emptied[0])
            continue
        if not all(name.drop for name in names):
            return ""
        variables = [name.variable for name in names if name.variable]
        if any(name.drop.startswith("%") for name in names):  # IPython keeps copies
            copies.append(variables[0])
        else:
            gone += variables
        others += [name.drop for name in names if not name.variable]
    magics = [f"%xdel {name}" for name in copies]
    magics += [line for line in others if line.startswith("%")]
    lines = [f"del {', '.join(gone)}"] if gone else []
    lines += [line for line in dict.fromkeys(others) if not line.startswith("%")]
    if len(magics) == 1 and not lines and at_once:
        return magics[0]
    return "; ".join([*lines, *map(_as_python, magics), *([] if at_once else [COLLECT])])


def _as_python(magic: str) -> str:
    """A command of IPython, to stand beside others in one line."""
    name, rest = magic.removeprefix("%").split(maxsplit=1)
    return f'get_ipython().run_line_magic("{name}", "{rest}")'


def _goes_at_once(ways: Ways, kept: list[Kept], storages: list[int], live: np.ndarray) -> bool:
    """Whether storages are free as soon as some names are gone, without the garbage collector.

    Args:
        live: a mask of what any name leads to.
    """
    links = ways.links.without(np.flatnonzero(~live))
    held = np.bincount(links.target, minlength=links.count)
    emptied = {at for each in kept if any(n.empties for n in each.names) for at in each.starts}
    starts = [at for each in kept for at in each.starts if at in emptied or not held[at]]
    return bool(links.freed(starts)[storages].all())
