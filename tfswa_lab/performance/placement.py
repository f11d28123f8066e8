"""Where the tensors of values and models are: count their storages, move them, and let go of them.

Notebook: 10_staged_pipelines
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Collection, Hashable
from dataclasses import fields, is_dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

HOST = torch.device("cpu")

# Values ------------------------------------------------------------------------------------------


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`value` with `function` applied to each tensor in its tuples, lists, dicts and dataclasses.

    >>> map_tensors(torch.neg, {"a": [torch.tensor(1)], "b": "text"})
    {'a': [tensor(-1)], 'b': 'text'}
    """

    def mapped(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if is_dataclass(leaf) and not isinstance(leaf, type):
            inner = {each.name: getattr(leaf, each.name) for each in fields(leaf) if each.init}
            return replace(leaf, **map_tensors(function, inner))
        return leaf

    return tree_map(mapped, value)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of a value, or the parameters and buffers of a module; each once."""
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        found[id(tensor)] = tensor
        return tensor

    if isinstance(value, nn.Module):
        for tensor in (*value.parameters(), *value.buffers()):
            note(tensor)
    else:
        map_tensors(note, value)
    return list(found.values())


class StorageKeys:
    """Names for storages that stay unique when a storage has ended and another has its address."""

    def __init__(self):
        self._next = count()
        self._known: dict[int, tuple[weakref.ref, int]] = {}

    def key(self, tensor: Tensor) -> int:
        """The same number for tensors that share a storage."""
        storage = tensor.untyped_storage()
        known, key = self._known.get(storage._cdata, (None, -1))
        if known is None or known() is not storage:
            key = next(self._next)
            self._known[storage._cdata] = weakref.ref(storage), key
        return key

    def storages(self, value: Any) -> dict[Hashable, int]:
        """Bytes of all storages that a value's or a module's tensors keep alive, by storage.

        >>> view = torch.zeros(1000)[:2]
        >>> StorageKeys().storages([view, view.clone()])
        {0: 4000, 1: 8}
        """
        return {self.key(each): each.untyped_storage().nbytes() for each in tensors_in(value)}


# Models ------------------------------------------------------------------------------------------


class Model:
    """A loaded model, and where its tensors are.

    Args:
        module: what a stage's `load` returned; where it is no module, nothing is ever moved.
        device: where it runs.
        lives_on_host: keep its tensors on the host, so that leaving the device copies nothing.
    """

    def __init__(self, module: Any, device: torch.device, lives_on_host: bool = False):
        self.module, self.device, self.lives_on_host = module, device, lives_on_host
        self._home: list[tuple[dict, str, Tensor, int]] = []  # with versions on the device
        if lives_on_host and self.is_elsewhere(HOST):
            moved(module, HOST)
        if lives_on_host and device.type == "cuda":
            self._pin()

    def is_elsewhere(self, device: torch.device) -> bool:
        """Whether a tensor of it is on another device."""
        return isinstance(self.module, nn.Module) and any(
            not on(tensor, device) for tensor in tensors_in(self.module)
        )

    def _pin(self) -> None:
        """Page-locked memory is copied to a GPU faster, and while the GPU works."""
        for _, _, tensor in self._tensors():
            if type(tensor.data) is Tensor:
                tensor.data = tensor.data.pin_memory()

    def _tensors(self) -> list[tuple[dict, str, Tensor]]:
        """Each parameter and buffer, with the dictionary that it stands in."""
        return [
            (held, name, tensor)
            for module in self.module.modules()
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
            if tensor is not None
        ]

    def move_in(self) -> None:
        """To the device."""
        if not self.is_elsewhere(self.device):
            return
        homes = [(held, name, tensor.data) for held, name, tensor in self._tensors()]
        moved(self.module, self.device)
        if self.lives_on_host:
            self._home = [(held, name, data, held[name]._version) for held, name, data in homes]

    def move_out(self, staying: Collection[int] = ()) -> None:
        """Back to the host, where it lives: only what the run has changed is copied.

        Args:
            staying: `id` of tensors that another model on the device shares.
        """
        for held, name, at_home, version in self._home:
            if id(held[name]) in staying:
                continue
            if held[name]._version != version:
                at_home.copy_(held[name].detach())
            if isinstance(held[name], nn.Parameter):
                held[name].data = at_home
            else:
                held[name] = at_home
        self._home = []

    def let_go(self, staying: Collection[int] = ()) -> None:
        """End it. What somebody else holds of it goes back to the host.

        Args:
            staying: as for `move_out`.
        """
        self.move_out(staying)
        module, self.module = self.module, None
        if not isinstance(module, nn.Module):
            return
        watched = [
            weakref.ref(tensor) for tensor in tensors_in(module) if id(tensor) not in staying
        ]
        del module
        if any(watch() is not None for watch in watched):
            gc.collect()  # a cycle
        for watch in watched:
            if (tensor := watch()) is not None and not on(tensor, HOST):
                tensor.data = moved(tensor.data, HOST)


def moved(thing: Tensor | nn.Module, device: torch.device) -> Any:
    """A tensor or a module on a device; to a GPU, without waiting for it."""
    return thing.to(device, non_blocking=device != HOST)


def on(tensor: Tensor, device: torch.device) -> bool:
    """Whether a tensor is on a device; "cuda" is the current GPU.

    >>> on(torch.zeros(1), torch.device("cpu"))
    True
    """
    if tensor.device.type != device.type:
        return False
    return tensor.device == device or device.index is None
