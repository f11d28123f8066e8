"""A step as something that is called without an argument, and that counts.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
GIVEN = (*POSITIONAL, inspect.Parameter.KEYWORD_ONLY)


class Numbered:
    """Calls a step, with its number if it needs an argument.

    Attributes:
        count: how often it was called, without those that failed.

    Raises:
        ValueError: it only makes a generator or a coroutine, or needs several arguments.
        TypeError: it cannot be called, or is a network, which needs an input.

    Notebook: 06_leak_diagnosis

    >>> seen = []
    >>> call = Numbered(lambda number: seen.append(number))
    >>> call(), call(), seen
    (None, None, [0, 1])
    """

    def __init__(self, step: Callable[..., Any]):
        self.count = 0
        self._step, self._parameter = step, _needed(step)

    def __call__(self) -> None:
        """Run the next step; what it returns is let go."""
        try:
            made = self._step(self.count) if self._parameter else self._step()
        except Exception as error:
            if self._parameter and not self.count:
                error.add_note(f"the step was given its number, 0, as `{self._parameter}`")
            raise
        if _never_began(made):
            _refuse_lazy(self._step)
        self.count += 1


def _needed(step: Any) -> str:
    """The name of the argument that it cannot do without, empty if there is none."""
    if isinstance(step, nn.Module):
        raise TypeError("step is a network; pass a function that makes its input and calls it")
    if not callable(step):
        raise TypeError(
            f"step is a {type(step).__name__}, not a function; to diagnose `train(x)`, pass "
            "`lambda: train(x)`"
        )
    if inspect.isgeneratorfunction(step) or inspect.iscoroutinefunction(step):
        _refuse_lazy(step)
    try:
        parameters = inspect.signature(step).parameters.values()
    except ValueError:  # of builtins that do not tell
        return ""
    needed = [each for each in parameters if each.default is each.empty and each.kind in GIVEN]
    if len(needed) > 1 or any(each.kind not in POSITIONAL for each in needed):
        names = ", ".join(each.name for each in needed)
        raise ValueError(f"step needs {names}; pass one that takes nothing, or only its number")
    return needed[0].name if needed else ""


def _never_began(made: Any) -> bool:
    if inspect.isgenerator(made):
        return inspect.getgeneratorstate(made) == inspect.GEN_CREATED
    return inspect.iscoroutine(made) and inspect.getcoroutinestate(made) == inspect.CORO_CREATED


def _refuse_lazy(step: Any) -> None:
    raise ValueError(
        f"{step!r} makes a generator or coroutine, of which nothing runs; pass a function that "
        "runs it to its end"
    )
