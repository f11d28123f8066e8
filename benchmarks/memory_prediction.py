"""Does a step take as much memory on a GPU as was predicted without one?

    python benchmarks/memory_prediction.py                          predict, with the torch at hand
    python benchmarks/memory_prediction.py --compare                predictions of two torches
    python benchmarks/memory_prediction.py --measure [--default]    on a GPU, started by gpu.py

Steps of both networks, in training and in inference, by kernel of the attention, precision,
checkpointing, batch and crop. Predictions take minutes, so they are made ahead, with the torch that
the GPU has, and committed. `--measure` then runs every configuration that fits, in an order of
which each beginning has all kinds, and `max_memory_allocated` stands beside; with `--default`,
those whose kernel is left to torch. The peers are the estimates of other tools for the same steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import re
import statistics
from collections import Counter
from contextlib import nullcontext
from functools import cache, partial
from itertools import product

import torch
from events import REHEARSAL, attempt
from record import RESULTS, record
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tfswa_lab.memory import gauges
from tfswa_lab.memory.predict.cuda_attention import present_gpu
from tfswa_lab.memory.predict.predict import predict_choices
from tfswa_lab.memory.sizes import format_bytes
from tfswa_lab.models import tf_locoformer, tfswa_unet
from tfswa_lab.models.tf_locoformer import TFLocoformer
from tfswa_lab.models.tfswa_unet import TFSWAUNet

BINS = 65 if REHEARSAL else 1025
FRAMES_PER_SECOND = 4 if REHEARSAL else 44_100 / 512
NETWORKS = {
    "TFSWA-UNet small": (TFSWAUNet, tfswa_unet.SIZES["small"]),
    "TFSWA-UNet 15.4 M": (TFSWAUNet, tfswa_unet.SIZES["default"]),
    "TF-Locoformer S": (TFLocoformer, tf_locoformer.SIZES["S"]),
}
if REHEARSAL:
    NETWORKS = {
        "TFSWA-UNet small": (TFSWAUNet, tfswa_unet.SIZES["tiny"]),
        "TFSWA-UNet 15.4 M": (TFSWAUNet, tfswa_unet.SIZES["tiny"]),
        "TF-Locoformer S": (TFLocoformer, tf_locoformer.SIZES["tiny"]),
    }
KERNELS = {  # flash takes no mask, so the shifted windows of the TFSWA-UNet take the next
    "auto": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "math": [SDPBackend.MATH],
}
REHEARSED_ROWS = 3
ROOM = 0.9  # of the free memory of a GPU; a step that is predicted to take more is not tried
# Of the choices of a configuration, those that are not `make_step`'s.
OTHERS = ("attention", "gpu", "claim")


def make_step(network, seconds, batch, precision, checkpointed, train, accumulated=1, device="cpu"):
    """A step on spectrograms of stereo music, for `predict` and for the GPU."""
    kind, sizes = NETWORKS[network]
    model = kind(4, 8, **sizes, activation_checkpointing=checkpointed).to(device).train(train)
    frames = round(seconds * FRAMES_PER_SECOND)
    x = torch.randn(batch, 4, frames, BINS, device=device)
    cast = torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16")
    if not train:
        return lambda: infer(model, x, cast)
    optimizer = torch.optim.AdamW(model.parameters())
    target = torch.randn(batch, 8, frames, BINS, device=device)

    def step():
        for _ in range(accumulated):
            with cast:
                estimate = model(x)
            ((estimate.float() - target).abs().mean() / accumulated).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def infer(model, x, cast):
    """Without a graph."""
    with cast:
        return model(x)


def configurations() -> list[dict]:
    """All configurations: the kernel is named, or "auto", the first of a list that accepts."""
    found = []
    for network in NETWORKS:
        for (precision, attention), checkpointed, batch in product(
            (("fp32", "efficient"), ("bf16", "auto"), ("bf16", "efficient"), ("fp32", "math")),
            (False, True),
            (1, 2),
        ):
            if network == "TFSWA-UNet 15.4 M" and (
                (batch == 2 and not checkpointed)  # the same again
                or (precision, attention) == ("bf16", "efficient")  # heads of 4 channels: refused
            ):
                continue
            seconds = 1.0 if attention == "math" else 3.0
            found.append(
                {"network": network, "seconds": seconds, "batch": batch, "precision": precision}
                | {"attention": attention, "checkpointed": checkpointed, "train": True}
                | {"gpu": "ampere"}
            )
        for precision, attention in (("fp32", "efficient"), ("bf16", "auto"), ("fp32", "math")):
            found.append(
                {"network": network, "seconds": 3.0, "batch": 1, "precision": precision}
                | {"attention": attention, "checkpointed": False, "train": False}
                | {"gpu": "ampere"}
            )
    return found


def defaults() -> list[dict]:
    """The same in bfloat16, with the kernel that an H100 takes if none is named."""
    return [
        row | {"gpu": "hopper"}
        for row in configurations()
        if row["attention"] == "auto" and row["batch"] == 1
    ]


def eight_gib() -> dict[str, dict]:
    """A published claim: 6 s of stereo, batches of 4 and 15.4 M parameters in about 8 GB.

    All of our levers together, and each of them left out.
    """
    levers = {"network": "TFSWA-UNet 15.4 M", "seconds": 6.0, "batch": 1, "accumulated": 4}
    levers |= {"precision": "bf16", "attention": "auto", "checkpointed": True, "train": True}
    levers |= {"gpu": "ampere"}
    return {
        "all levers": levers,
        "float32": levers | {"precision": "fp32"},
        "not checkpointed": levers | {"checkpointed": False},
        "scores kept (math attention)": levers | {"attention": "math"},
        "the four at once": levers | {"batch": 4, "accumulated": 1},
        "float32, not checkpointed, the four at once": levers
        | {"precision": "fp32", "checkpointed": False, "batch": 4, "accumulated": 1},
        "none": levers
        | {"precision": "fp32", "checkpointed": False, "batch": 4, "accumulated": 1}
        | {"attention": "math"},
    }


def measured(row: dict) -> dict:
    """Peak bytes of two steps on the GPU, and the milliseconds of a third.

    `workspace` is memory that cuBLAS keeps: it is in `measured`, but in no prediction.
    """
    free = gauges.device_memory().free
    if row["predicted"] > ROOM * free:
        return {
            "does_not_fit": f"{format_bytes(row['predicted'])} predicted, {format_bytes(free)} free"
        }
    choices = {name: row[name] for name in row["choices"] if name not in OTHERS}
    before = gauges.allocated()
    gauges.reset_peak()
    is_default = row["gpu"] == "hopper"
    with nullcontext() if is_default else sdpa_kernel(KERNELS[row["attention"]]):
        step = make_step(**choices, device="cuda")
        step()
        step()
        peak = gauges.peak_allocated() - before
        reserved = gauges.peak_reserved()
        milliseconds = _timed(step)
    held = gauges.allocated()
    torch._C._cuda_clearCublasWorkspaces()
    workspace = held - gauges.allocated()
    return {
        "measured": peak,
        "measured_reserved": reserved,
        "workspace": workspace,
        "error": row["predicted"] / (peak - workspace) - 1,
        "error_gross": row["predicted"] / peak - 1,
        "milliseconds": round(milliseconds, 1),
    }


def _timed(step) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def in_fair_order(rows: list[dict]) -> list[dict]:
    """A shuffled order whose beginnings have all networks, kernels, precisions and modes.

    The next row is the one whose choices were seen the least so far.
    """
    left, order, seen = list(rows), [], Counter()
    random.Random(0).shuffle(left)
    while left:
        rarest = min(left, key=lambda row: sum(seen[name, row[name]] for name in row["choices"]))
        left.remove(rarest)
        order.append(rarest)
        seen.update((name, rarest[name]) for name in rarest["choices"])
    return order


def measure(default: bool) -> None:
    """Run on the GPU what was predicted; a line for each configuration."""
    rows = predictions_of(torch.__version__)["defaults" if default else "rows"]
    rows = in_fair_order(rows)[: REHEARSED_ROWS if REHEARSAL else None]
    if default and present_gpu() != "hopper":
        print("the default of this GPU is the order that is measured as 'auto'")
        return
    for row in rows:
        attempt("prediction", partial(measured, row), **row)
        gc.collect()
        torch.cuda.empty_cache()


def predictions_of(version: str) -> dict:
    """The predictions made with this torch, or with the nearest version."""
    wanted = _numbers(version)
    paths = list(RESULTS.glob("memory_prediction-torch*.json"))
    path = min(paths, key=lambda path: abs(_numbers(path.stem)[1] - wanted[1]))
    return json.loads(path.read_text())


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def compare() -> None:
    """Print where the predictions made with two versions of torch differ."""
    old, new = (
        json.loads(path.read_text())
        for path in sorted(RESULTS.glob("memory_prediction-torch*.json"), key=lambda p: p.stem)
    )
    largest = 0.0
    for part in ("rows", "defaults"):
        for a, b in zip(old[part], new[part], strict=True):
            change = b["predicted"] / a["predicted"] - 1
            largest = max(largest, abs(change))
            print(f"{change:+.3%}", *(str(a[name]) for name in a["choices"]))
    print(f"{old['machine']['torch']} and {new['machine']['torch']}: at most {largest:.3%} apart")


@cache
def peers(network: str, seconds: float, batch: int) -> dict[str, int]:
    """Estimates of other tools for the same step, in bytes."""
    kind, sizes = NETWORKS[network]
    frames = round(seconds * FRAMES_PER_SECOND)
    with torch.device("meta"):
        model = kind(4, 8, **sizes)
    found = {"parameters × 4": 16 * sum(p.numel() for p in model.parameters())}
    try:
        from accelerate.utils import calculate_maximum_sizes
        from torchinfo import summary
    except ImportError:
        return found
    found["accelerate, training"] = 4 * calculate_maximum_sizes(model)[0]
    shown = summary(model, (batch, 4, frames, BINS), device="meta", verbose=0)
    found["torchinfo"] = shown.total_input + shown.total_output_bytes + shown.total_param_bytes
    return found


def row_of(choices: dict) -> dict:
    """Prediction and peers of a configuration."""
    of_step = {name: value for name, value in choices.items() if name != "claim"}
    prediction = predict_choices(make_step, of_step)
    said = peers(choices["network"], choices["seconds"], choices["batch"])
    return choices | {
        "choices": list(choices),
        "predicted": prediction.peak,
        "predicted_reserved": prediction.reserved,
        "seconds_to_predict": round(prediction.seconds, 2),
        "peers": said,
    }


def predict_all() -> None:
    """Predict all configurations, record, print."""
    claims = [levers | {"claim": name} for name, levers in eight_gib().items()]
    parts = {"rows": configurations() + claims, "defaults": defaults()}
    result = {}
    for part, todo in parts.items():
        result[part] = []
        for choices in todo:
            row = row_of(choices)
            result[part].append(row)
            print(*choices.values(), format_bytes(row["predicted"]), flush=True)
    times = [row["seconds_to_predict"] for rows in result.values() for row in rows]
    major, minor, *_ = _numbers(torch.__version__)
    record(f"memory_prediction-torch{major}.{minor}", "cpu", result)
    print(f"predicted in {statistics.median(times):.1f} s (median), {max(times):.1f} s at most")


def main() -> None:
    """Predict, compare or measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compare", action="store_true", help="the predictions of two torches")
    parser.add_argument("--measure", action="store_true", help="on the GPU that is here")
    parser.add_argument("--default", action="store_true", help="with the kernel left to torch")
    asked = parser.parse_args()
    if asked.compare:
        compare()
    elif asked.measure:
        measure(asked.default)
    else:
        predict_all()


if __name__ == "__main__":
    main()
