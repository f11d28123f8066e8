"""Lines whose blocks pile up, with the objects that hold them; only names and numbers are kept.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import CellType, CoroutineType, FrameType, GeneratorType, TracebackType
from typing import Any
from weakref import ref

import numpy as np
from torch import Tensor, UntypedStorage, nn
from torch.optim import Optimizer

from tfswa_lab.memory.gauges import device_memory, host_total
from tfswa_lab.memory.leaks.advice import AUTOCAST, known_classes
from tfswa_lab.memory.leaks.census import Census, Site, fills_up
from tfswa_lab.memory.leaks.containers import CONTAINERS, Container, container_of
from tfswa_lab.memory.leaks.holders import Holders, Holding
from tfswa_lab.memory.sizes import format_bytes
from tfswa_lab.memory.trace.stacks import Frame, in_short
from tfswa_lab.memory.trace.timeline import Block
from tfswa_lab.memory.trace.tracer import has_storage

# Objects that may be between a holder and a block.
KINDS = {
    "exception": (TracebackType, BaseException),
    "frame": (FrameType, GeneratorType, CoroutineType),
    "optimizer": (Optimizer,),
    "parameter": (nn.Parameter,),
}


@dataclass(frozen=True)
class Suspect:
    """Blocks of one line that pile up, and their holder.

    Args:
        line: the line that allocates them.
        op: the operator that does.
        phase: as in `Block`.
        per_step: their growth in bytes.
        held: bytes of those that are alive.
        births: the steps that allocated them.
        holder: the object that holds them all, as code, such as `trainer.history`.
        where: where it is defined, or the name that leads to it.
        container: that object, as a container.
        path: one of the blocks, as code, such as `trainer.history[3]`.
        through: links between the holder and a block: names of `KINDS`, `graph`, `hook`.
        pinned: how many times larger the storage is than the tensor that keeps it.
        rooted: whether a name leads to the holder.
        known: classes that are known to hold memory, from `known_classes`.
        others: another holder of the same blocks, as code, empty if there is none.
        room: bytes of all memory where the blocks are.
    """

    line: Frame | None
    op: str
    phase: str
    per_step: float
    held: int
    births: tuple[int, ...]
    holder: str
    where: str
    container: Container
    path: str
    through: frozenset[str]
    pinned: float
    rooted: bool
    known: tuple[str, ...] = ()
    others: str = ""
    room: float = math.inf

    @property
    def of_optimizer(self) -> bool:
        """Whether an optimizer made the blocks, or optimizers hold them."""
        return self.phase == "optimizer" or "optimizer" in self.through

    def is_bounded(self, steps: int) -> bool:
        """Whether the container will stop growing: by its limit, or because its keys come again.

        Steps that add no key prove nothing, because new keys may be rare. They must become rarer.

        Args:
            steps: the number of steps that were run.
        """
        container = self.container
        if container.limit is not None and self.at_limit <= self.room:
            return True
        return container.by_content and fills_up(self.births, steps)

    @property
    def at_limit(self) -> float:
        """Bytes of the blocks when the container has as many elements as its limit allows."""
        container = self.container
        return self.held / max(1, container.length) * (container.limit or 0)

    @property
    def limit(self) -> str:
        """The limit that Python or torch enforces, and the bytes at that limit; empty without."""
        if self.container.limit is None:
            return ""
        limit, name = self.container.limit, self.container.limited_by
        return f"{limit} elements, {format_bytes(round(self.at_limit))} ({name} = {limit})"

    @property
    def condition(self) -> str:
        """A condition that would bound it but that no step has shown; empty if there is none."""
        if self.container.limit is None and self.container.claim:
            return f"the program enforces `{self.container.claim}`"
        return "its keys come again" if self.container.by_content else ""

    def __str__(self) -> str:
        unseen = "made at an unknown line: in an older thread, from an array, or sparse"
        where = f"made at {in_short(self.line)}" if self.line else unseen
        op = self.op.removeprefix("aten.").split(".")[0]
        return f"{format_bytes(self.held)} {where}" + (f" by {op}" if op else "")

    @property
    def held_by(self) -> str:
        """The holder, in a sentence."""
        container = self.container
        what = f"a {container.kind}" + (f" of {container.length}" if container.length else "")
        graph = ", through the graph that made it" if "graph" in self.through else ""
        path = f"; one of them is `{self.path}`" if self.path != self.holder else ""
        others = f"; also held by `{self.others}`" if self.others else ""
        return f"held by `{self.holder}` ({what}, {self.where}){graph}{path}{others}"


def suspects_of(
    sites: Sequence[Site],
    census: Census,
    holders: Holders,
    storages: dict[Block, ref[UntypedStorage]],
    cast: set[Block],
) -> list[Suspect]:
    """The holders of the blocks of some lines; lines whose blocks are gone by now are left out.

    Args:
        sites: the lines.
        census: of the steps.
        holders: finds them.
        storages: of all blocks that were alive at the end.
        cast: those of them that were gone when autocast's cache was cleared.
    """
    samples = [_samples(site.alive, census, storages) for site in sites]
    every = [storage for each in samples for storage in each]
    holders.paths.ignore(samples, every, *samples)
    holders.look_up(every)
    suspects = []
    for site, found in zip(sites, samples, strict=True):
        if found:
            suspects.append(_suspect(site, [holders.of(each) for each in found], holders))
        elif not cast.isdisjoint(site.alive):
            suspects.append(_of_autocast(site))
    return suspects


def _of_autocast(site: Site) -> Suspect:
    """Weights in a lower precision that autocast keeps until the outermost one ends."""
    cache = "autocast's cache of cast weights"
    return Suspect(
        **_of_site(site),
        holder=cache,
        where="kept until the outermost autocast ends",
        container=Container("cache", len(site.alive)),
        path=cache,
        through=frozenset(),
        pinned=1.0,
        rooted=True,
        known=(AUTOCAST,),
    )


def _of_site(site: Site) -> dict[str, Any]:
    block = site.blocks[0]
    held = sum(each.size for each in site.alive)
    return {"line": site.line, "op": block.op, "phase": block.phase} | {
        "per_step": site.per_step,
        "held": held,
        "births": tuple(site.births),
    }


def _suspect(site: Site, holdings: list[Holding], holders: Holders) -> Suspect:
    other = _beside(holdings, holders)
    if other and _container(holdings).limit is not None and _container(other).limit is None:
        holdings, other = other, holdings  # the bounded one says nothing about the other one
    chain, at = holdings[0].chain, _joint([each.chain for each in holdings])
    top = at if len(holdings) > 1 else 0
    holder, path = holders.spell(chain[: at + 1]), holders.spell(chain[:-1]).expression
    return Suspect(
        **_of_site(site),
        holder=holder.expression,
        where=holder.where,
        container=container_of(chain, at),
        path=path,
        through=_through(holdings[0], top, path),
        pinned=_pinned(chain),
        rooted=holdings[0].rooted,
        known=known_classes(chain, at),
        others=_name(other, holders),
        room=_room(chain[-1]),
    )


def _beside(holdings: list[Holding], holders: Holders) -> list[Holding]:
    """How another container holds the same blocks, so that emptying the first one frees nothing."""
    chain, at = holdings[0].chain, _joint([each.chain for each in holdings])
    if len(holdings) < 2 or not isinstance(chain[at], CONTAINERS):
        return []
    found = holders.besides(chain[at], [holding.chain[-1] for holding in holdings])
    if len(found) < len(holdings):
        return []
    other, place = found[0].chain, _joint([each.chain for each in found])
    below = any(each is other[place] for each in chain[:at])  # it holds the first container, too
    return [] if below or not isinstance(other[place], CONTAINERS) else found


def _container(holdings: list[Holding]) -> Container:
    return container_of(holdings[0].chain, _joint([each.chain for each in holdings]))


def _name(holdings: list[Holding], holders: Holders) -> str:
    if not holdings:
        return ""
    at = _joint([each.chain for each in holdings])
    return holders.spell(holdings[0].chain[: at + 1]).expression


def _room(storage: UntypedStorage) -> float:
    if storage.device.type == "cuda":
        return device_memory(storage.device).total
    return host_total() if storage.device.type == "cpu" else math.inf


def _samples(
    blocks: list[Block], census: Census, storages: dict[Block, ref[UntypedStorage]]
) -> list[UntypedStorage]:
    """Storages of two steps; the last step is left out if there are others."""
    by_birth = {census.birth(block): block for block in blocks if block in storages}
    births = sorted(by_birth)
    inner = births[:-1] if len(births) > 2 else births
    chosen = {inner[len(inner) // 2], inner[-1]} if inner else ()
    found = [storages[by_birth[birth]]() for birth in sorted(chosen)]
    return [storage for storage in found if storage is not None]


def _joint(chains: Sequence[list[Any]]) -> int:
    """The place of the last holder that two chains share; in one chain, of the last named one."""
    first = chains[0]
    if len(chains) > 1:
        same = [a is b for a, b in zip(*chains[:2], strict=False)]
        at = same.index(False) - 1 if False in same else len(same) - 1
    else:
        at = next((at for at, each in enumerate(first) if isinstance(each, Tensor)), 1) - 1
    at = max(at, 0)
    while any(isinstance(each, CellType) for each in first[at : at + 2]):
        at += 1  # a closure's cell has no name of its own: go on to its value
    return at


def _through(holding: Holding, at: int, path: str) -> frozenset[str]:
    below = holding.chain[at + 1 :]
    below = [each for each in below if not isinstance(each, Warning)]  # with data, but no frames
    found = {name for name, kinds in KINDS.items() if any(isinstance(o, kinds) for o in below)}
    tensors = [each for each in holding.chain if isinstance(each, Tensor)]
    own_hook = any(tensor._backward_hooks is holding.chain[0] for tensor in tensors)
    if holding.graph or any(tensor.grad_fn is not None for tensor in tensors):
        found.add("graph")
    return frozenset(found | ({"hook"} if own_hook or "_hooks[" in path else set()))


def _pinned(chain: list[Any]) -> float:
    """How many times larger a storage is than the tensor or array that views it."""
    array, view, storage = [None, *chain][-3:]
    view = array if isinstance(array, np.ndarray) else view
    if not (has_storage(view) or isinstance(view, np.ndarray)) or not view.nbytes:
        return 1.0
    return storage.nbytes() / view.nbytes
