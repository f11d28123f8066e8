"""Stages of a pipeline that is configured elsewhere: its objects are wrapped, not changed.

Notebook: 10_staged_pipelines
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from tfswa_lab.performance.stage import Stage


def stages_from_config(
    config: Mapping[str, Mapping],
    load: str = "load",
    call: str = "__call__",
    of_stages: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Stage]:
    """Stages of a configuration like Hydra's, where `_target_` names the class of an object.

    Nothing is imported or built before a stage is loaded. Then its object is built, and its `load`
    method is called. Whatever class the configuration names is imported: it must be one that you
    trust.

    Args:
        config: by the stages' names, in their order, the arguments of each object; among them may
            be objects with a `_target_` of their own.
        load: the method that loads an object's weights.
        call: the method that runs it, with the value of the stage before.
        of_stages: by name, more arguments of `Stage`, such as `weights`.

    Raises:
        ValueError: an entry has no `_target_`, or `of_stages` names no stage. When a stage is
            loaded: there is no such class or method.

    >>> config = {"filter": {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}}
    >>> (stage,) = stages_from_config(config, load="eval")
    >>> stage.load().held[0]
    Linear(in_features=2, out_features=3, bias=True)
    """
    more = dict(of_stages or {})
    if unknown := sorted(more.keys() - config.keys()):
        raise ValueError(f"of_stages={unknown} are not among the stages {', '.join(config)}")
    for name, entry in config.items():
        if not isinstance(entry, Mapping) or "_target_" not in entry:
            raise ValueError(f"stage {name!r} has no _target_; name its class there")
    return [
        Stage(name, partial(_load, entry, load, call), _run, **more.get(name, {}))
        for name, entry in config.items()
    ]


class Wrapped(nn.Module):
    """An object that holds modules, as a module: they move with it, and their bytes are counted.

    Args:
        thing: with modules in its attributes, or in lists and dicts there.
        call: the name of the method that runs it.

    Attributes:
        held: the modules.
    """

    def __init__(self, thing: Any, call: str):
        super().__init__()
        self.call = _method(thing, call)
        self.held = nn.ModuleList(modules_in(thing))
        if not self.held:
            raise ValueError(
                f"{type(thing).__name__} holds no module once it is loaded; name the method that "
                "loads it as load"
            )

    def forward(self, value: Any) -> Any:
        """The next value."""
        return self.call(value)


def instantiate(config: Any) -> Any:
    """The object of a configuration, from the inside out; anything else remains as it is.

    Raises:
        ValueError: there is no such class.

    >>> instantiate({"_target_": "fractions.Fraction", "numerator": 3, "denominator": 6})
    Fraction(1, 2)
    """
    if isinstance(config, list | tuple):
        return [instantiate(each) for each in config]
    if not isinstance(config, Mapping):
        return config
    values = {key: instantiate(value) for key, value in config.items() if key != "_target_"}
    return _class(config["_target_"])(**values) if "_target_" in config else values


def _class(target: str) -> Callable[..., Any]:
    module, _, name = target.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"_target_={target!r} cannot be imported ({error}); it is the full name of a class, "
            "such as torch.nn.Linear"
        ) from error


def _load(entry: Mapping, load: str, call: str) -> Wrapped:
    thing = instantiate(entry)
    _method(thing, load)()
    return Wrapped(thing, call)


def _run(module: Wrapped, value: Any) -> Any:
    return module(value)


def _method(thing: Any, name: str) -> Callable[..., Any]:
    if not callable(method := getattr(thing, name, None)):
        raise ValueError(
            f"{type(thing).__name__} has no method {name!r}; give its name as load, call"
        )
    return method


def modules_in(thing: Any) -> list[nn.Module]:
    """The modules that an object holds: in attributes, lists and dicts, however deep.

    >>> modules_in((nn.ReLU(), {"more": ["a tokenizer", nn.Tanh()]}))
    [ReLU(), Tanh()]
    """
    found, seen, ahead = [], set(), [thing]
    while ahead:
        each = ahead.pop(0)
        if id(each) in seen or isinstance(each, type | Tensor):
            continue
        seen.add(id(each))
        if isinstance(each, nn.Module):
            found.append(each)
        elif isinstance(each, Mapping):
            ahead += each.values()
        elif isinstance(each, list | tuple | set):
            ahead += each
        elif not isinstance(each, ModuleType | FunctionType):
            ahead += getattr(each, "__dict__", {}).values()
    return found
