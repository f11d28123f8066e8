"""Tensors with a shape, a device and no values: a step of 800 GiB fits on a laptop.

Torch's own fake tensors on `cuda` end in a crash where torch was built without CUDA. Here a tensor
on the GPU says `cuda:0` to Python, and `cpu:0` to torch's C++, which takes it for a CPU tensor on
another device than `cpu`, where the host's tensors are.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import Optimizer

from tfswa_lab.memory.trace.tracer import DEVICE

GPU, HOST = torch.device("cuda", 0), torch.device("cpu")
STAND_IN = torch.device("cpu", 0)  # the GPU, as C++ sees it


class FakeTensors(FakeTensorMode):
    """Torch's mode of fake tensors, on a host and a GPU.

    Attributes:
        names_gpu: whether a tensor has been put on a GPU so far. A program that never does so is
            taken to live there as a whole.
    """

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.names_gpu = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, so torch does not have to wrap every dispatch."""
        return False

    @property
    def avoid_device_init(self) -> bool:
        """A prediction never touches a GPU, even where there is one."""
        return True

    def may_turn_const(self, t: Tensor) -> bool:
        """Values are followed by `Values`; torch would only keep single numbers."""
        return False

    def runs_on_gpu(self, tensor: Tensor) -> bool:
        """Whether a GPU's kernels calculate with this tensor."""
        return not self.names_gpu or tensor.device.type == "cuda"

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        if func is DEVICE:
            return seen_by_cpp(args[0])
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": self._place(kwargs["device"])}
        if kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": False}  # of the host all the same
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _place(self, device: torch.device) -> torch.device:
        if device.type != "cuda" and device != STAND_IN:
            return device
        the_gpu(device)
        self.names_gpu = True
        return GPU


def the_gpu(device: torch.device) -> torch.device:
    """The only GPU.

    Raises:
        NotImplementedError: the device is a second one.
    """
    if device.index not in (None, 0):
        raise NotImplementedError(
            f"{device}: a prediction has one GPU; predict each part of the model on its own"
        )
    return STAND_IN


def seen_by_cpp(tensor: Tensor) -> torch.device:
    """The device of a fake tensor that C++ is told."""
    device = tensor.fake_device
    return STAND_IN if device == GPU else device


@contextmanager
def replaced(replacements: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Replace attributes of torch, each given by its place, its name and its value."""
    with ExitStack() as stack:
        for place, name, value in replacements:
            stack.enter_context(patch.object(place, name, value))
        yield


@contextmanager
def fake_tensors() -> Iterator[FakeTensors]:
    """Make all tensors fake."""
    mode = FakeTensors()  # imports what must not see the patches
    make = Tensor._make_subclass

    def on_cpu(*args: Any, device_for_backend_keys: torch.device | None = None, **kwargs: Any):
        """C++ has kernels, and casts of autocast, for the CPU."""
        return make(*args, device_for_backend_keys=device_for_backend_keys and HOST, **kwargs)

    dispatch = FakeTensor.__torch_dispatch__

    def outside_of_modes(cls: type, func: Any, *rest: Any) -> Any:
        """C++ asks for a device, also where the modes are off."""
        found = dispatch(func, *rest)
        return STAND_IN if isinstance(found, torch.device) and found == GPU else found

    older = OlderModels()
    of_torch = (
        (torch.Tensor, "_make_subclass", staticmethod(on_cpu)),
        (fake_tensor, "init_gpu_context", lambda device: None),
        (FakeTensor, "is_cuda", property(lambda self: self.device.type == "cuda")),
        (FakeTensor, "is_cpu", property(lambda self: self.device.type == "cpu")),
        (FakeTensor, "__torch_dispatch__", classmethod(outside_of_modes)),
        (nn.Module, "_apply", _applied(older)),
    )
    with replaced(of_torch), closing(older), mode:
        yield mode


class OlderModels:
    """Models that are older than the prediction; what is moved of them is a copy, and put back."""

    def __init__(self):
        self._tensors: list[tuple[dict, str, Tensor]] = []
        self._copies: dict[int, Tensor] = {}  # by the parameter's id
        self._optimizers: list[Optimizer] | None = None
        self._groups: list[tuple[dict, list]] = []

    def replace(self, place: dict, name: str, copy: Tensor) -> None:
        """Put a copy in place of a parameter or a buffer, and of a parameter of an optimizer."""
        tensor = place[name]
        self._tensors.append((place, name, tensor))
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = copy
            self._tell_optimizers(tensor)
        place[name] = self._copies[id(tensor)]

    def _tell_optimizers(self, tensor: Tensor) -> None:
        if self._optimizers is None:
            every = gc.get_objects()
            self._optimizers = [each for each in every if issubclass(type(each), Optimizer)]
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if any(each is tensor for each in group["params"]):
                    self._groups.append((group, group["params"]))
                    copies = [self._copies.get(id(each), each) for each in group["params"]]
                    group["params"] = copies

    def close(self) -> None:
        """Everything is as it was."""
        for place, name, tensor in reversed(self._tensors):
            place[name] = tensor
        for group, parameters in reversed(self._groups):
            group["params"] = parameters


def _applied(older: OlderModels) -> Callable:
    """`Module.to` and the like: they give each parameter other data, so that it stays itself."""

    def apply(
        module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> nn.Module:
        for child in module.children() if recurse else ():
            child._apply(function)
        for name, parameter in module._parameters.items():
            if parameter is None or (changed := function(parameter)) is parameter:
                continue
            if isinstance(parameter, FakeTensor):
                _set_data(parameter, changed)
                if parameter.grad is not None:
                    _set_data(parameter.grad, function(parameter.grad))
            else:
                copy = nn.Parameter(changed.detach(), parameter.requires_grad)
                older.replace(module._parameters, name, copy)
        for name, buffer in module._buffers.items():
            if buffer is None or (changed := function(buffer)) is buffer:
                continue
            if isinstance(buffer, FakeTensor):
                module._buffers[name] = changed
            else:
                older.replace(module._buffers, name, changed)
        return module

    return apply


def _set_data(tensor: Tensor, changed: Tensor) -> None:
    tensor.data = changed.detach()
    tensor.fake_device = changed.fake_device
