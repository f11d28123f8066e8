"""What a holder is, which of its parts hold most, and the code that leads there.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import ast
import re
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from tfswa_lab.memory.leaks.spelling import spell
from tfswa_lab.memory.trace.tracer import has_storage
from tfswa_lab.memory.who.heap import Memory, Ways
from tfswa_lab.memory.who.names import Kept, emptying

SHARE = 0.05  # of a holder's bytes: smaller parts are not named
CANDIDATES = 40  # containers in a holder that are looked at
PINNED = 2  # times its own size that a view keeps alive
GRAPH = " through its graph"
OWN = ("_parameters", "_buffers", "_modules")  # of a network, these must not be emptied


def what_it_is(ways: Ways, kept: Kept, storages: Sequence[int]) -> str:
    """What a thing is, and where in it the largest tensor is."""
    thing = kept.names[0].thing
    path = spelled(ways, kept, max(storages, key=lambda at: ways.sizes[at]))
    largest = f", most in {path}" if path else ""
    if isinstance(thing, Tensor):
        shape = " × ".join(map(str, thing.shape)) or "one number"
        graph = " and its graph" if GRAPH in path else ""
        times = thing.untyped_storage().nbytes() / thing.nbytes if _has_bytes(thing) else 1
        pins = f", a view that pins {times:.0f} times its size" if times >= PINNED else ""
        return f"a tensor of {shape}{graph}{pins}"
    if len(kept.starts) > 1:
        return f"the variables of the functions it passed through{largest}"
    size = f" of {len(thing)}" if type(thing) in (dict, list, set, tuple, deque) else ""
    return f"{_article(type(thing).__name__)}{size}{largest}"


def first_holders(ways: Ways, storages: Sequence[int]) -> str:
    """The kinds of objects that hold storages to which no name leads."""
    source, target, _ = ways.links
    holders = {type(ways.things[at]).__name__ for at in source[np.isin(target, storages)]}
    return "held by C++ or the interpreter, through " + ", ".join(sorted(holders)[:4])


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
        size = held - ways.sizes[after].sum()
        path, thing = spelled(ways, kept, at), ways.things[at]
        if size > least and _is_code(path, name):
            count = f" of {len(thing)}" if hasattr(thing, "__len__") else ""
            what = _article(type(thing).__name__) + count
            yield path, what, int(size), emptying(path, thing)
            emptied.append(at)
            held -= size


def _is_container(ways: Ways, at: int, owner: int) -> bool:
    """Whether a thing can be emptied, and is not where its owner's attributes are."""
    thing = ways.things[at]
    return (
        bool(emptying("it", thing)) and getattr(ways.things[owner], "__dict__", None) is not thing
    )


def spelled(ways: Ways, kept: Kept, end: int) -> str:
    """The way from a thing to a number, as code; empty if there is nothing to add to its name."""
    way = [ways.things[at] for at in ways.links.way(kept.starts[0], end)]
    known = (at for at, each in enumerate(way) if hasattr(type(each), "next_functions"))
    graph = next(known, 0)  # 0: none, or the thing itself is a node of a graph
    chain = [thing for thing in way[: graph or None] if type(thing) is not Memory]
    name = kept.names[0].text
    path = spell(chain, {id(chain[0]): name}).expression.removesuffix(".<Tensor>")
    path = re.sub(r".*<local of (.+?)>\.(.*)", r"\2 in \1", path)
    path = re.sub(r"\.(\d+)(?=[.[]|$)", r"[\1]", path)  # of a Sequential or ModuleList
    return f"{path}{GRAPH}" if graph else path * (path != name)


def _has_bytes(tensor: Tensor) -> bool:
    return has_storage(tensor) and tensor.nbytes > 0


def _article(name: str) -> str:
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def _is_code(path: str, name: str) -> bool:
    """Whether a path is code that leads from a name to something that may be emptied."""
    try:
        ast.parse(path)
    except SyntaxError:
        return False
    return path.startswith(name) and path.split(".")[-1] not in OWN
