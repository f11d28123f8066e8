"""How fast does the small separator run, how fast could it, and which block takes the time?

    python benchmarks/separator.py [--seconds 6] [--threads 1]
    python benchmarks/separator.py --device cuda    also by batch and precision, started by gpu.py

One process, evaluation mode, float32, one segment. The peers are the same network with torch's
fused attention kernel, and with the scores written out (`ScaledDotProductAttention`); all are timed
in turns, and their outputs compared. The floor is what the multiplications, the exponentials and
the memory traffic would take at rates measured here. On a GPU, the shipped separator from file to
file as well.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from events import REHEARSAL, attempt
from numba import njit
from record import record, table
from separate_stream import SEGMENT_SECONDS, write_song
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tfswa_lab.audio import SAMPLE_RATE, STEMS
from tfswa_lab.device import pick_device
from tfswa_lab.inference.files import Writing, separate_file
from tfswa_lab.inference.separate import Segmentation
from tfswa_lab.models.attention import (
    AttentionUnit,
    FrequencySequenceAttention,
    ScaledDotProductAttention,
    ShiftedWindowAttention,
    TemporalSequenceAttention,
)
from tfswa_lab.models.cpu_kernel import activate, softmax
from tfswa_lab.models.separator import Separator, build_separator
from tfswa_lab.models.storage import load_separator
from tfswa_lab.models.tfswa_unet import SIZES
from tfswa_lab.performance.rates import measured_rates
from tfswa_lab.performance.timing import benchmark, now, real_time_factor
from tfswa_lab.weights import BAND

SECONDS = 0.05 if REHEARSAL else 3.0  # of a segment on a GPU
REPEATS = 1 if REHEARSAL else 5
CALLS = 10_000  # of a kernel's function whose rate is measured
BATCHES = (1,) if REHEARSAL else (1, 8, 32)
MINUTES = 0.01 if REHEARSAL else 4.0  # of the song that is separated from file to file
KINDS = {
    TemporalSequenceAttention: "TSA",
    FrequencySequenceAttention: "FSA",
    ShiftedWindowAttention: "SWA",
}


def separation(separator: Separator, mixture: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Estimates, and the seconds that they took."""
    start = now()
    estimates = separator(mixture)
    return estimates, now() - start


@contextmanager
def written_out_attention():
    """Replace the fused kernel by the formula."""

    def formula(query, key, value, attn_mask=None):
        return ScaledDotProductAttention()(query, key, value, attn_mask)[0]

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", formula):
        yield


def torchs_operators():
    """Leave the compiled kernel out."""
    return mock.patch("tfswa_lab.models.attention.runs_lean", return_value=False)


WAYS = {  # the first is what a user gets
    "compiled kernel": nullcontext,
    "torch's fused kernel": torchs_operators,
    "scores written out": written_out_attention,
}


def in_turns(
    separator: Separator, mixture: torch.Tensor, ways: Iterable[str] = WAYS
) -> dict[str, dict[str, float]]:
    """CPU and wall seconds of each way per second of sound; the first round warms up."""
    cpu, wall, outputs = defaultdict(list), defaultdict(list), {}
    for _ in range(REPEATS + 1):
        for name in ways:
            with WAYS[name]():
                began = time.process_time()
                outputs[name], seconds = separation(separator, mixture)
                cpu[name].append((time.process_time() - began) / seconds_of_sound(mixture))
                wall[name].append(seconds)
    right = outputs["scores written out"]
    return {
        name: {
            "cpu_seconds_per_second": statistics.median(cpu[name][1:]),
            "least": min(cpu[name][1:]),
            "most": max(cpu[name][1:]),
            "times_real_time": real_time_factor(
                statistics.median(wall[name][1:]), seconds_of_sound(mixture)
            ),
            "largest_difference": ((outputs[name] - right).abs().max() / right.abs().max()).item(),
        }
        for name in ways
    }


def seconds_of_sound(mixture: torch.Tensor) -> float:
    """Of all examples together."""
    return len(mixture) * mixture.shape[-1] / SAMPLE_RATE


# The floor ---------------------------------------------------------------------------------------


def work_of(separator: Separator, mixture: torch.Tensor) -> dict[str, float]:
    """FLOPs of all products, exponentials of softmax, GELUs, bytes in and out of each layer.

    A layer is a module without children, or an attention unit, whose inside stays in the cache.
    """
    work = {"flops": 0, "exponentials": 0, "gelus": 0, "bytes": 0}
    kernel = torch.nn.functional.scaled_dot_product_attention

    def counted(query, key, value, **options):
        work["exponentials"] += query.shape[:-1].numel() * key.shape[-2]
        return kernel(query, key, value, **options)

    def count(module, inputs, output):
        if isinstance(module, nn.GELU):
            work["gelus"] += output.numel()
        if module in layers:
            work["bytes"] += 4 * (inputs[0].numel() + output.numel())

    units = {module for module in separator.modules() if isinstance(module, AttentionUnit)}
    inside = {module for unit in units for module in unit.modules()} - units
    leaves = {module for module in separator.modules() if not list(module.children())}
    layers = units | (leaves - inside - {separator.stft})
    handles = [module.register_forward_hook(count) for module in separator.model.modules()]
    patched = mock.patch("torch.nn.functional.scaled_dot_product_attention", counted)
    with patched, FlopCounterMode(display=False) as flops:
        separator(mixture)
    for handle in handles:
        handle.remove()
    return work | {"flops": flops.get_total_flops()}


def rates() -> dict[str, float]:
    """FLOPs per second of a large product, bytes of a copy, and the kernel's own functions."""
    best, numbers = measured_rates(torch.device("cpu")), torch.zeros(1, 1024).numpy()
    calls = CALLS * numbers.size
    return {
        "flops": best.flops,
        "exponentials": calls / benchmark(partial(many_powers, numbers[0], CALLS)).least,
        "gelus": calls / benchmark(partial(many_gelus, numbers, CALLS)).least,
        "bytes": best.bytes,
    }


@njit
def many_powers(scores, times):
    """Powers of two in the cache, without the call from Python between them."""
    for _ in range(times):
        scores[:] = 0
        softmax(scores, len(scores), True)


@njit
def many_gelus(hidden, times):
    """GELUs in the cache."""
    for _ in range(times):
        hidden[:] = 1
        activate(hidden, hidden.shape[1])


def floor_of(separator: Separator, mixture: torch.Tensor) -> dict[str, dict[str, float]]:
    """What is to be done per second of sound, the rate of each kind, and seconds for both."""
    work, possible = work_of(separator, mixture), rates()
    return {
        kind: {
            "per_second_of_sound": amount / seconds_of_sound(mixture),
            "rate_per_second": possible[kind],
            "seconds": amount / seconds_of_sound(mixture) / possible[kind],
        }
        for kind, amount in work.items()
    }


# Where the time goes -----------------------------------------------------------------------------


def seconds_inside(separator: Separator, modules: dict, mixture: torch.Tensor) -> dict[str, float]:
    """Seconds spent inside each named module during one separation."""
    spent, handles = defaultdict(float), []

    def before(module, inputs):
        module.started = now()

    for module, name in modules.items():

        def after(module, inputs, output, name=name):
            spent[name] += now() - module.started

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    _, spent["all"] = separation(separator, mixture)
    for handle in handles:
        handle.remove()
    return spent


def shares(separator: Separator, modules: dict, mixture: torch.Tensor) -> dict[str, float]:
    """Share of the whole that each name takes, and the rest; median over the repeats."""
    runs = [seconds_inside(separator, modules, mixture) for _ in range(REPEATS)]
    names = dict.fromkeys(modules.values())
    found = {name: statistics.median(run[name] / run["all"] for run in runs) for name in names}
    return {name: round(share, 3) for name, share in found.items()} | {
        "rest": round(1 - sum(found.values()), 3)
    }


def by_stage(separator: Separator) -> dict:
    """The network's stages, in the order of the signal."""
    model = separator.model
    named = {model.stem: "stem"}
    named |= {block: f"encoder {i}" for i in range(3) for block in model.encoder[i]}
    named |= dict.fromkeys(model.bottleneck, "bottleneck")
    named |= {block: f"decoder {2 - i}" for i in range(3) for block in model.decoder[i]}
    return named | {model.head: "head"}


def by_kind(separator: Separator) -> dict:
    """The three attentions, wherever they stand."""
    return {m: KINDS[type(m)] for m in separator.modules() if type(m) in KINDS}


def on_gpu(separator: Separator, mixture: torch.Tensor) -> None:
    """A line for each way, batch and precision; then the peer, and where the time goes."""
    ways = {"network": partial(network_alone, separator, mixture), "files": file_to_file}
    for way, batch, precision in product(ways, BATCHES, ("float32", "bfloat16")):
        row = partial(ways[way], batch, precision)
        attempt("separation", row, way=way, batch=batch, precision=precision)
        torch.cuda.empty_cache()
    for name, row in {
        "attention": lambda: by_attention(separator, mixture),
        "stages": lambda: {"share": shares(separator, by_stage(separator), mixture)},
        "kinds": lambda: {"share": shares(separator, by_kind(separator), mixture)},
    }.items():
        attempt("separation", row, way=name)


def by_attention(separator: Separator, mixture: torch.Tensor) -> dict[str, float]:
    """Seconds of sound per second with torch's kernel, and with scores written out."""
    ways = in_turns(separator, mixture, [*WAYS][1:])
    return {name: round(way["times_real_time"], 1) for name, way in ways.items()}


def network_alone(separator: Separator, mixture: torch.Tensor, batch: int, precision: str) -> dict:
    """Seconds of sound per second, from waveforms to waveforms on the GPU."""
    many = mixture.expand(batch, -1, -1).contiguous()
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
        times = [separation(separator, many)[1] for _ in range(1 + REPEATS)][1:]
    factor = real_time_factor(statistics.median(times), SECONDS, batch)
    return {"times_real_time": round(factor, 1)}


def file_to_file(batch: int, precision: str) -> dict:
    """Seconds of sound per second, from a WAV file to four; warmed up on the same song."""
    separator = load_separator(BAND).cuda()
    with tempfile.TemporaryDirectory() as folder:
        song = Path(folder) / "song.wav"
        write_song(song, MINUTES)
        for _ in range(2):
            began = time.perf_counter()
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
                segmentation = Segmentation(SEGMENT_SECONDS, batch_size=batch)
                overwrite = Writing(overwrite=True)
                separate_file(separator, song, folder, segmentation, writing=overwrite)
            seconds = time.perf_counter() - began
    return {"times_real_time": round(60 * MINUTES / seconds, 1), "seconds": round(seconds, 2)}


@torch.inference_mode()
def main() -> None:
    """Measure, record, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=6.0, help="of the segment, on a CPU")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    asked = parser.parse_args()
    device = pick_device(asked.device)
    torch.manual_seed(0)
    separator = build_separator(STEMS, **SIZES["small"]).eval().to(device)
    on_cpu = device.type == "cpu"
    samples = round((asked.seconds if on_cpu else SECONDS) * SAMPLE_RATE)
    mixture = 0.1 * torch.randn(1, 2, samples, device=device)
    if not on_cpu:
        return on_gpu(separator, mixture)
    torch.set_num_threads(asked.threads)
    result = {
        "parameters": separator.model.get_num_parameters(),
        "sizes": separator.model.sizes,
        "segment_seconds": asked.seconds,
        "threads": asked.threads,
        "ways": in_turns(separator, mixture),
        "floor": floor_of(separator, mixture),
        "share_by_stage": shares(separator, by_stage(separator), mixture),
        "share_by_kind": shares(separator, by_kind(separator), mixture),
    }
    record("separator", "cpu", result)
    show(result)


def show(result: dict) -> None:
    """Print the tables."""
    rows = [(name, *(f"{way[key]:.3g}" for key in way)) for name, way in result["ways"].items()]
    columns = [
        "attention",
        "CPU s per s of audio",
        "least",
        "most",
        "times real time",
        "difference",
    ]
    print(table(columns, rows))
    floor = result["floor"].items()
    rows = [(kind, *(f"{part[key]:.3g}" for key in part)) for kind, part in floor]
    rows += [("floor", "", "", f"{sum(part['seconds'] for _, part in floor):.3g}")]
    print("\n" + table(["work", "per s of audio", "rate per s", "seconds"], rows))
    parts = result["share_by_stage"] | result["share_by_kind"]
    print("\n" + table(["part", "share"], [(name, f"{x:.1%}") for name, x in parts.items()]))


if __name__ == "__main__":
    main()
