"""What a program meets on a machine with a GPU, where there is none: `torch.cuda` and the like.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils.data import DataLoader
from torch.utils.data import dataloader as loaders

from tfswa_lab.memory.predict.fake_tensors import replaced
from tfswa_lab.memory.predict.unknown import NAN, Unknown, asking_frame, line_of, user_line
from tfswa_lab.memory.predict.values import Values, real_tensors

IGNORED = (
    *("synchronize", "reset_peak_memory_stats", "reset_max_memory_allocated"),
    *("reset_max_memory_cached", "reset_accumulated_memory_stats", "ipc_collect", "init"),
    *("manual_seed", "manual_seed_all", "seed", "seed_all", "set_device", "set_stream"),
    *("set_per_process_memory_fraction", "_lazy_init", "_record_memory_history"),
)
CAPABILITY = {"ampere": (8, 0), "hopper": (9, 0)}


class Idle:
    """A stream, an event or a device of a GPU: it takes every call, and does nothing."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __enter__(self) -> Idle:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


class Properties:
    """What is known of the GPU that a prediction is for."""

    def __init__(self, gpu: str):
        self.name = f"a GPU like {gpu}"
        self.major, self.minor = CAPABILITY[gpu]

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(
            f"{name} of the GPU at {line_of(asking_frame())}: a prediction does not know it; write "
            "the number into the program"
        )


@contextmanager
def cuda_module(
    gpu: str, values: Values, allocated: Callable[[], tuple[int, int]], empty_cache: Callable
) -> Iterator[None]:
    """A GPU is available, and does what the program says.

    Args:
        gpu: a key of `CAPABILITY`.
        values: for numbers that nobody knows, and notes.
        allocated: gives the bytes of the GPU's tensors, now and at most.
        empty_cache: notes that the program calls `torch.cuda.empty_cache`.
    """
    calls = _calls(gpu, values, allocated) | {"empty_cache": empty_cache}
    modules = (torch.cuda, torch.cuda.memory, torch.accelerator)
    of_gpu = [(module, name, value) for module in modules for name, value in calls.items()]
    of_gpu += [
        (torch.cuda.nvtx, name, Idle) for name in ("range_push", "range_pop", "mark", "range")
    ]
    there = [each for each in of_gpu if hasattr(*each[:2])]  # no version of torch has all of them
    eager = torch.compiler.set_stance("force_eager")  # what is compiled already
    with replaced(there), replaced(_of_programs(values)), eager:
        yield


def _calls(gpu: str, values: Values, allocated: Callable[[], tuple[int, int]]) -> dict[str, Any]:
    """What `torch.cuda` and `torch.accelerator` have, by name."""

    def no_size(*_: Any) -> None:
        raise NotImplementedError(
            f"the GPU's free memory at {line_of(asking_frame())}: a prediction does not know it; "
            "write the number into the program"
        )

    class Event(Idle):
        def elapsed_time(self, _: Any) -> Unknown:
            return Unknown(values, line_of(asking_frame()))

    return dict.fromkeys(IGNORED, _nothing) | {
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_name": lambda *_: Properties(gpu).name,
        "get_device_capability": lambda *_: CAPABILITY[gpu],
        "get_device_properties": lambda *_: Properties(gpu),
        "memory_allocated": lambda *_: allocated()[0],
        "max_memory_allocated": lambda *_: allocated()[1],
        "memory_reserved": lambda *_: allocated()[0],
        "max_memory_reserved": lambda *_: allocated()[1],
        "memory_summary": lambda *_, **__: "",
        "memory_stats": lambda *_: _memory_stats(*allocated()),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": _nothing,
        "mem_get_info": no_size,
        "get_memory_info": no_size,
        "current_accelerator": lambda *_, **__: torch.device("cuda"),
        "current_device_index": lambda: 0,
        "Event": Event,
        "Stream": Idle,
        "stream": Idle,
        "device": Idle,
        "current_stream": Idle,
        "default_stream": Idle,
    }


def _of_programs(values: Values) -> list[tuple[Any, str, Any]]:
    """Places, names and values of what programs call besides."""
    iterator = loaders._BaseDataLoaderIter
    found = [
        (torch.backends.cudnn, "is_acceptable", lambda _: False),
        (torch.backends.mha, "get_fastpath_enabled", lambda: False),  # of nested tensors
        (Tensor, "record_stream", _nothing),
        (Tensor, "share_memory_", lambda tensor: tensor),
        (UninitializedParameter, "__new__", _no_lazy_module),
        (UninitializedBuffer, "__new__", _no_lazy_module),
        (torch, "Generator", _Generator),
        (safetensors, "safe_open", SafeOpen),
        (safetensors.torch, "safe_open", SafeOpen),
        (nn.init, "_no_grad_trunc_normal_", _normal),  # torch's draws until all are inside
        (torch, "compile", _compile(values)),
        (torch, "save", _save(values)),
        (DataLoader, "_get_iterator", _loader_iterator(values)),
        (iterator, "_next_index", _with_real_tensors(iterator._next_index)),
    ]
    for name, answer in (("isnan", False), ("isinf", False), ("isfinite", True)):
        for module in (math, np):
            found.append((module, name, _of_unknown(getattr(module, name), answer)))
    if "torch.utils.tensorboard" in sys.modules:  # a prediction writes no logs
        writer = sys.modules["torch.utils.tensorboard"].SummaryWriter
        names = ("__init__", *(name for name in vars(writer) if name[0] != "_"))
        found += [(writer, name, _nothing) for name in names]
    return found


def _nothing(*_: Any, **__: Any) -> None:
    """Nothing to do."""


def _memory_stats(now: int, most: int) -> dict[str, int]:
    kinds = {"current": now, "peak": most, "allocated": 0, "freed": 0}
    names = ("allocated_bytes", "active_bytes", "requested_bytes", "reserved_bytes")
    return {f"{name}.all.{kind}": size for name in names for kind, size in kinds.items()}


def _no_lazy_module(*_: Any, **__: Any) -> None:
    raise NotImplementedError(
        f"a lazy module at {user_line()}: a prediction needs its sizes; write them down"
    )


def _normal(tensor: Tensor, mean: float, std: float, *_: Any, **__: Any) -> Tensor:
    with torch.no_grad():
        return tensor.normal_(mean, std)


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu"):
        """On the CPU, whatever the device."""
        return super().__new__(cls, device="cpu")


def _compile(values: Values) -> Callable:
    def compile_nothing(model: Any = None, **options: Any) -> Any:
        if model is None:
            return lambda model: compile_nothing(model)
        if "flex_attention" not in getattr(model, "__name__", ""):  # that has a note of its own
            values.note("torch.compile: predicted as it runs without; compiled kernels keep less")
        return model

    return compile_nothing


def _save(values: Values) -> Callable:
    def save(*_: Any, **__: Any) -> None:
        values.note("torch.save: nothing is written in a prediction")

    return save


SAFE_OPEN = safetensors.safe_open


class SafeOpen:
    """`safetensors.safe_open`, which maps the file on the host, then copies to the GPU."""

    def __init__(self, filename: Any, framework: str = "pt", device: Any = "cpu", **_: Any):
        self._file, self._device = SAFE_OPEN(filename, framework), device

    def __enter__(self) -> SafeOpen:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_tensor(self, name: str) -> Tensor:
        """One tensor."""
        return self._file.get_tensor(name).to(self._device)

    def get_tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {name: self.get_tensor(name) for name in self._file.keys()}  # noqa: SIM118


def _loader_iterator(values: Values) -> Callable:
    """Batches are made in this process, in which their memory is counted."""

    def iterator(loader: DataLoader) -> Any:
        if loader.num_workers:
            values.note(
                f"{loader.num_workers} workers of a DataLoader: each prepares "
                f"{loader.prefetch_factor} batches ahead, in memory of the host"
            )
            loader = copy.copy(loader)
            loader.num_workers, loader.timeout = 0, 0
        return loaders._SingleProcessDataLoaderIter(loader)

    return iterator


def _with_real_tensors(function: Callable) -> Callable:
    def run(*args: Any) -> Any:
        with real_tensors():
            return function(*args)

    return run


def _of_unknown(function: Callable, answer: bool) -> Callable:
    """In a program that works, a number that nobody knows is neither infinite nor NaN."""

    def ask(number: Any, *args: Any, **kwargs: Any) -> Any:
        is_unknown = number is NAN or isinstance(number, Unknown)
        return answer if is_unknown else function(number, *args, **kwargs)

    return ask
