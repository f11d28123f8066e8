"""How fast does the small separator run, and which block takes the time?

    python benchmarks/separator.py
    python benchmarks/separator.py --device cuda    also by batch and precision, started by gpu.py

One process, evaluation mode, float32, a segment of three seconds. The peer is the same network
with the attention scores written out (`ScaledDotProductAttention`) in place of torch's fused
kernel; the two are timed in turns. On a GPU, the shipped separator from file to file as well.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from events import REHEARSAL, attempt
from record import record, table
from separate_stream import SEGMENT_SECONDS, write_song

from tfswa_lab.device import pick_device
from tfswa_lab.inference.files import Writing, separate_file
from tfswa_lab.inference.separate import Segmentation
from tfswa_lab.models.attention import (
    FrequencySequenceAttention,
    ScaledDotProductAttention,
    ShiftedWindowAttention,
    TemporalSequenceAttention,
)
from tfswa_lab.models.separator import Separator, build_separator
from tfswa_lab.models.storage import load_separator
from tfswa_lab.models.tfswa_unet import SIZES
from tfswa_lab.weights import BAND

STEMS = ("vocals", "drums", "bass", "other")
SECONDS = 0.05 if REHEARSAL else 3.0
REPEATS = 1 if REHEARSAL else 5
BATCHES = (1,) if REHEARSAL else (1, 8, 32)
MINUTES = 0.05 if REHEARSAL else 4.0  # of the song that is separated from file to file
KINDS = {
    TemporalSequenceAttention: "TSA",
    FrequencySequenceAttention: "FSA",
    ShiftedWindowAttention: "SWA",
}


def now(device: torch.device) -> float:
    """The time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(separator: Separator, mixture: torch.Tensor) -> float:
    """Seconds of one separation."""
    start = now(mixture.device)
    separator(mixture)
    return now(mixture.device) - start


@contextmanager
def written_out_attention():
    """Replace the fused kernel by the formula."""

    def formula(query, key, value, attn_mask=None):
        return ScaledDotProductAttention()(query, key, value, attn_mask)[0]

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", formula):
        yield


def real_time_factors(separator: Separator, mixture: torch.Tensor) -> dict[str, dict[str, float]]:
    """Median, least and most of seconds computed per second of sound; the first round warms up."""
    times = defaultdict(list)
    for _ in range(REPEATS + 1):
        times["fused"].append(seconds_of(separator, mixture))
        with written_out_attention():
            times["written out"].append(seconds_of(separator, mixture))
    summaries = {"median": statistics.median, "least": min, "most": max}
    return {
        kind: {name: round(f(spent[1:]) / SECONDS, 4) for name, f in summaries.items()}
        for kind, spent in times.items()
    }


def seconds_inside(separator: Separator, modules: dict, mixture: torch.Tensor) -> dict[str, float]:
    """Seconds spent inside each named module during one separation."""
    spent, handles, device = defaultdict(float), [], mixture.device

    def before(module, inputs):
        module.started = now(device)

    for module, name in modules.items():

        def after(module, inputs, output, name=name):
            spent[name] += now(device) - module.started

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    spent["all"] = seconds_of(separator, mixture)
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
        "attention": lambda: real_time_factors(separator, mixture),
        "stages": lambda: {"share": shares(separator, by_stage(separator), mixture)},
        "kinds": lambda: {"share": shares(separator, by_kind(separator), mixture)},
    }.items():
        attempt("separation", row, way=name)


def network_alone(separator: Separator, mixture: torch.Tensor, batch: int, precision: str) -> dict:
    """Seconds of sound per second, from waveforms to waveforms on the GPU."""
    many = mixture.expand(batch, -1, -1).contiguous()
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
        times = [seconds_of(separator, many) for _ in range(1 + REPEATS)][1:]
    return {"times_real_time": round(batch * SECONDS / statistics.median(times), 1)}


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
    device = pick_device(parser.parse_args().device)
    torch.manual_seed(0)
    separator = build_separator(STEMS, **SIZES["small"]).eval().to(device)
    mixture = 0.1 * torch.randn(1, 2, round(SECONDS * separator.sample_rate), device=device)
    if device.type == "cuda":
        return on_gpu(separator, mixture)
    factors = real_time_factors(separator, mixture)
    result = {
        "parameters": separator.model.get_num_parameters(),
        "sizes": separator.model.sizes,
        "segment_seconds": SECONDS,
        "threads": torch.get_num_threads(),
        "real_time_factor": factors,
        "share_by_stage": shares(separator, by_stage(separator), mixture),
        "share_by_kind": shares(separator, by_kind(separator), mixture),
    }
    record("separator", "cpu", result)
    rows = [(kind, *(f"{each:.3g}" for each in f.values())) for kind, f in factors.items()]
    print(table(["attention", "real-time factor", "least", "most"], rows))
    parts = result["share_by_stage"] | result["share_by_kind"]
    print("\n" + table(["part", "share"], [(name, f"{x:.1%}") for name, x in parts.items()]))


if __name__ == "__main__":
    main()
