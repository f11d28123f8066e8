"""Lines whose blocks pile up, with the objects that hold them; only names and numbers are kept.

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
from torch.optim import Optimizer

from tfswa_lab.memory.leaks.census import Census, Site, fills_up
from tfswa_lab.memory.leaks.holders import Holders, Holding
from tfswa_lab.memory.leaks.spelling import LRU_CACHE
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
        where: where the first name in `holder` is defined.
        container: that object, as a container.
        path: one of the blocks, as code, such as `trainer.history[3]`.
        through: links between the holder and a block: names of `KINDS`, `graph`, `hook`.
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

    @property
    def of_optimizer(self) -> bool:
        """Whether an optimizer made or holds the blocks."""
        return self.phase == "optimizer" or "optimizer" in self.through

    def is_bounded(self, steps: int) -> bool:
        """Whether the container will stop growing: by its limit, or because its keys come again.

        Steps that add no key prove nothing, because new keys may be rare. They must become rarer.

        Args:
            steps: the number of steps that were run.
        """
        container = self.container
        keys_again = container.by_content and fills_up(self.births, steps)
        return container.limit is not None or keys_again

    @property
    def condition(self) -> str:
        """A condition that would bound it but that no step has shown; empty if there is none."""
        if self.container.claim:
            return f"the program enforces `{self.container.claim}`"
        return "its keys come again" if self.container.by_content else ""

    def __str__(self) -> str:
        unseen = "made at an unknown line: in another thread, from an array, or sparse"
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
        return f"held by `{self.holder}` ({what}, {self.where}){graph}{path}"


def suspects_of(
    sites: Sequence[Site],
    census: Census,
    holders: Holders,
    storages: dict[Block, ref[UntypedStorage]],
) -> list[Suspect]:
    """The holders of the blocks of some lines; lines whose blocks are gone by now are left out.

    Args:
        sites: the lines.
        census: of the steps.
        holders: finds them.
        storages: of all blocks that were alive at the end.
    """
    samples = [_samples(site.alive, census, storages) for site in sites]
    every = [storage for each in samples for storage in each]
    holders.paths.ignore(samples, every, *samples)
    holders.look_up(every)
    pairs = zip(sites, samples, strict=True)
    return [
        _suspect(site, [holders.of(s) for s in found], holders) for site, found in pairs if found
    ]


def _suspect(site: Site, holdings: list[Holding], holders: Holders) -> Suspect:
    chain, at = holdings[0].chain, _joint([each.chain for each in holdings])
    top = at if len(holdings) > 1 else 0
    holder, path = holders.spell(chain[: at + 1]), holders.spell(chain[:-1]).expression
    return Suspect(
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


LIMITS = re.compile(r"_?(maxlen|max_?size|capacity|max_(items|entries|len))$", re.I)


class Container(NamedTuple):
    """A holder as a container.

    Args:
        kind: name of its class.
        length: the number of its elements.
        limit: the number at which Python removes elements, None without.
        claim: an attribute that has the name of a limit, enforced or not, such as `capacity = 9`.
        by_content: whether its keys are anything but running numbers.
    """

    kind: str
    length: int = 0
    limit: int | None = None
    claim: str = ""
    by_content: bool = False


def container_of(chain: Sequence[Any], at: int) -> Container:
    """The holder at a place in a chain, as a container.

    >>> from collections import deque
    >>> container = container_of([deque([1, 2], maxlen=5)], 0)
    >>> container.kind, container.length, container.limit
    ('deque', 2, 5)
    """
    holder, owners = chain[at], chain[max(0, at - 2) : at]
    by_content = _by_content(holder)
    cache = holder if isinstance(holder, LRU_CACHE) else _owning_cache(holder, owners)
    if cache is not None:
        known = cache.cache_info()
        return Container("lru_cache", known.currsize, known.maxsize, by_content=by_content)
    length = len(holder) if isinstance(holder, Sized) and not isinstance(holder, Tensor) else 0
    limit = holder.maxlen if isinstance(holder, deque) else None
    claim = next(filter(None, (_claim(each, length) for each in (holder, *owners))), "")
    return Container(type(holder).__name__, length, limit, claim, by_content)


def _owning_cache(holder: Any, owners: Sequence[Any]) -> Any:
    """The `lru_cache` whose own dictionary a holder is; a cache with a limit shows none."""
    cache = owners[-1] if owners and isinstance(holder, dict) else None
    unlimited = isinstance(cache, LRU_CACHE) and cache.cache_info().maxsize is None
    return cache if unlimited else None


def _claim(owner: Any, length: int) -> str:
    """An attribute with the name of a limit, and a value that is not exceeded; empty without."""
    for name, value in getattr(owner, "__dict__", {}).items():
        if LIMITS.match(name) and isinstance(value, int) and value >= max(length, 1):
            return f"{name} = {value}"
    return ""


def _flat(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _by_content(holder: Any) -> bool:
    return isinstance(holder, dict) and len(holder) > 1 and not _has_running_number(holder)


def _has_running_number(holder: dict) -> bool:
    """Whether a part of the keys is, or contains, a number that grows from key to key."""
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
