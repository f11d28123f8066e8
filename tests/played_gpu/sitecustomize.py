"""A torch that plays a GPU: tensors of the CPU go by the name of cuda.

Python runs this first where its folder is on PYTHONPATH, as `benchmarks/gpu.py --rehearse` puts it,
so every branch for a GPU is walked. What is measured in this way says nothing. FAKE_GPU_GIB is the
memory of the GPU, 80 if it is not given.
"""

import os
import time
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

TOTAL = round(float(os.environ.get("FAKE_GPU_GIB", "80")) * 2**30)
MIB = 2**20
observers = []


class PlaysCuda(TorchFunctionMode):
    """A device that is called cuda is the CPU, and has no more than its memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if on_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        if func is torch.Tensor.to:
            args = tuple(torch.device("cpu") if on_cuda(each) else each for each in args)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if "DefaultCPUAllocator" not in str(error):
                raise
            for observe in observers:
                observe(0, TOTAL, TOTAL, 0)
            raise torch.OutOfMemoryError("CUDA out of memory (played)") from None


def on_cuda(value):
    return isinstance(value, str | torch.device) and str(value).startswith("cuda")


cpu_autocast = torch.autocast.__init__


def autocast(self, device_type, dtype=None, *args, **kwargs):
    """Casts of a GPU fall on the CPU's tensors."""
    if device_type == "cuda":
        device_type, dtype = "cpu", dtype or torch.float16
    cpu_autocast(self, device_type, dtype, *args, **kwargs)


class Event:
    """Time on the host's clock."""

    def __init__(self, enable_timing=False):
        self.time = 0.0

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1000 * (other.time - self.time)


def snapshot():
    from tfswa_lab.memory.snapshot.emit import as_snapshot
    from tfswa_lab.memory.trace.timeline import Block, Timeline

    return as_snapshot(Timeline([Block(5 * MIB, 5 * MIB, 1)], 1))


@contextmanager
def any_kernel(*_args, **_kwargs):
    yield


def does_nothing():
    """A function of its own for each name, as torch's compiler wants them."""
    return lambda *_args, **_kwargs: None


GPU = SimpleNamespace(
    name="Played GPU", total_memory=TOTAL, major=9, minor=0, multi_processor_count=132
)
DONE_AT_ONCE = ("init", "synchronize", "empty_cache", "set_device", "manual_seed_all")
DONE_AT_ONCE += ("reset_peak_memory_stats", "set_per_process_memory_fraction")
PLAYED = {
    torch.cuda: {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_, **__: GPU.name,
        "get_device_capability": lambda *_, **__: (GPU.major, GPU.minor),
        "get_device_properties": lambda *_, **__: GPU,
        "mem_get_info": lambda *_, **__: (TOTAL - 512 * MIB, TOTAL),
        "memory_allocated": lambda *_, **__: MIB,
        "memory_reserved": lambda *_, **__: 20 * MIB,
        "max_memory_allocated": lambda *_, **__: 100 * MIB,
        "max_memory_reserved": lambda *_, **__: 120 * MIB,
        "memory_stats": lambda *_, **__: {},
        "Event": Event,
        **{name: does_nothing() for name in DONE_AT_ONCE},
    },
    torch.cuda.memory: {"_record_memory_history": does_nothing(), "_snapshot": snapshot},
    torch.accelerator: {
        "current_device_index": lambda: 0,
        "set_device_index": does_nothing(),
        "current_stream": lambda *_: SimpleNamespace(is_capturing=lambda: False),
    },
    torch._C: {
        "_cuda_clearCublasWorkspaces": does_nothing(),
        "_cuda_isHistoryEnabled": lambda: False,
        "_cuda_attach_out_of_memory_observer": observers.append,
    },
    torch: {"set_default_device": does_nothing()},
    torch.autocast: {"__init__": autocast},
    torch.nn.attention: {"sdpa_kernel": any_kernel},
    torch.backends.cudnn: {"version": lambda: 91900},
    torch.Tensor: {"pin_memory": lambda self, *_: self},
}
for place, names in PLAYED.items():
    for name, value in names.items():
        setattr(place, name, value)
PlaysCuda().__enter__()
