"""What piles up, who makes it and who holds it, in words and figures: no object is kept.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import CellType, CoroutineType, FrameType, GeneratorType, TracebackType
from typing import Any
from weakref import ref

import numpy as np
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import Node
from torch.optim import Optimizer

from tfswa_lab.memory.diagnosis.census import Census
from tfswa_lab.memory.diagnosis.containers import Container, container_of
from tfswa_lab.memory.diagnosis.growth import Site
from tfswa_lab.memory.diagnosis.holders import Holders, Holding
from tfswa_lab.memory.tracing.blocks import Block, Frame
from tfswa_lab.memory.tracing.storages import has_storage

# What may lead from a holder to a block, and what that is called.
KINDS = {
    "exception": (TracebackType, BaseException),
    "frame": (FrameType, GeneratorType, CoroutineType),
    "optimizer": (Optimizer,),
    "parameter": (nn.Parameter,),
    "node": (Node,),
}
UNNAMED = (CellType, tuple)  # variables that functions close over


@dataclass(frozen=True)
class Culprit:
    """Blocks of one line that pile up, and their holder.

    Args:
        line: that makes them.
        op: the operator that does.
        phase: as in `Block`.
        per_step: bytes by which they grow.
        held: bytes of all that are alive.
        births: steps that they come from.
        holder: what a program would write for the object that holds them all.
        where: the name that this begins with is found.
        container: that object, as far as it is a container.
        path: what a program would write for one of the blocks.
        through: what leads from the holder to a block: names of `KINDS`, `graph`, `hook`.
        pinned: how many times larger the storage is than the tensor that keeps it.
        rooted: whether a name leads to the holder.

    Notebook: 06_leak_diagnosis
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


def culprits_of(
    sites: Sequence[Site],
    census: Census,
    holders: Holders,
    storages: dict[Block, ref[UntypedStorage]],
) -> list[Culprit]:
    """Who holds the blocks of some lines, without those that have gone since.

    Args:
        sites: the lines.
        census: that they are from.
        holders: to look them up.
        storages: of all blocks that were alive at the end.

    Notebook: 06_leak_diagnosis
    """
    samples = [_samples(site.alive, census, storages) for site in sites]
    every = [storage for each in samples for storage in each]
    holders.paths.ignore(samples, every, *samples)
    holders.look_up(every)
    pairs = zip(sites, samples, strict=True)
    return [
        _culprit(site, [holders.of(s) for s in found], holders) for site, found in pairs if found
    ]


def _culprit(site: Site, holdings: list[Holding], holders: Holders) -> Culprit:
    chain, at = holdings[0].chain, _joint([each.chain for each in holdings])
    top = at if len(holdings) > 1 else 0
    holder, path = holders.spell(chain[: at + 1]), holders.spell(chain[:-1]).expression
    return Culprit(
        line=site.line,
        op=site.blocks[0].op,
        phase=site.blocks[0].phase,
        per_step=site.per_step,
        held=sum(block.size for block in site.alive),
        births=tuple(site.births),
        holder=holder.expression,
        where=holder.where,
        container=container_of(chain, at),
        path=path,
        through=_through(holdings[0], top, path),
        pinned=_pinned(chain),
        rooted=holdings[0].rooted,
    )


def _samples(
    blocks: list[Block], census: Census, storages: dict[Block, ref[UntypedStorage]]
) -> list[UntypedStorage]:
    """Storages of two steps, neither of them the last if there are others."""
    by_birth = {census.birth(block): block for block in blocks if block in storages}
    births = sorted(by_birth)
    inner = births[:-1] if len(births) > 2 else births
    chosen = {inner[len(inner) // 2], inner[-1]} if inner else ()
    found = [storages[by_birth[birth]]() for birth in sorted(chosen)]
    return [storage for storage in found if storage is not None]


def _joint(chains: Sequence[list[Any]]) -> int:
    """Place of the last holder that chains have in common; of the last named one, of one chain."""
    first = chains[0]
    if len(chains) > 1:
        same = [a is b for a, b in zip(*chains[:2], strict=False)]
        at = same.index(False) - 1 if False in same else len(same) - 1
    else:
        at = next((at for at, each in enumerate(first) if isinstance(each, Tensor)), 1) - 1
    while at > 0 and isinstance(first[at], UNNAMED) and isinstance(first[at + 1], UNNAMED):
        at += 1
    return max(at, 0)


def _through(holding: Holding, at: int, path: str) -> frozenset[str]:
    below = holding.chain[at + 1 :]
    found = {name for name, kinds in KINDS.items() if any(isinstance(o, kinds) for o in below)}
    tensors = [each for each in holding.chain if isinstance(each, Tensor)]
    own_hook = any(tensor._backward_hooks is holding.chain[0] for tensor in tensors)
    if holding.graph or any(tensor.grad_fn is not None for tensor in tensors):
        found.add("graph")
    return frozenset(found | ({"hook"} if own_hook or "_hooks[" in path else set()))


def _pinned(chain: list[Any]) -> float:
    """What the storage has to what is looked at of it, by a tensor or by an array."""
    array, view, storage = [None, *chain][-3:]
    view = array if isinstance(array, np.ndarray) else view
    if not (has_storage(view) or isinstance(view, np.ndarray)) or not view.nbytes:
        return 1.0
    return storage.nbytes() / view.nbytes
