"""Under which names a session keeps things, and the line of code that drops each.

Names are variables, IPython's outputs, the last error, open figures, attributes of modules and
classes, and the variables of running functions.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import re
import sys
from asyncio import Task
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextvars import Context, copy_context
from functools import cache
from pathlib import Path
from traceback import clear_frames, walk_tb
from types import CoroutineType, GeneratorType, ModuleType, TracebackType
from typing import Any, NamedTuple

from tfswa_lab.memory.leaks.referrers import (
    OUR_MODULES,
    loaded_modules,
    locals_of,
    running_locals,
)
from tfswa_lab.memory.leaks.spelling import LRU_CACHE, OUTPUT
from tfswa_lab.memory.trace.stacks import is_library

LAST_ERROR = ("last_exc", "last_value", "last_traceback", "last_type")  # of `sys`
PYPLOT = "matplotlib._pylab_helpers"
WIDGETS = "ipywidgets.widgets.widget"
# They keep a session going. What they hold for it is named as outputs and as the last error.
MACHINERY = ("IPython", "ipykernel", "zmq", "tornado", "jupyter_client", "comm", OUR_MODULES)
EVENT_LOOP = re.compile(r"asyncio\.(events|\w*base_events|unix_events|selector_events|runners)\b")


class Name(NamedTuple):
    """A name under which a session keeps a thing.

    Args:
        text: such as `net`, `Out[21]` or `figure 3`.
        thing: what has the name.
        drop: a line of Python that removes the name, or empties the thing; empty if no line can.
        variable: the user's variable, if the name is one.
        empties: whether the line empties the thing, so that other names of it do not matter.
        together: things that one line drops have the same word here; the last error is several.
    """

    text: str
    thing: Any
    drop: str = ""
    variable: str = ""
    empties: bool = False
    together: str = ""


class Kept(NamedTuple):
    """A thing of the session, and all its names."""

    names: list[Name]
    starts: list[int]  # numbers of the thing on the ways; an error has several

    @property
    def text(self) -> str:
        """The first name, and others."""
        first, *others = dict.fromkeys(name.text for name in self.names)
        return f"{first} (also {', '.join(others)})" if others else first


class Session:
    """The names of a session.

    Args:
        shell: IPython's, or None.
    """

    def __init__(self, shell: Any = None):
        self._shell = shell
        self._variables = shell.user_ns if shell else vars(sys.modules["__main__"])
        self._hidden = getattr(shell, "user_ns_hidden", {})
        self._callbacks = getattr(getattr(shell, "events", None), "callbacks", {})

    def names(self) -> Iterator[Name]:
        """All names but those of classes."""
        yield from self._of_variables()
        yield from self._outputs()
        yield from _last_error(self._shell)
        yield from _figures()
        yield from _widgets()
        yield from _context()
        for name, module in list(sys.modules.items()):
            if not isinstance(module, ModuleType):  # lazy modules may be of any class
                item = f"sys.modules[{name!r}]"
                yield Name(item, module, f"import sys; del {item}")
            elif vars(module) is not self._variables:
                yield from _of_module(module)
        yield from _of_running()

    def of_classes(self, objects: Iterable[Any]) -> Iterator[Name]:
        """The attributes of all classes among some objects."""
        for kind in objects:
            if issubclass(type(kind), type):
                yield from careful(lambda kind=kind: list(self._of_class(kind))) or ()

    def ends(self, objects: Iterable[Any]) -> Iterator[Any]:
        """Objects at which names begin: namespaces, classes, and the machinery of IPython."""
        yield from (self._variables, self._variables.get("_oh"), self._hidden, sys.modules)
        yield from self._callbacks.values()
        for module in loaded_modules():
            yield vars(module)
            if vars(module) is not self._variables:
                yield from _registries(module)
        for thing in objects:
            if issubclass(type(thing), type) or type(thing) is Context:
                yield thing
            elif _is_machinery(type(thing)):
                yield thing
                yield getattr(thing, "__dict__", None)
                yield getattr(thing, "_trait_values", None)

    def _of_variables(self) -> Iterator[Name]:
        for name, thing in list(self._variables.items()):
            if self._shell and OUTPUT.fullmatch(name):
                continue
            if issubclass(type(thing), LRU_CACHE):
                yield Name(name, thing, f"{name}.cache_clear()", empties=True)
            elif issubclass(type(thing), Task) and not thing.done():  # the event loop keeps it, too
                yield Name(name, thing, f"{name}.cancel(); del {name}", empties=True)
            else:
                yield Name(name, thing, f"del {name}", name)

    def _outputs(self) -> Iterator[Name]:
        """IPython keeps an output in `Out`, in variables, and in what displays it."""
        if not self._shell:
            return
        for key, thing in list(self._variables.get("_oh", {}).items()):
            if f"_{key}" in self._variables:
                yield Name(f"Out[{key}]", thing, f"%xdel _{key}", f"_{key}")
            else:
                yield Name(f"Out[{key!r}]", thing, f"del Out[{key!r}]")
        for name, thing in list(self._variables.items()):
            if OUTPUT.fullmatch(name):
                yield Name(name, thing, f"%xdel {name}", name)
        for name, thing in list(self._hidden.items()):  # `%reset out` forgets these
            if OUTPUT.fullmatch(name) and self._variables.get(name) is not thing:
                line = f"del get_ipython().user_ns_hidden[{name!r}]"
                yield Name(f"IPython's hidden {name}", thing, line)
        for event, callbacks in self._callbacks.items():
            for number, thing in enumerate(callbacks):
                line = f"del get_ipython().events.callbacks[{event!r}][{number}]"
                yield Name(f"IPython's event {event}", thing, line)

    def _of_class(self, kind: type) -> Iterator[Name]:
        module, name = kind.__module__, kind.__qualname__
        if module == PYPLOT:
            return
        mine = self._variables.get(name) is kind
        for attribute, thing in list(vars(kind).items()):
            path = f"{'' if mine else f'{module}.'}{name}.{attribute}"
            if "<locals>" in name:  # no code leads to it
                yield Name(path, thing)
            else:
                yield _of_attribute("" if mine else module, path, thing)


def _last_error(shell: Any) -> Iterator[Name]:
    """The last error keeps the variables of all functions that it passed through."""
    errors, tracebacks = last_errors()
    known = type(errors[0]).__name__ if errors else "sys.last_traceback"
    forget = "from tfswa_lab.memory.who import forget_error; forget_error()"
    for thing in (*errors, *tracebacks):
        line = "%memory forget" if shell else forget
        yield Name(f"the last error ({known})", thing, line, empties=True, together="error")


def last_errors() -> tuple[list[BaseException], list[TracebackType]]:
    """The last error that reached the prompt, those that led to it, and their tracebacks."""
    errors, waiting = [], [getattr(sys, "last_value", None)]
    while waiting:
        error = waiting.pop()
        if error is not None and all(error is not known for known in errors):
            errors.append(error)
            waiting += [error.__cause__, error.__context__]
            if isinstance(error, BaseExceptionGroup):
                waiting += error.exceptions
    tracebacks = [getattr(sys, "last_traceback", None), *(e.__traceback__ for e in errors)]
    return errors, [each for each in tracebacks if each is not None]


def forget_error() -> None:
    """Free the variables of the functions that the last error passed through; its text stays.

    `traceback.clear_frames` does the same, but for what a debugger has looked at: before Python
    3.13, a frame keeps a copy of variables that were read, and does not clear it.

    >>> forget_error()
    """
    for traceback in last_errors()[1]:
        clear_frames(traceback)
        for frame, _ in walk_tb(traceback):
            locals_of(frame)


def _figures() -> Iterator[Name]:
    """Open figures of pyplot; an array that was plotted is kept in its figure."""
    pyplot = sys.modules.get(PYPLOT)
    for number, manager in list(pyplot.Gcf.figs.items() if pyplot else ()):
        line = f"import matplotlib.pyplot as plt; plt.close({number})"
        yield Name(f"figure {number}", manager, line)


def _context() -> Iterator[Name]:
    """Context variables. A task keeps a copy of all of them, so no line is sure to free one."""
    for variable, thing in copy_context().items():
        yield Name(f"context variable {variable.name}", thing)


def _widgets() -> Iterator[Name]:
    """Open widgets, and with them the functions that they call."""
    widgets = sys.modules.get(WIDGETS)
    line = "import ipywidgets; ipywidgets.Widget.close_all()"
    for widget in list(getattr(widgets, "_instances", {}).values()):
        yield Name("open widgets", widget, line, together="widgets")


def _of_module(module: ModuleType) -> Iterator[Name]:
    name = vars(module).get("__name__", "")
    if name in (PYPLOT, WIDGETS):  # what they keep has names of its own
        return
    registries = {id(registry) for registry in _registries(module)}
    for attribute, thing in list(vars(module).items()):
        path = f"{name}.{attribute}"
        if id(thing) in registries:
            for key, value in list(dict.items(thing)):
                if type(key) in (str, int):
                    item = f"{path}[{key!r}]"
                    yield Name(item, value, f"import {name}; del {item}")
        elif not (module is sys and attribute in LAST_ERROR):
            yield _of_attribute(name, path, thing)


def _registries(module: ModuleType) -> Iterator[dict]:
    """Dictionaries of libraries: to empty them might break the library, so each item has a name."""
    names = vars(module)
    file = str(names.get("__file__"))
    if names.get("__name__") not in sys.builtin_module_names and not is_library(file):
        return
    for thing in list(names.values()):
        if issubclass(type(thing), dict):
            yield thing


def _of_running() -> Iterator[Name]:
    """Variables of functions that have not returned."""
    for frame, name, thing in running_locals():
        code = frame.f_code
        where = f"{Path(code.co_filename).name}:{frame.f_lineno}"
        yield Name(f"{name} in {code.co_qualname} (running, {where})", thing)


def careful(look: Callable[[], Any]) -> Any:
    """What a look into objects of strangers tells; their code may raise anything: then nothing."""
    try:
        return look()
    except Exception:
        return ""


def _of_attribute(module: str, path: str, thing: Any) -> Name:
    """An attribute of a module or class; a container is emptied, since others may refer to it."""
    line = emptying(path, thing)
    start = f"import {module}; " if module else ""
    return Name(path, thing, start + (line or f"{path} = None"), empties=bool(line))


def emptying(path: str, thing: Any) -> str:
    """The line that takes out what a thing holds; empty if it cannot be emptied.

    >>> emptying("model.cache", {})
    'model.cache.clear()'
    """
    kind = type(thing)  # asking for `__class__` may run the code of strangers
    if issubclass(kind, LRU_CACHE):
        return f"{path}.cache_clear()"
    if issubclass(kind, GeneratorType | CoroutineType):
        return f"{path}.close()"
    return f"{path}.clear()" if issubclass(kind, dict | list | set | deque) else ""


@cache
def _is_machinery(kind: type) -> bool:
    module = str(careful(lambda: kind.__module__))
    ours = f"{module}.".startswith(f"{OUR_MODULES}.")
    return module.split(".")[0] in MACHINERY or ours or bool(EVENT_LOOP.match(module))
