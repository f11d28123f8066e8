"""Options of a command as one object: a dataclass whose fields are typer's options.

Notebook: 03_tfswa_unet
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import partial, wraps
from typing import Any

import typer


def panel(name: str) -> Callable[..., Any]:
    """`typer.Option` for options under one heading of the help; None stands for "not given"."""
    return partial(typer.Option, rich_help_panel=name, show_default=False)


def list_of(kind: type) -> dict:
    """How an option such as `8,16,24,32` is read and shown."""

    def read(text: str) -> tuple:
        try:
            return tuple(kind(part.strip()) for part in text.split(","))
        except ValueError:
            message = f"{text!r} is not a list of whole numbers; write them as 8,16,24,32"
            raise typer.BadParameter(message) from None

    return {"parser": read, "metavar": f"{kind.__name__.upper()},…"}


def takes(options: type) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Turn a function of one dataclass into a command with an option for each of its fields.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Greeting:
    ...     name: str = "world"
    >>> @takes(Greeting)
    ... def greet(greeting):
    ...     print("hello", greeting.name)
    >>> greet(name="you")
    hello you
    """

    def command_of(function: Callable[[Any], None]) -> Callable[..., None]:
        @wraps(function)
        def command(**values: Any) -> None:
            function(options(**values))

        command.__signature__ = inspect.signature(options, eval_str=True)  # what typer reads
        return command

    return command_of


def given(options: Any, of: type | None = None) -> dict[str, Any]:
    """The options that were given, by name; of another dataclass's fields if one is named."""
    names = [field.name for field in fields(of or options)]
    values = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return {name: value for name, value in values.items() if value is not None}
