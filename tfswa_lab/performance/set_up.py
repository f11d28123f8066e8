"""How this machine is set up for training, and what each change gains, measured here.

Notebook: 09_running_lean
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from tfswa_lab.device import compute_threads, pick_device
from tfswa_lab.doctor import check_cuda
from tfswa_lab.memory import gauges
from tfswa_lab.memory.display import Shown, html_table
from tfswa_lab.memory.sizes import MIB, format_bytes
from tfswa_lab.models.tfswa_block import TFSWABlock
from tfswa_lab.performance.events import record
from tfswa_lab.performance.timing import format_seconds, seconds_of

NOT_MEASURED = "not measured"
ATTENTION = "aten::_scaled_dot_product_"
ATTENTION_SHAPE = (1, 4, 256, 32)  # batch, heads, length, width of a head
REPEATS = 3
LONG_STEPS = 0.5  # seconds of steps, after which no more are tried
BATCHES = 8  # that are fetched from a loader after the first
LONG_FETCH = 0.5  # seconds to the first batch, above which no more are fetched
READ = 64 * MIB  # of files


class Setting(NamedTuple):
    """One line: what is set, how, and what changing it gives on this machine."""

    name: str
    now: str
    change: str


@dataclass(frozen=True, repr=False)
class SetUp(Shown):
    """The settings of a machine, a line for each.

    Args:
        settings: in the order in which a reader should look at them.
    """

    settings: tuple[Setting, ...]

    def __getitem__(self, name: str) -> Setting:
        return next(setting for setting in self.settings if setting.name == name)

    @property
    def brief(self) -> str:
        """The device, and how many settings there are."""
        return f"{self['device'].now}, {len(self.settings)} settings"

    def __str__(self) -> str:
        return "\n".join(f"{s.name:18} {s.now} → {s.change}" for s in self.settings)

    def _repr_html_(self) -> str:
        return html_table([("setting", "now", "a change, measured here"), *self.settings])


def diagnose(
    step: Callable[[], Any] | None = None,
    loader: DataLoader | None = None,
    model: nn.Module | None = None,
    folder: str | Path | None = None,
    device: str | torch.device = "auto",
) -> SetUp:
    """Look at what decides the speed of training, and try each change shortly.

    All settings are restored; `step` trains as often as it is called. Without arguments it takes
    a few seconds.

    Args:
        step: a training step, which is called about twenty times. Without one, a step of a small
            block of the TFSWA-UNet stands in.
        loader: its first batches are fetched, a second time with other workers.
        model: may be compiled or not.
        folder: files in it are read, at most 64 MiB.
        device: as for `pick_device`.

    Raises:
        ValueError: the device does not exist.
        FileNotFoundError: the folder does not exist or has no files.
    """
    device = pick_device(device)
    probe = step or block_step(device)
    return SetUp(
        (
            Setting("device", f"{_name(device)} ({check_cuda().found})", NOT_MEASURED),
            _dtype(probe, device),
            _threads(probe, device),
            _float32(probe, device),
            _cudnn(probe, device),
            _attention(device),
            Setting("torch.compile", *_compiled(model)),
            *_loader(loader, device),
            Setting("disk", *_disk(folder)),
            _memory(),
        )
    )


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


# Changes that are tried on a step ----------------------------------------------------------------


def block_step(device: torch.device) -> Callable[[], None]:
    """Forward and backward of a small TFSWA block on random numbers of its own."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):  # the block draws its weights from the global generator
        block = TFSWABlock(16, 2).to(device)
    x = torch.randn(1, 16, 64, 64, generator=generator).to(device)

    def step() -> None:
        block.zero_grad()
        block(x).float().square().mean().backward()

    return step


def mixed_precision_ratio(device: str | torch.device = "auto", step: Any = None) -> float:
    """Seconds of a step under bfloat16 autocast, divided by those without: above 1 is slower.

    Args:
        device: as for `pick_device`.
        step: a training step; a small block of the TFSWA-UNet if None.

    Raises:
        ValueError: the device does not exist.
    """
    device = pick_device(device)
    return _ratio(step or block_step(device), torch.autocast(device.type, torch.bfloat16))


def _ratio(step: Callable[[], Any], change: AbstractContextManager) -> float:
    """Seconds with a change, divided by those without."""
    before = _median(step)
    with change:
        return _median(step) / before


def _median(step: Callable[[], Any]) -> float:
    """Seconds of a step, after one to warm up; of a single one where it takes long."""
    runs = [seconds_of(step)]
    while len(runs) < 2 or (len(runs) <= REPEATS and sum(runs) < LONG_STEPS):
        runs.append(seconds_of(step))
    return statistics.median(runs[1:])


def spoken(ratio: float) -> str:
    """A ratio of seconds as a sentence.

    >>> spoken(2.5), spoken(0.5), spoken(1.02)
    ('2.5 times slower', '2.0 times faster', 'makes no difference (1.02 times the time)')
    """
    if 0.9 <= ratio <= 1.1:
        return f"makes no difference ({ratio:.2f} times the time)"
    return f"{ratio:.1f} times slower" if ratio > 1 else f"{1 / ratio:.1f} times faster"


def _dtype(step: Callable[[], Any], device: torch.device) -> Setting:
    now = str(torch.get_default_dtype()).removeprefix("torch.")
    ratio = mixed_precision_ratio(device, step)
    return Setting("dtype", now, f"mixed precision (bfloat16, --use-amp): {spoken(ratio)}")


def _threads(step: Callable[[], Any], device: torch.device) -> Setting:
    used, present = torch.get_num_threads(), _cores()
    now = f"{used} of {present} cores, {psutil.getloadavg()[0]:.1f} busy in the last minute"
    if device.type != "cpu" or used == present:
        return Setting("threads", now, f"{NOT_MEASURED}: nothing to change")
    ratio = _ratio(step, compute_threads(present))
    return Setting("threads", now, f"{present} threads: {spoken(ratio)}")


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count() or 1


def _float32(step: Callable[[], Any], device: torch.device) -> Setting:
    """TF32, on a CUDA GPU."""
    now = torch.get_float32_matmul_precision()
    name, other = "float32 products", "high" if now == "highest" else "highest"
    if device.type == "cuda":
        ratio = _ratio(step, float32_precision(other))
        return Setting(name, f"{now} ({_tf32(now)})", f"{other} ({_tf32(other)}): {spoken(ratio)}")
    return Setting(name, now, f"{NOT_MEASURED}: TF32 is of CUDA GPUs")


def _tf32(precision: str) -> str:
    return "no TF32" if precision == "highest" else "TF32"


@contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Let float32 matrices be multiplied with another precision inside the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _cudnn(step: Callable[[], Any], device: torch.device) -> Setting:
    on = torch.backends.cudnn.benchmark
    name, now = "cudnn.benchmark", "on" if on else "off"
    if device.type != "cuda":
        return Setting(name, now, f"{NOT_MEASURED}: cuDNN is of CUDA GPUs")
    ratio = _ratio(step, cudnn_benchmark(not on))
    return Setting(name, now, f"{'off' if on else 'on'}: {spoken(ratio)}")


@contextmanager
def cudnn_benchmark(on: bool) -> Iterator[None]:
    """Let cuDNN try several algorithms for each new shape, or not, inside the block."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _compiled(model: nn.Module | None) -> tuple[str, str]:
    """torch marks a compiled module in two ways: `torch.compile(m)` and `m.compile()`."""
    if model is None:
        return "no model given", NOT_MEASURED
    dynamo = sys.modules.get("torch._dynamo")  # its import takes seconds, and comes with a compile
    compiled = dynamo is not None and any(
        isinstance(module, dynamo.OptimizedModule) or module._compiled_call_impl is not None
        for module in model.modules()
    )
    now = "compiled" if compiled else "not compiled"
    return now, f"{NOT_MEASURED}: compiling takes minutes"


# Attention ---------------------------------------------------------------------------------------


def attention_kernel(device: torch.device, dtype: torch.dtype, mask: bool) -> str:
    """Which kernel `scaled_dot_product_attention` really takes, such as `flash_attention`.

    >>> attention_kernel(torch.device("cpu"), torch.float32, mask=False)
    'flash_attention_for_cpu'
    """
    events = record(_attend(device, dtype, mask), 1).events
    taken = [event.name for event in events if event.name.startswith(ATTENTION)]
    known = [name.removeprefix(ATTENTION) for name in taken if "fused" not in name]
    return known[-1] if known else "none"


def _attend(device: torch.device, dtype: torch.dtype, mask: bool) -> Callable[[], Any]:
    query = torch.ones(ATTENTION_SHAPE, device=device, dtype=dtype)
    length = ATTENTION_SHAPE[2]
    added = torch.zeros(length, length, device=device, dtype=dtype) if mask else None
    return lambda: F.scaled_dot_product_attention(query, query, query, attn_mask=added)


def _attention(device: torch.device) -> Setting:
    half = torch.bfloat16
    kernels: dict[str, list[str]] = {}
    for dtype, mask in product((torch.float32, half), (False, True)):
        name = f"{str(dtype).removeprefix('torch.')}{' with mask' if mask else ''}"
        kernels.setdefault(attention_kernel(device, dtype, mask), []).append(name)
    now = "; ".join(f"{kernel} ({', '.join(names)})" for kernel, names in kernels.items())
    attend = _attend(device, torch.float32, mask=False)
    ratio = _ratio(attend, sdpa_kernel(SDPBackend.MATH))
    return Setting("attention", now, f"scores written out (math), float32: {spoken(ratio)}")


# Data --------------------------------------------------------------------------------------------


def _loader(loader: DataLoader | None, device: torch.device) -> list[Setting]:
    if loader is None:
        return [Setting("DataLoader", "none given", NOT_MEASURED)]
    pinned = "on" if loader.pin_memory else "off"
    return [
        Setting("num_workers", *_workers(loader)),
        Setting("pin_memory", pinned, _pinning(device)),
    ]


def _workers(loader: DataLoader) -> tuple[str, str]:
    first, each = _fetch_seconds(loader)
    now = f"{loader.num_workers}: {format_seconds(first)} to the first batch"
    if each is None:
        return now, f"{NOT_MEASURED}: it is the only one, or takes too long"
    now += f", then {format_seconds(each)} each"
    other = 0 if loader.num_workers else 2
    try:
        first, changed = _fetch_seconds(_with_workers(loader, other))
    except Exception as error:  # the data set does not survive a worker: that is the finding
        return now, f"{other} workers fail: {type(error).__name__}: {error}".splitlines()[0]
    return now, f"{other} workers: {spoken(changed / each)} after the first"


def _with_workers(loader: DataLoader, count: int) -> DataLoader:
    batches = {"batch_sampler": loader.batch_sampler}
    if loader.batch_sampler is None:  # an iterable data set, or items instead of batches
        batches = {"batch_size": loader.batch_size}
    return DataLoader(
        loader.dataset,
        **batches,
        collate_fn=loader.collate_fn,
        num_workers=count,
        worker_init_fn=loader.worker_init_fn,
        pin_memory=loader.pin_memory,
        prefetch_factor=1 if count else None,  # few batches are ready before the clock starts
    )


def _fetch_seconds(loader: DataLoader) -> tuple[float, float | None]:
    """Seconds to the first batch, and of each of some more; None if that would take long."""
    with torch.random.fork_rng(devices=[]):  # a loader draws a seed, and perhaps the order
        return _fetch(loader)


def _fetch(loader: DataLoader) -> tuple[float, float | None]:
    began = time.perf_counter()
    batches = iter(loader)
    next(batches)
    first = time.perf_counter() - began
    if first > LONG_FETCH:
        return first, None
    began = time.perf_counter()
    count = sum(1 for _ in islice(batches, BATCHES))
    return first, (time.perf_counter() - began) / count if count else None


def _pinning(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{NOT_MEASURED}: pinned memory is for copies to a GPU"
    pageable = torch.ones(16 * MIB, dtype=torch.uint8)
    pinned = pageable.pin_memory()
    ratio = _median(lambda: pinned.to(device)) / _median(lambda: pageable.to(device))
    return f"a copy to the GPU out of pinned memory: {spoken(ratio)}"


def _disk(folder: str | Path | None) -> tuple[str, str]:
    if folder is None:
        return "no folder given", NOT_MEASURED
    count, seconds = read_rate(Path(folder))
    rate = f"{count / MIB / seconds:.0f} MiB/s ({format_bytes(count)} of {folder})"
    return rate, "an upper bound: the system may still hold the files in its page cache"


def read_rate(folder: Path) -> tuple[int, float]:
    """Bytes of a folder's files, at most 64 MiB, and the seconds to read them.

    The system is asked to forget the files first; it need not, and then this is the rate of its
    page cache, which is much faster than the disk.

    Raises:
        FileNotFoundError: there is no such folder, or no file with content in it.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    count, seconds = 0, 0.0
    for path in files:
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            count += len(file.read(READ - count) or b"")
            seconds += time.perf_counter() - began
        if count >= READ:
            break
    if not count:
        raise FileNotFoundError(
            f"folder={str(folder)!r} has no files to read; name that of the data"
        )
    return count, seconds


def _memory() -> Setting:
    swap = psutil.swap_memory()
    now = (
        f"{format_bytes(gauges.host_available())} of {format_bytes(gauges.host_total())} free, "
        f"swap {format_bytes(swap.used)} of {format_bytes(swap.total)} used"
    )
    return Setting("RAM", now, NOT_MEASURED)
