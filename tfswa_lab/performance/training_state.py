"""Put everything that training changes back as it was, bit for bit and in place.

Notebook: 09_running_lean
"""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.amp import GradScaler
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.weak import TensorWeakRef

PutBack = Callable[[], Any]
# Their attributes are put back. `load_state_dict` would not do: an optimizer's casts its state to
# the type of the weights, a scaler's cannot return to a scale that is not there yet.
IN_PLACE = (nn.Module, Optimizer, GradScaler)
WITH_ATTRIBUTES = (*IN_PLACE, LRScheduler)
CONTAINERS = (dict, OrderedDict, defaultdict, list, deque, set, tuple)


class TrainingState:
    """The state of a training at one moment, copied to host memory; `restore` returns to it.

    Modules, optimizers and gradient scalers get their attributes back: the same tensors, lists and
    dicts, with the content of that moment. So weights, buffers, gradients, `training` and
    `requires_grad` of each part, hyperparameters and the optimizer's state are as they were, also
    where they did not exist yet. Any other object gets a copy of its `state_dict`. The generators
    of Python, NumPy and torch, on each GPU too if CUDA is in use, and the grad mode are restored.

    Args:
        state: one object or a sequence: all that has `state_dict` and `load_state_dict`, and
            `torch.Generator`.

    Raises:
        ValueError: names an object that is neither, or a lazy module that has no weights yet.

    >>> net = nn.Linear(1, 1)
    >>> state = TrainingState(net)
    >>> _ = net.eval().weight.data.zero_()
    >>> state.restore()
    >>> net.training, bool(net.weight)
    (True, True)
    """

    def __init__(self, state: Any):
        objects = state if isinstance(state, list | tuple) else [state]
        for each in objects:
            _check(each)
        # What `load_state_dict` does comes first: it may set an optimizer's rate, and casts.
        self._put_back = [_loading(each) for each in objects if not _is_in_place(each)]
        self._seen: dict[int, Any] = {}
        self._ahead = [*objects]
        while self._ahead:
            self._visit(self._ahead.pop())
        self._put_back += _global_state()

    def restore(self) -> None:
        """Return to the moment when this was made; as often as needed."""
        for put_back in self._put_back:
            put_back()

    def _visit(self, value: Any) -> None:
        """Copy one object, once; the objects that it refers to come later."""
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._put_back += _tensor(value)
        elif isinstance(value, Generator):
            self._put_back.append(_bound(value.set_state, value.get_state()))
        elif type(value) in CONTAINERS:
            self._put_back += _container(value)
            self._ahead += [*value, *(value.values() if isinstance(value, dict) else ())]
        elif isinstance(value, WITH_ATTRIBUTES):
            self._put_back += _module(value) if isinstance(value, nn.Module) else []
            self._ahead += [*_tensors(value), vars(value)]
        elif hasattr(value, "state_dict"):
            parts = getattr(value, "__dict__", {}).values()
            self._ahead += [x for x in parts if isinstance(x, (*WITH_ATTRIBUTES, Generator))]


def _check(value: Any) -> None:
    if isinstance(value, Generator):
        return
    if isinstance(value, type) or not all(
        callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict")
    ):
        raise ValueError(
            f"state holds {_named(value)}, which has no state_dict and load_state_dict and is no "
            "torch.Generator: it could not be restored; leave it out, or give it both"
        )
    for name, tensor in value.named_parameters() if isinstance(value, nn.Module) else ():
        if is_lazy(tensor):
            raise ValueError(
                f"{name} of {type(value).__name__} is lazy and has no values that could be "
                "restored; run the network once before"
            )


def _named(value: Any) -> str:
    if isinstance(value, type) or callable(value):
        return f"{getattr(value, '__qualname__', type(value).__name__)}"
    return f"a {type(value).__name__}"


def _is_in_place(value: Any) -> bool:
    """Whether `load_state_dict` is not needed: also for an optimizer in a wrapper, as Fabric's."""
    wrapped = hasattr(value, "param_groups") and isinstance(
        getattr(value, "optimizer", None), Optimizer
    )
    return wrapped or isinstance(value, (*IN_PLACE, Generator))


# Each returns functions that put one thing back --------------------------------------------------


def _loading(value: Any) -> PutBack:
    new = _copies(value.state_dict())
    return lambda: value.load_state_dict(new())


def _copies(value: Any) -> Callable[[], Any]:
    """A function that makes a copy of a nested state as it is now; tensors wait on the host."""
    if isinstance(value, Tensor):
        held, device = _on_host(value), value.device
        return lambda: held.to(device, copy=True)
    if isinstance(value, dict):
        entries = {name: _copies(entry) for name, entry in value.items()}
        empty = copy.copy(value)
        empty.clear()

        def filled() -> dict:
            made = copy.copy(empty)
            made.update((name, new()) for name, new in entries.items())
            return made

        return filled
    if type(value) in (list, tuple):
        parts = [_copies(part) for part in value]
        return lambda: type(value)(new() for new in parts)
    held = copy.deepcopy(value)
    return lambda: copy.deepcopy(held)


def _container(value: Any) -> list[PutBack]:
    if type(value) is tuple:
        return []
    entries = copy.copy(value)
    add = value.update if isinstance(value, dict | set) else value.extend

    def refill() -> None:
        value.clear()
        add(entries)

    return [refill]


def _module(module: nn.Module) -> list[PutBack]:
    """The mode, which TorchScript keeps outside `vars`, and a state that only the module knows."""
    training = module.training
    found = [lambda: setattr(module, "training", training)]
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        extra = _copies(module.get_extra_state())
        found.append(lambda: module.set_extra_state(extra()))
    return found


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a module; TorchScript keeps them outside `vars`."""
    return [*value.parameters(), *value.buffers()] if isinstance(value, nn.Module) else []


def _tensor(tensor: Tensor) -> list[PutBack]:
    """Its values, in the memory where they were; of a leaf `requires_grad` and the gradient too."""
    # Sparse tensors do not share what is written to a detached one.
    place = _without_repeats(tensor.detach()) if _is_strided(tensor) else tensor
    leaf = tensor.is_leaf
    whole, values, requires_grad = tensor.detach(), _on_host(place), tensor.requires_grad
    gradient = _gradient(tensor) if leaf else None

    def put_back() -> None:
        if not _same_memory(tensor, whole):
            tensor.data = whole
        with torch.inference_mode(place.is_inference()), torch.no_grad():
            place.copy_(values)
        if leaf:
            tensor.requires_grad_(requires_grad)
            tensor.grad = gradient()

    return [put_back]


def _gradient(tensor: Tensor) -> Callable[[], Tensor | None]:
    """Makes the gradient again. Holding it would take memory that a step's `zero_grad` frees."""
    if tensor.grad is None:
        return lambda: None
    before, values, device = TensorWeakRef(tensor.grad), _on_host(tensor.grad), tensor.grad.device

    def gradient() -> Tensor:
        alive = before()
        if alive is None:
            return values.to(device, copy=True)
        with torch.no_grad():
            return alive.copy_(values)

    return gradient


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _without_repeats(tensor: Tensor) -> Tensor:
    """The elements that are in memory: `expand` repeats them, and repeats cannot be written."""
    for axis, stride in enumerate(tensor.stride()):
        tensor = tensor.narrow(axis, 0, 1) if stride == 0 and tensor.shape[axis] else tensor
    return tensor


def _is_strided(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested


def _same_memory(tensor: Tensor, before: Tensor) -> bool:
    if not (_is_strided(tensor) and _is_strided(before)):
        return tensor.layout == before.layout
    kind = (before.dtype, before.shape, before.stride(), before.data_ptr())
    return (tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr()) == kind


def _global_state() -> list[PutBack]:
    return [*random_states(), _bound(torch.set_grad_enabled, torch.is_grad_enabled())]


def random_states() -> list[PutBack]:
    """Functions that put Python's, NumPy's and torch's generators back into their states of now."""
    found = [
        _bound(random.setstate, random.getstate()),
        _bound(np.random.set_state, np.random.get_state(legacy=False)),  # noqa: NPY002
        _bound(torch.set_rng_state, torch.get_rng_state()),
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found.append(_bound(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    return found


def _bound(function: Callable[[Any], Any], value: Any) -> PutBack:
    return lambda: function(value)
