"""Spells a chain of holders as code: `trainer.history[…]`, a global of train.py.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from contextvars import Context
from functools import lru_cache
from pathlib import Path
from types import (
    AsyncGeneratorType,
    CellType,
    CoroutineType,
    FrameType,
    FunctionType,
    GeneratorType,
)
from typing import Any, NamedTuple

from torch import Tensor

from tfswa_lab.memory.leaks.referrers import is_globals, locals_of

LRU_CACHE = type(lru_cache(len))
# Attributes that are not in the dictionary of an instance.
BUILT_IN = (
    *("__traceback__", "__context__", "__cause__", "args", "tb_frame", "tb_next", "f_back"),
    *("gi_frame", "__self__", "__func__", "func", "keywords", "__defaults__", "__kwdefaults__"),
)
SUSPENDED = (FrameType, GeneratorType, CoroutineType, AsyncGeneratorType)
OF_FRAMES = ("gi_frame", "cr_frame", "ag_frame")


class Spelled(NamedTuple):
    """A holder as code, and where it, or the first name on the way to it, is defined."""

    expression: str
    where: str


def spell(chain: Sequence[Any], roots: dict[int, str]) -> Spelled:
    """The last object of a chain, spelled from the first.

    Args:
        chain: objects, each of which holds the next one.
        roots: names of objects, by their identity.

    >>> history = [[], ["tensor"]]
    >>> names = {"__builtins__": {}, "__name__": "train", "history": history}
    >>> spell([names, history, history[1]], {})
    Spelled(expression='history[1]', where='reached from `history`, global of train')
    """
    first, where = _beginning(chain[0], roots)
    expression = _readable(_joined(first, chain))
    outputs = outputs_of(chain[0])
    if outputs is not None and outputs is next(iter(chain[1:]), None):
        where = f"IPython's outputs, also `_oh` and variables such as `_{max(outputs, default=1)}`"
    else:
        where = _reached(expression, first, where)
    return Spelled(expression, where)


def code(chain: Sequence[Any], roots: dict[int, str]) -> str:
    """The last object of a chain as code that Python may be able to run.

    >>> net = {"a-b": ["tensor"]}
    >>> code([{"__builtins__": {}, "net": net}, net, net["a-b"]], {})
    "net['a-b']"
    """
    first, _ = _beginning(chain[0], roots)
    return _joined(first, chain).removeprefix(".")


def _joined(first: str, chain: Sequence[Any]) -> str:
    return "".join([first, *(_access(chain, at) for at in range(1, len(chain)))])


_FIRST = re.compile(r"(<local of [^>]*>\.)?[^.\[]*")


def _reached(expression: str, first: str, where: str) -> str:
    """Where a holder is defined, or the name that leads to it."""
    if not first or not expression.startswith(first):
        first = _FIRST.match(expression)[0]
    rest = expression.removeprefix(first)
    if not rest or where.endswith("given") or (where == OF_CLASS and _FIRST.fullmatch(rest[1:])):
        return where
    return f"reached from `{first}`, {where.removeprefix('attribute of ')}"


def outputs_of(namespace: Any) -> dict | None:
    """IPython's outputs by number, if these are the variables of its user."""
    if type(namespace) is dict and "get_ipython" in namespace:
        return namespace.get("_oh")
    return None


OUTPUT = re.compile(r"_\d+|_{1,3}")  # variables that IPython makes of outputs


def by_outputs(chain: list[Any]) -> list[Any]:
    """A chain that leads through IPython's outputs, if it did through a variable of IPython's."""
    outputs = outputs_of(chain[0]) if len(chain) > 1 else None
    if not outputs or not any(value is chain[1] for value in outputs.values()):
        return chain
    names = [name for name, value in list(chain[0].items()) if value is chain[1]]
    if not all(OUTPUT.fullmatch(name) for name in names):  # the user gave it a name, too
        return chain
    return [chain[0], outputs, *chain[1:]]


OF_CLASS = "attribute of a class"


def _beginning(top: Any, roots: dict[int, str]) -> tuple[str, str]:
    if is_globals(top) or (type(top) is dict and "__spec__" in top):
        file = top.get("__file__")
        return "", f"global of {Path(file).name if file else top.get('__name__', 'exec')}"
    if isinstance(top, FrameType):
        code = top.f_code
        return "", f"local of `{code.co_qualname}`, {Path(code.co_filename).name}:{top.f_lineno}"
    if id(top) in roots and isinstance(top, FunctionType):
        return "", f"closed over by `{top.__qualname__}`"
    if id(top) in roots:
        return roots[id(top)], f"in the {type(top).__name__} that was given"
    if isinstance(top, type):
        return top.__qualname__, OF_CLASS
    return type(top).__name__, "held by C++ or the interpreter itself"


def _access(chain: Sequence[Any], at: int) -> str:
    """The code that leads from a holder to the next object of a chain, such as `.name`."""
    holder, held = chain[at - 1], chain[at]
    if isinstance(holder, dict):
        return _item(holder, held, at < 2 or _is_namespace(chain[at - 2], holder))
    if isinstance(holder, list | tuple | deque):
        return "" if isinstance(held, CellType) else f"[{_index(holder, held)}]"
    if isinstance(holder, CellType):
        return _free_variable(chain, at)
    if isinstance(holder, SUSPENDED):
        return _local(holder, held)
    if isinstance(holder, LRU_CACHE):
        return ""
    if isinstance(holder, Context):
        return _variable(holder, chain[at + 1 :])
    if type(holder).__name__.startswith("hamt"):  # the mapping inside a context
        return ""
    if isinstance(holder, Tensor):
        return ".grad" if holder.is_leaf and holder.grad is held else ""
    if _is_namespace(holder, held) or getattr(holder, "__closure__", None) is held:
        return ""
    return _attribute(holder, held)


def _item(holder: dict, held: Any, named: bool) -> str:
    keys = [key for key, value in list(holder.items()) if value is held or key is held]
    if not keys:
        return "[…]"
    key = next((key for key in keys if not str(key).startswith("_")), keys[0])
    return f".{key}" if named and isinstance(key, str) else f"[{_key(key)}]"


def _key(key: Any) -> str:
    text = repr(key) if isinstance(key, str | int | float | tuple) else type(key).__name__
    return text if len(text) < 30 and "tensor(" not in text else "…"


def _is_namespace(owner: Any, names: Any) -> bool:
    """Whether a dictionary has the attributes of an object."""
    return isinstance(names, dict) and (
        getattr(owner, "__dict__", None) is names or isinstance(owner, type)
    )


def _index(holder: Sequence[Any], held: Any) -> int | str:
    return next((at for at, each in enumerate(holder) if each is held), "…")


def _free_variable(chain: Sequence[Any], at: int) -> str:
    """The name of a closed-over variable, in a chain of function, tuple, cell and value."""
    function = chain[at - 3] if at >= 3 else None
    if not isinstance(function, FunctionType):
        return ".<closure>"
    name = function.__code__.co_freevars[_index(function.__closure__, chain[at - 1])]
    return f".{name}" if at == 3 else f".<closure of {function.__name__}>.{name}"


def _variable(context: Context, below: Sequence[Any]) -> str:
    """The name of a context variable, in a chain of context, nodes of its mapping and value."""
    names = (key.name for key, value in context.items() if any(value is each for each in below))
    return f"[{next(names, '…')}]"


def _local(holder: Any, held: Any) -> str:
    frame = next((getattr(holder, name) for name in OF_FRAMES if hasattr(holder, name)), holder)
    name = next((name for name, value in locals_of(frame) if value is held), "…")
    return f".<local of {frame.f_code.co_name}>.{name}"


def _attribute(holder: Any, held: Any) -> str:
    slots = [name for kind in type(holder).__mro__ for name in _slots(kind)]
    for name in (*getattr(holder, "__dict__", {}), *slots, *BUILT_IN):
        if getattr(holder, name, None) is held:
            return f".{name}"
    return f".<{type(held).__name__}>"


def _slots(kind: type) -> Sequence[str]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _readable(expression: str) -> str:
    text = re.sub(r"^\.?__wrapped__\.<closure of [^>]*>\.", "", expression)
    text = re.sub(r"\.<dict>\[ReferenceType\]\['(\w+)'\]", r".\1", text)  # of a thread
    text = re.sub(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", r".\1", text)
    return re.sub(r"((?:\.[\w<> ]+|\[[^]]*\])+?)\1{2,}", r"\1…", text).removeprefix(".")
