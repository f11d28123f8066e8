"""Whether an object that holds tensors will hold ever more of them.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Sized
from typing import Any, NamedTuple

from torch import Tensor, nn

from tfswa_lab.memory.diagnosis.path_words import LRU_CACHE

SEVERAL = 6  # keys that would not be in order by chance
LIMITS = re.compile(r"_?(maxlen|max_?size|capacity|max_(items|entries|len))$", re.I)


class Container(NamedTuple):
    """What is known of a holder.

    Args:
        kind: name of its class.
        length: how many elements it has.
        limit: how many it can have, None if there is no limit.
        by_size: whether its keys are the sizes of what it keeps, and not counted up.
        by_content: whether its keys are anything but numbers that are counted up.

    Notebook: 06_leak_diagnosis
    """

    kind: str
    length: int = 0
    limit: int | None = None
    by_size: bool = False
    by_content: bool = False


def container_of(chain: Sequence[Any], at: int) -> Container:
    """What is known of a holder at a place in a chain.

    Notebook: 06_leak_diagnosis

    >>> from collections import deque
    >>> container_of([deque([1, 2], maxlen=5)], 0)
    Container(kind='deque', length=2, limit=5, by_size=False, by_content=False)
    """
    holder, owners = chain[at], chain[max(0, at - 2) : at]
    cache = next((each for each in (holder, *owners) if isinstance(each, LRU_CACHE)), None)
    length = len(holder) if isinstance(holder, Sized) and not isinstance(holder, Tensor) else 0
    if cache is not None:
        length, limit = cache.cache_info().currsize, cache.cache_info().maxsize
        return Container("lru_cache", length, limit, _by_size(holder), _by_content(holder))
    limit = getattr(holder, "maxlen", None)
    if limit is None:
        limit = next((found for each in owners if (found := _limit(each, length))), None)
    return Container(type(holder).__name__, length, limit, _by_size(holder), _by_content(holder))


def _limit(owner: Any, length: int) -> int | None:
    """A number of an object that its own methods hold against how many elements it has."""
    if isinstance(owner, nn.Module):
        return None
    for name, value in getattr(owner, "__dict__", {}).items():
        enough = isinstance(value, int) and value >= max(length, 1)
        if LIMITS.match(name) and enough and _is_used(owner, name):
            return value
    return None


def _is_used(owner: Any, name: str) -> bool:
    """Whether a method reads an attribute, besides the one that sets it."""
    methods = (each for kind in type(owner).__mro__ for each in vars(kind).items())
    codes = (getattr(method, "__code__", None) for key, method in methods if key != "__init__")
    return any(code is not None and name in code.co_names for code in codes)


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
