"""What a holder is, which of its parts hold most, and the code that leads there.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage

from tfswa_lab.memory.leaks.autograd_graph import is_node
from tfswa_lab.memory.leaks.spelling import code, spell
from tfswa_lab.memory.trace.tracer import has_storage
from tfswa_lab.memory.who.heap import Memory, Ways
from tfswa_lab.memory.who.names import Kept, careful, emptying

SHARE = 0.05  # of a holder's bytes: smaller parts are not named
CANDIDATES = 40  # containers in a holder that are looked at
MOST = 3  # parts of a holder that are named
SIZED = (dict, list, set, tuple, deque)
PINNED = 2  # times its own size that a view keeps alive
NAMED = (FunctionType, BuiltinFunctionType, MethodType)
GRAPH = " through its graph"
OWN = ("_parameters", "_buffers", "_modules")  # of a network, these must not be emptied


def what_it_is(ways: Ways, kept: Kept, storages: Sequence[int]) -> str:
    """What a thing is, and where in it the largest tensor is."""
    thing = kept.names[0].thing
    path = spelled(ways, kept, max(storages, key=lambda at: ways.sizes[at]))
    largest = f", most in {path}" if path else ""
    if issubclass(type(thing), Tensor):
        return f"{_tensor(thing)}{' and its graph' * (GRAPH in path)}"
    if len(kept.starts) > 1:
        return largest.removeprefix(", ")
    return f"{_kind(thing)}{largest}"


def _tensor(tensor: Tensor) -> str:
    """The shape of a tensor, and what makes it larger than its shape."""
    with torch._C.DisableTorchFunctionSubclass():
        shape = " × ".join(map(str, tensor.shape)) or "one number"
        gradient = " and its gradient" if tensor.is_leaf and tensor.grad is not None else ""
        if not has_storage(tensor) or not tensor.nbytes:
            return f"a tensor of {shape}"
        times = tensor.untyped_storage().nbytes() / tensor.nbytes
    pins = f", a view that pins {times:.0f} times its size" if times >= PINNED else ""
    return f"a tensor of {shape}{gradient}{pins}"


def first_holder(ways: Ways, storage: int) -> str:
    """The object at which a way to a storage begins, if no name leads there."""
    at, last, seen = storage, storage, set()
    while at is not None:
        last = at
        seen.add(at)
        above = (each for each in ways.links.backwards(at) if each not in seen)
        at = next((h for h in above if type(ways.things[h]) is not UntypedStorage), None)
    thing = ways.things[last]
    name = getattr(thing, "__qualname__", "") if type(thing) in NAMED else ""
    return f"held by C++ or the interpreter through {_kind(thing)}{f' `{name}`' if name else ''}"


def parts_of_thing(
    ways: Ways, kept: Kept, alone: np.ndarray
) -> Iterator[tuple[str, str, int, str]]:
    """Containers, hooks and caches in a thing that hold much and can be emptied alone.

    Args:
        ways: to the storages.
        kept: the thing.
        alone: a mask of what only this thing leads to.

    Returns:
        Name, what it is, bytes and line of each.
    """
    name, emptied, held = kept.names[0].text, [], ways.sizes[alone].sum()
    least = SHARE * held
    order, before = ways.links.from_one(kept.starts[0])
    near = [at for at in order[1:] if alone[at] and _is_container(ways, at, int(before[at]))]
    for at in near[:CANDIDATES]:
        after = ways.links.without([*emptied, at]).reached(kept.starts) & alone
        size, thing = held - ways.sizes[after].sum(), ways.things[at]
        code = size > least and _code(ways, kept, at)
        if code:
            path = spelled(ways, kept, at)
            yield path, _kind(thing), int(size), emptying(name + code, thing)
            emptied.append(at)
            held -= size
        if len(emptied) == MOST:
            return


def _is_container(ways: Ways, at: int, owner: int) -> bool:
    """Whether a thing can be emptied, and is not where its owner's attributes are."""
    thing = ways.things[at]
    try:
        names = object.__getattribute__(ways.things[owner], "__dict__")
    except AttributeError:
        names = None
    return bool(emptying("it", thing)) and names is not thing


def spelled(ways: Ways, kept: Kept, end: int) -> str:
    """The way from a thing to a number, in words; empty if there is nothing to add to its name."""
    way = [ways.things[at] for at in ways.links.way(kept.starts[0], end)]
    known = (at for at, each in enumerate(way) if is_node(type(each)))
    graph = next(known, 0)  # 0: none, or the thing itself is a node of a graph
    chain = [thing for thing in way[: graph or None] if type(thing) is not Memory]
    name = kept.names[0].text
    path = careful(lambda: spell(*_rooted(chain, name)).expression) or name
    path = re.sub(r"\.<\w+>(?=$|\[)", "", path)  # such as the list in an iterator
    path = re.sub(r".*<local of (.+?)>\.(.*)", r"\2 in \1", path)
    path = re.sub(r"\.(\d+)(?=[.[]|$)", r"[\1]", path)  # of a Sequential or ModuleList
    return f"{path}{GRAPH}" if graph else path * (path != name)


def _code(ways: Ways, kept: Kept, end: int) -> str:
    """Code that leads from a thing to another one, such as `.history`; empty if there is none."""
    chain = [ways.things[at] for at in ways.links.way(kept.starts[0], end)]
    paths = [spelled(ways, kept, end), careful(lambda: code(*_rooted(chain, "it")))]
    name = kept.names[0].text
    for path, start in zip(paths, (name, "it"), strict=True):
        rest = path.removeprefix(start)
        leads = careful(lambda rest=rest: eval(f"it{rest}", {"it": chain[0]})) is chain[-1]
        if rest != path and rest and leads and rest.rpartition(".")[2] not in OWN:
            return rest
    return ""


def _rooted(chain: list[Any], name: str) -> tuple[list[Any], dict[int, str]]:
    """A chain that begins with a name, and names by identity."""
    if isinstance(chain[0], FunctionType):
        return chain, {id(chain[0]): name}
    return [{"__builtins__": {}, name: chain[0]}, *chain], {}


def class_name(kind: type) -> str:
    """The name of a class, not by code of its metaclass."""
    return type.__getattribute__(kind, "__name__")


def _kind(thing: Any) -> str:
    """The class of a thing, and how many elements it has."""
    name = class_name(type(thing))
    sized = (kind for kind in SIZED if issubclass(type(thing), kind))
    count = "".join(f" of {kind.__len__(thing)}" for kind in sized)
    return f"{'an' if re.match('[aeiou]|nd', name, re.I) else 'a'} {name}{count}"
