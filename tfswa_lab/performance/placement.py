"""Where the tensors of values and models are: count their storages, move them, and let go of them.

Notebook: 10_staged_pipelines
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import is_dataclass
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

HOST = torch.device("cpu")

# Values ------------------------------------------------------------------------------------------


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`value` with `function` applied to each tensor in it.

    It looks into tuples, lists, mappings, dataclasses and namespaces, and copies only those in
    which something changes.

    >>> map_tensors(torch.neg, {"a": [torch.tensor(1)], "b": "text"})
    {'a': [tensor(-1)], 'b': 'text'}
    """
    if isinstance(value, Tensor):
        return function(value)
    items = _items(value)
    changed = {key: map_tensors(function, item) for key, item in items.items()}
    if all(changed[key] is item for key, item in items.items()):
        return value
    if isinstance(value, tuple):
        made = changed.values()
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    copied = copy.copy(value)
    for key, item in changed.items():
        if isinstance(value, list | Mapping):
            copied[key] = item
        if not isinstance(value, list) and key in getattr(value, "__dict__", ()):
            object.__setattr__(copied, key, item)  # also where the dataclass is frozen
    return copied


def _items(value: Any) -> dict[Any, Any]:
    """What a value consists of, by index, key or name."""
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if isinstance(value, Mapping):
        return dict(value)
    is_record = is_dataclass(value) or isinstance(value, SimpleNamespace)
    return dict(vars(value)) if is_record and hasattr(value, "__dict__") else {}


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
        parts = (part for tensor in tensors_in(value) for part in strided(tensor))
        return {self.key(part): part.untyped_storage().nbytes() for part in parts}


def strided(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors that hold a tensor's numbers: those of a sparse one, else itself.

    >>> [part.nbytes for part in strided(torch.eye(3).to_sparse())]
    [48, 12]
    """
    if tensor.layout == torch.strided:
        return (tensor,)
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return ()  # a layout that has no storage to ask


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
        self._home: list[tuple[dict, str, Tensor, Tensor, int | None]] = []
        if lives_on_host and self.is_elsewhere(HOST):
            moved(module, HOST)
        if lives_on_host and device.type == "cuda":
            self._pin()

    @property
    def tensors(self) -> list[Tensor]:
        """Its parameters and buffers, each once."""
        return tensors_in(self.module) if isinstance(self.module, nn.Module) else []

    def is_elsewhere(self, device: torch.device) -> bool:
        """Whether a tensor of it is on another device."""
        return any(not on(tensor, device) for tensor in self.tensors)

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
            self._home = [
                (held, name, held[name], data, version_of(held[name])) for held, name, data in homes
            ]

    def move_out(self, staying: Collection[int] = ()) -> None:
        """Back to the host, where it lives. A parameter that the run has not changed is not copied.

        Args:
            staying: `id` of tensors that another model on the device shares.
        """
        for held, name, came_as, at_home, version in self._home:
            now = held.get(name)
            if now is None or id(now) in staying:
                continue
            if now is not came_as:  # the run has put another one there
                held[name] = moved(now, HOST) if isinstance(now, Tensor) else now
                continue
            if may_differ(now, version):
                at_home.copy_(now.detach())
            if isinstance(now, nn.Parameter):
                now.data = at_home
            else:
                held[name] = at_home
        self._home = []
        if isinstance(self.module, nn.Module):
            attributes_to_host(self.module)

    def let_go(self, staying: Collection[int] = ()) -> None:
        """End it. What somebody else holds of it goes back to the host.

        Args:
            staying: as for `move_out`.
        """
        if self._home:
            self.move_out(staying)
        module, self.module = self.module, None
        if not isinstance(module, nn.Module):
            return
        leaving = (tensor for tensor in tensors_in(module) if id(tensor) not in staying)
        watched = [weakref.ref(tensor) for tensor in leaving]
        alive = weakref.ref(module)
        del module
        if any(watch() is not None for watch in watched):
            gc.collect()  # a cycle
        for watch in watched:
            if (tensor := watch()) is not None and not on(tensor, HOST):
                tensor.data = moved(tensor.data, HOST)
        if alive() is not None:
            attributes_to_host(alive())


def attributes_to_host(module: nn.Module) -> None:
    """Move tensors that are plain attributes of a module or its parts, such as a cache."""
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            at_home = map_tensors(_to_host, value)
            if at_home is not value:
                object.__setattr__(part, name, at_home)


def _to_host(tensor: Tensor) -> Tensor:
    return tensor if on(tensor, HOST) else moved(tensor, HOST)


def moved(thing: Tensor | nn.Module, device: torch.device) -> Any:
    """A tensor or a module on a device; to a GPU, without waiting for it."""
    return thing.to(device, non_blocking=device != HOST)


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; None where torch does not count.

    >>> version_of(torch.zeros(1).add_(1))
    1
    """
    return None if tensor.is_inference() else tensor._version


def may_differ(tensor: Tensor, version: int | None) -> bool:
    """Whether a parameter or buffer may have been changed since it had this version.

    For a buffer the version tells nothing: batch norm does not count its changes.
    """
    return not isinstance(tensor, nn.Parameter) or version is None or version_of(tensor) != version


def on(tensor: Tensor, device: torch.device) -> bool:
    """Whether a tensor is on a device; "cuda" is the current GPU.

    >>> on(torch.zeros(1), torch.device("cpu"))
    True
    """
    if tensor.device.type != device.type:
        return False
    return tensor.device == device or device.index is None
