"""What a holder is as a container, and whether something bounds it.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence, Sized
from inspect import unwrap
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from tfswa_lab.memory.leaks.spelling import LRU_CACHE

CONTAINERS = (list, dict, set, deque, LRU_CACHE)
LIMITS = re.compile(
    r"_?(max_?(len|length|size)|max_(items|entries)|capacity|limit|size|window|"
    r"(history|window|buffer|cache|queue)_?(size|len|length|limit))$",
    re.I,
)


class Container(NamedTuple):
    """A holder as a container.

    Args:
        kind: name of its class.
        length: the number of its elements.
        limit: the number at which Python or torch removes elements, None without.
        limited_by: the name of that number.
        claim: an attribute that has the name of a limit, enforced or not, such as `capacity = 9`.
        by_content: whether its keys are anything but running numbers.
        in_optimizer: whether it is a part of one parameter's state in an optimizer.
    """

    kind: str
    length: int = 0
    limit: int | None = None
    limited_by: str = "maxlen"
    claim: str = ""
    by_content: bool = False
    in_optimizer: bool = False


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
        limits = (known.maxsize, "maxsize")
        return Container("lru_cache", known.currsize, *limits, by_content=by_content)
    length = len(holder) if isinstance(holder, Sized) and not isinstance(holder, Tensor) else 0
    optimizer = next((each for each in chain[:at] if isinstance(each, Optimizer)), None)
    if (history := _history(optimizer, chain[at:])) is not None:
        limits = (optimizer.param_groups[0]["history_size"], "history_size")
        return Container(type(holder).__name__, len(history), *limits, in_optimizer=True)
    limit = holder.maxlen if isinstance(holder, deque) else None
    owners = [*owners, *([optimizer, *optimizer.param_groups] if optimizer else ())]
    claim = next(filter(None, (_claim(each, length) for each in (holder, *owners))), "")
    inside = optimizer is not None and any(each is optimizer.state for each in chain[:at])
    kind = type(holder).__name__
    return Container(kind, length, limit, "maxlen", claim, by_content, inside)


LBFGS_LISTS = ("old_dirs", "old_stps", "ro")


def _history(optimizer: Optimizer | None, below: Sequence[Any]) -> list | None:
    """The list of earlier steps that L-BFGS keeps and shortens to its `history_size`."""
    if not isinstance(optimizer, LBFGS) or _mentions_lists(type(optimizer)):
        return None
    states = optimizer.state.values()
    kept = [state.get(name) for state in states for name in LBFGS_LISTS]
    return next((each for each in below[:2] if any(each is own for own in kept)), None)


def _mentions_lists(kind: type[LBFGS]) -> bool:
    """Whether a subclass may do something else with these lists than torch."""
    own = kind.__mro__[: kind.__mro__.index(LBFGS)]
    functions = (unwrap(each) for cls in own for each in vars(cls).values() if callable(each))
    codes = [each.__code__ for each in functions if hasattr(each, "__code__")]
    return any(not set(LBFGS_LISTS).isdisjoint(code.co_consts) for code in codes)


def _owning_cache(holder: Any, owners: Sequence[Any]) -> Any:
    """The `lru_cache` whose own dictionary a holder is; a cache with a limit shows none."""
    cache = owners[-1] if owners and isinstance(holder, dict) else None
    unlimited = isinstance(cache, LRU_CACHE) and cache.cache_info().maxsize is None
    return cache if unlimited else None


def _claim(owner: Any, length: int) -> str:
    """An attribute with the name of a limit, and a value that is not exceeded; empty without."""
    group = isinstance(owner, dict) and "params" in owner  # of an optimizer: keys are attributes
    for name, value in (owner if group else getattr(owner, "__dict__", {})).items():
        if LIMITS.match(name) and type(value) is int and value >= max(length, 1):
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
