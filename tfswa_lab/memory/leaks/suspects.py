"""What piles up, who makes it and who holds it, in words and figures: no object is kept.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from types import CellType, CoroutineType, FrameType, GeneratorType, TracebackType
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import Node
from torch.optim import Optimizer

from tfswa_lab.memory.leaks.census import Census, Site
from tfswa_lab.memory.leaks.holders import Holders, Holding
from tfswa_lab.memory.leaks.spelling import LRU_CACHE
from tfswa_lab.memory.trace.stacks import Frame
from tfswa_lab.memory.trace.timeline import Block
from tfswa_lab.memory.trace.tracer import has_storage

SEVERAL = 6  # keys that would not be in order by chance
LIMITS = re.compile(r"_?(maxlen|max_?size|capacity|max_(items|entries|len))$", re.I)


class Container(NamedTuple):
    """What is known of a holder.

    Args:
        kind: name of its class.
        length: how many elements it has.
        limit: how many Python lets it have, None if there is no limit.
        claim: an attribute of its owner that reads like a limit, and may be kept to or not.
        by_size: whether its keys are the sizes of what it keeps, and not counted up.
        by_content: whether its keys are anything but numbers that are counted up.
    """

    kind: str
    length: int = 0
    limit: int | None = None
    claim: str = ""
    by_size: bool = False
    by_content: bool = False


def container_of(chain: Sequence[Any], at: int) -> Container:
    """What is known of a holder at a place in a chain.

    >>> from collections import deque
    >>> container = container_of([deque([1, 2], maxlen=5)], 0)
    >>> container.kind, container.length, container.limit
    ('deque', 2, 5)
    """
    holder, owners = chain[at], chain[max(0, at - 2) : at]
    keys = {"by_size": _by_size(holder), "by_content": _by_content(holder)}
    cache = holder if isinstance(holder, LRU_CACHE) else _owning_cache(holder, owners)
    if cache is not None:
        known = cache.cache_info()
        return Container("lru_cache", known.currsize, known.maxsize, **keys)
    length = len(holder) if isinstance(holder, Sized) and not isinstance(holder, Tensor) else 0
    limit = holder.maxlen if isinstance(holder, deque) else None
    claim = next(filter(None, (_claim(each, length) for each in (holder, *owners))), "")
    return Container(type(holder).__name__, length, limit, claim, **keys)


def _owning_cache(holder: Any, owners: Sequence[Any]) -> Any:
    """The `lru_cache` whose own dictionary a holder is; a cache with a limit shows none."""
    cache = owners[-1] if owners and isinstance(holder, dict) else None
    unlimited = isinstance(cache, LRU_CACHE) and cache.cache_info().maxsize is None
    return cache if unlimited else None


def _claim(owner: Any, length: int) -> str:
    """An attribute with the name of a limit and a value that is not exceeded; empty without."""
    for name, value in getattr(owner, "__dict__", {}).items():
        if LIMITS.match(name) and isinstance(value, int) and value >= max(length, 1):
            return f"{name} = {value}"
    return ""


def _by_size(holder: Any) -> bool:
    if not isinstance(holder, dict) or not holder:
        return False
    if len(holder) >= SEVERAL and _counted_up(holder):
        return False
    columns = _columns(holder)
    differing = {at for at, parts in enumerate(columns) if len(set(parts)) > 1 or len(parts) == 1}
    return all(_tells_size(key, value, differing) for key, value in list(holder.items()))


def _tells_size(key: Any, value: Any, places: set[int]) -> bool:
    """Whether a key has at one of some places a length of a tensor that it stands for."""
    parts = (part for at, part in enumerate(_flat(key)) if at in places)
    keys = {part for part in parts if type(part) is int and part > 1}
    tensors = [value] if isinstance(value, Tensor) else _flat(value)
    shapes = {n for each in tensors if isinstance(each, Tensor) for n in each.shape}
    return bool(keys & shapes)


def _flat(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _by_content(holder: Any) -> bool:
    return isinstance(holder, dict) and len(holder) > 1 and not _counted_up(holder)


def _counted_up(holder: dict) -> bool:
    """Whether a part of the keys is a number that grows from key to key, or has one in it."""
    columns = ([_number(part) for part in column] for column in _columns(holder))
    return any(None not in each and each == sorted(each) and each[0] < each[-1] for each in columns)


def _columns(holder: dict) -> list[tuple]:
    """The keys, part by part; none if they have different numbers of parts."""
    keys = [tuple(_flat(key)) for key in list(holder)]
    return list(zip(*keys, strict=True)) if len(set(map(len, keys))) == 1 else []


def _number(key: Any) -> int | float | None:
    """The last number in a key, None if there is none."""
    if isinstance(key, int | float):
        return key
    found = re.findall(r"\d+", key) if isinstance(key, str) else []
    return int(found[-1]) if found else None


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
