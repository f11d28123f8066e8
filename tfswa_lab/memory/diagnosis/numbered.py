"""A step as something that is called without an argument, and that counts.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Numbered:
    """Calls a step, with its number if it needs an argument.

    Attributes:
        count: how often it was called, without those that failed.

    Raises:
        ValueError: it would only make a generator or a coroutine, or needs several arguments.

    Notebook: 06_leak_diagnosis

    >>> seen = []
    >>> call = Numbered(lambda number: seen.append(number))
    >>> call(), call(), seen
    (None, None, [0, 1])
    """

    def __init__(self, step: Callable[..., Any]):
        self.count = 0
        self._step, self._takes_number = step, _needed(step) == 1

    def __call__(self) -> None:
        """Run the next step; what it returns is let go."""
        if self._takes_number:
            self._step(self.count)
        else:
            self._step()
        self.count += 1


def _needed(step: Callable[..., Any]) -> int:
    """How many arguments it cannot do without."""
    for lazy in (inspect.isgeneratorfunction, inspect.iscoroutinefunction):
        if lazy(step):
            raise ValueError(f"{step!r} does nothing when called; pass a function that runs it")
    try:
        parameters = inspect.signature(step).parameters.values()
    except ValueError:  # of builtins that do not tell
        return 0
    needed = [each for each in parameters if each.kind in POSITIONAL and each.default is each.empty]
    if len(needed) > 1:
        names = ", ".join(each.name for each in needed)
        raise ValueError(f"step needs {names}; pass one that takes nothing, or only its number")
    return len(needed)
