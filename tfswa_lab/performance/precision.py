"""Models that take less of a device: half precision, int8 weights, or one layer at a time.

Notebook: 10_staged_pipelines
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tfswa_lab.memory.out_of_memory import is_out_of_memory
from tfswa_lab.performance.lean_load import bytes_in, move
from tfswa_lab.performance.placement import map_tensors, may_differ, tensors_in, version_of

# Half precision ----------------------------------------------------------------------------------

# What torch says where a kernel does not exist in half precision, or two types meet:
# "MKL FFT doesn't support tensors of type: Half", "Unsupported dtype BFloat16",
# '"polar_cpu" not implemented for \'Half\'', "mat1 and mat2 must have the same dtype",
# "Input type (c10::Half) and bias type (float) should be the same",
# "cuFFT only supports dimensions whose sizes are powers of two when computing in half precision".
ABOUT_TYPES = re.compile(r"half|bfloat16|float16|dtype|scalar ?type|must be either float", re.I)


def cast_module(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the floating-point parameters and buffers of a module, in place and one by one.

    What it shares stays shared. Integers stay, and so do complex numbers, whose imaginary part
    `module.to(torch.float16)` throws away; `complex_in` names them.

    Raises:
        ValueError: `dtype` is no floating-point type.

    >>> cast_module(nn.Linear(2, 2), torch.float16).weight.dtype
    torch.float16
    """
    _check_floating(dtype)
    move(module, None, dtype)
    return module


def complex_in(module: nn.Module) -> list[str]:
    """Names of the complex parameters and buffers, which have no half precision."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return [name for name, tensor in named if tensor.is_complex()]


def cast_value(value: Any, dtype: torch.dtype) -> Any:
    """A value with its floating-point tensors cast, as deep as tuples, lists and dicts go.

    Raises:
        ValueError: `dtype` is no floating-point type.

    >>> cast_value({"x": [torch.ones(1)], "n": torch.tensor(3)}, torch.float16)
    {'x': [tensor([1.], dtype=torch.float16)], 'n': tensor(3)}
    """
    _check_floating(dtype)
    return map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, value)


def _check_floating(dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is no floating-point type, such as torch.float16")


def needs_float32(error: BaseException) -> str:
    """Why a stage that failed in half precision may work in float32; empty for any other failure.

    There is no half precision for complex numbers and Fourier transforms on a CPU, nor for most of
    linear algebra, and a GPU's Fourier transforms take powers of two only.

    >>> try:
    ...     torch.fft.rfft(torch.ones(8, dtype=torch.float16))
    ... except RuntimeError as error:
    ...     needs_float32(error)
    'Unsupported dtype Half'
    """
    if not isinstance(error, RuntimeError | TypeError | ValueError) or is_out_of_memory(error):
        return ""
    first = str(error).partition("\n")[0]
    return first if ABOUT_TYPES.search(first) else ""


def output_change_db(reference: Any, changed: Any) -> float:
    """How far a changed output is from a reference: its energy over that of the difference, in dB.

    Args:
        reference: a tensor, or a value with tensors.
        changed: the same with other numbers.

    Returns:
        Infinity where nothing has changed; minus infinity where `changed` has numbers that are not
        finite.

    Raises:
        ValueError: the two have no tensors of the same shapes.

    >>> output_change_db(torch.ones(100), torch.full((100,), 1.1))  # a tenth of the amplitude
    20.0
    """
    values = _all_tensors(reference), _all_tensors(changed)
    shapes = [[tuple(x.shape) for x in tensors] for tensors in values]
    if not values[0] or shapes[0] != shapes[1]:
        raise ValueError(f"outputs of shapes {shapes[0]} and {shapes[1]} cannot be compared")
    pairs = list(zip(*values, strict=True))
    energy = sum(_energy(a) for a, _ in pairs)
    difference = sum(_energy(_wide(a) - _wide(b).to(a.device)) for a, b in pairs)
    if not math.isfinite(difference):
        return -math.inf
    if difference == 0:
        return math.inf
    return round(10 * math.log10(energy / difference), 4) if energy else -math.inf


def _all_tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, value)
    return found


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def _energy(x: Tensor) -> float:
    return _wide(x).abs().square().sum().item()


# Int8 --------------------------------------------------------------------------------------------


def int8_weights(module: nn.Module) -> nn.Module:
    """Keep the weights of linear layers in int8, in place; torchao does it.

    Each row has a scale of its own, so that a loud channel does not drown a quiet one. Weights are
    read as int8 and used in the dtype of the input. Convolutions, recurrent layers and
    `nn.MultiheadAttention` keep theirs.

    Raises:
        ImportError: torchao is not installed.
        ValueError: the module has no linear layer.
    """
    try:
        with quiet():
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ImportError("int8 weights need torchao: pip install torchao") from error
    if not any(isinstance(part, nn.Linear) for part in module.modules()):
        raise ValueError(
            f"{type(module).__name__} has no nn.Linear, whose weights alone become int8; "
            "use dtype=torch.float16"
        )
    quantize_(module, Int8WeightOnlyConfig())
    return module


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings in logs: torchao 0.18 warns of other GPUs, onnxruntime of unknown shapes.

    Others may log in another thread meanwhile. onnxruntime writes to the root logger itself, whose
    filters see nothing of other loggers; torch warns of what torchao does.
    """
    root, *noisy = map(logging.getLogger, (None, "torchao", "torch.utils._pytree"))
    before = [logger.level for logger in noisy]
    root.addFilter(_is_error)
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.removeFilter(_is_error)
        for logger, level in zip(noisy, before, strict=True):
            logger.setLevel(level)


def _is_error(line: logging.LogRecord) -> bool:
    return line.levelno >= logging.ERROR


def cast_plan(
    module: nn.Module, dtype: torch.dtype | None
) -> Iterator[tuple[Tensor, torch.dtype | None]]:
    """Each parameter and buffer, and its dtype to come: int8 is for weights of linear layers alone.

    >>> [dtype for _, dtype in cast_plan(nn.Linear(2, 2), torch.int8)]
    [torch.int8, None]
    """
    linear = {id(part.weight) for part in module.modules() if type(part) is nn.Linear}
    for tensor in tensors_in(module):
        yield tensor, None if dtype is torch.int8 and id(tensor) not in linear else dtype


def bytes_as(tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    """Bytes that a parameter or buffer keeps, now or after `cast_module` or `int8_weights`.

    Args:
        tensor: also one of int8 weights, which torch itself counts as if it were float32.
        dtype: it will be cast to; see `lean_load.bytes_in`. None for now.

    >>> bytes_as(torch.zeros(10)), bytes_as(torch.zeros(10), torch.float16)
    (40, 20)
    """
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(bytes_as(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    if dtype is None or not tensor.is_floating_point():
        return tensor.untyped_storage().nbytes()
    return bytes_in(tensor.shape, tensor.dtype, dtype)


# Layer by layer ----------------------------------------------------------------------------------

# Modules that use the weights of their children without calling them.
WHOLE = (nn.MultiheadAttention, nn.ParameterList, nn.ParameterDict)


class _Layer:
    """Parameters and buffers that are on the device while one module runs.

    Each remains the same object: only its numbers move. Those of the host stay there, so that the
    way back copies nothing but buffers that the run has changed.
    """

    def __init__(self, tensors: list[Tensor], device: torch.device, uses: dict[Tensor, int]):
        self.tensors, self.device, self.uses = tensors, device, uses
        self._homes: dict[Tensor, tuple[Tensor, int]] = {}

    def enter(self, module: nn.Module, args: tuple) -> None:
        """A hook before the module runs."""
        if torch.is_grad_enabled() and self.device.type != "cpu":
            raise ValueError("layerwise runs keep nothing for gradients; use torch.no_grad()")
        for tensor in self.tensors:
            self.uses[tensor] = self.uses.get(tensor, 0) + 1
            if self.uses[tensor] == 1 and tensor.device != self.device:
                home = tensor.data
                tensor.data = home.to(self.device)
                self._homes[tensor] = home, version_of(tensor)

    def leave(self, *of_hook: Any) -> None:
        """A hook after the module has run, or has failed."""
        for tensor in self.tensors:
            self.uses[tensor] = max(0, self.uses.get(tensor, 0) - 1)
            if self.uses[tensor] == 0 and tensor in self._homes:
                home, version = self._homes.pop(tensor)
                if may_differ(tensor, version):
                    home.copy_(tensor.data)
                tensor.data = home


def layerwise(module: nn.Module, device: torch.device | str) -> nn.Module:
    """Hold a module on the host, and each of its layers on a device while the layer runs.

    For a module that is too large for the device: there is room for the largest layer (see
    `largest_layer_bytes`), the input and the activations. The price is that each run copies all
    weights. `remove_layerwise` undoes it. Input has to be on the device already.

    A layer is a submodule with parameters or buffers of its own, and it has them while its
    `forward` runs; a parameter of the whole module is there all the time. Parameters and buffers
    remain the same objects. A module that reads weights of a submodule without calling it fails,
    because these are on another device; `nn.MultiheadAttention` does so and is moved as a whole.

    accelerate's `cpu_offload` puts weights on the meta device instead. Then such a read is not
    always an error: on a CPU, in accelerate 1.15, `F.linear(x, self.layer.weight)` and the old
    `weight_norm` return wrong numbers.

    Args:
        module: on the host; changed in place.
        device: where layers run.

    Raises:
        ValueError: it is layerwise already.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> layerwise(model, "cpu")(torch.ones(3, 4)).shape
    torch.Size([3, 2])
    """
    if is_layerwise(module):
        raise ValueError(f"{type(module).__name__} is layerwise already; call remove_layerwise")
    uses: dict[Tensor, int] = {}
    module.to("cpu")
    undo = module._layerwise = []
    for part, tensors in _layers(module):
        layer = _Layer(tensors, torch.device(device), uses)
        undo += [
            part.register_forward_pre_hook(layer.enter).remove,
            part.register_forward_hook(layer.leave, always_call=True).remove,
            lambda layer=layer: (layer.uses.clear(), layer.leave()),
        ]
    return module


def is_layerwise(module: nn.Module) -> bool:
    """Whether `layerwise` holds it on the host."""
    return hasattr(module, "_layerwise")


def remove_layerwise(module: nn.Module) -> nn.Module:
    """Undo `layerwise`, and leave everything on the host; nothing happens to another module."""
    for each in module.__dict__.pop("_layerwise", ()):
        each()
    return module


def largest_layer_bytes(module: nn.Module) -> int:
    """Most bytes of weights that `layerwise` has on the device at once.

    >>> largest_layer_bytes(nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 20, bias=False)))
    800
    """
    own, children = _own(module)
    inside = max(map(largest_layer_bytes, children), default=0)
    return sum(map(bytes_as, own)) + inside


def _layers(module: nn.Module) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """Modules that run, with the tensors that they need for it."""
    seen = set()
    waiting = [module]
    while waiting:
        part = waiting.pop()
        if part in seen:
            continue
        seen.add(part)
        own, children = _own(part)
        waiting += children
        if own:
            yield part, own


def _own(module: nn.Module) -> tuple[list[Tensor], list[nn.Module]]:
    """What a module needs itself while it runs, and the submodules that it calls."""
    if isinstance(module, WHOLE):
        return tensors_in(module), []
    absorbed = [child for child in module.children() if isinstance(child, WHOLE[1:])]
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    own += [tensor for child in absorbed for tensor in tensors_in(child)]
    return own, [child for child in module.children() if child not in absorbed]
