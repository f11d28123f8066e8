"""Is the memory of a step predicted without a card what the card then takes?

    python benchmarks/memory_prediction.py [--device cuda]

Steps of both networks, in training and in inference, by kernel of the attention, precision,
checkpointing, batch and crop. Without a card the predictions and their times are recorded; with
one, every configuration that fits runs on it, and `max_memory_allocated` stands beside. The peers
say what they say about the same steps.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from functools import cache
from itertools import product
from pathlib import Path

import torch
from record import RESULTS, record
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tfswa_lab.device import pick_device
from tfswa_lab.memory.card.fake import without_values
from tfswa_lab.memory.compare import predict_choices
from tfswa_lab.memory.sizes import in_words
from tfswa_lab.models import tf_locoformer, tfswa_unet
from tfswa_lab.models.tf_locoformer import TFLocoformer
from tfswa_lab.models.tfswa_unet import TFSWAUNet

GPU = True
BINS = 1025
FRAMES_PER_SECOND = 44_100 / 512
NETWORKS = {
    "TFSWA-UNet small": (TFSWAUNet, tfswa_unet.SMALL),
    "TFSWA-UNet 15.4 M": (TFSWAUNet, tfswa_unet.DEFAULT),
    "TF-Locoformer S": (TFLocoformer, tf_locoformer.SMALL),
}
KERNELS = {  # flash takes no mask, so the shifted windows of the TFSWA-UNet take the next
    "auto": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "math": [SDPBackend.MATH],
}
ROOM = 0.9  # of a card; what is predicted to take more is not tried


def make_step(network, seconds, batch, precision, checkpointed, train, accumulated=1, device="cpu"):
    """A step on spectrograms of stereo music, for `predict` and for the card."""
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
    """What is tried, small first."""
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
            )
        for precision, attention in (("fp32", "efficient"), ("bf16", "auto"), ("fp32", "math")):
            found.append(
                {"network": network, "seconds": 3.0, "batch": 1, "precision": precision}
                | {"attention": attention, "checkpointed": False, "train": False}
            )
    return found


def eight_gib() -> dict[str, dict]:
    """A published claim: 6 s of stereo, batches of 4 and 15.4 M parameters in about 8 GB.

    All of our levers together, and each of them left out.
    """
    levers = {"network": "TFSWA-UNet 15.4 M", "seconds": 6.0, "batch": 1, "accumulated": 4}
    levers |= {"precision": "bf16", "attention": "auto", "checkpointed": True, "train": True}
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


def measured(attention: str, **choices) -> tuple[int, int]:
    """Bytes that two steps take at most on the card, allocated and reserved."""
    gc.collect()
    torch.cuda.empty_cache()
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        with sdpa_kernel(KERNELS[attention]):
            step = make_step(**choices, device="cuda")
            step()
            step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved()
    finally:
        step = None


@cache
def peers(network: str, seconds: float, batch: int) -> dict[str, int]:
    """What is said elsewhere of the same step, in bytes."""
    kind, sizes = NETWORKS[network]
    frames = round(seconds * FRAMES_PER_SECOND)
    with without_values():
        model = kind(4, 8, **sizes)
        found = {"parameters × 4": 16 * sum(p.numel() for p in model.parameters())}
        try:
            from accelerate.utils import calculate_maximum_sizes
            from torchinfo import summary
        except ImportError:
            return found
        found["accelerate, training"] = 4 * calculate_maximum_sizes(model)[0]
        shown = summary(model, (batch, 4, frames, BINS), device="cpu", verbose=0)
        found["torchinfo"] = shown.total_input + shown.total_output_bytes + shown.total_param_bytes
    return found


def row_of(choices: dict, on_card: bool) -> dict:
    """Prediction, peers and measurement of a configuration."""
    prediction = predict_choices(make_step, choices)
    said = peers(choices["network"], choices["seconds"], choices["batch"])
    row = choices | {"predicted": prediction.peak, "predicted_reserved": prediction.reserved}
    row |= {"seconds_to_predict": round(prediction.seconds, 2), "peers": said}
    if on_card and prediction.peak < ROOM * torch.cuda.get_device_properties(0).total_memory:
        row["measured"], row["measured_reserved"] = measured(**choices)
        row["error"] = row["predicted"] / row["measured"] - 1
    return row


def plot(rows: list[dict], path: Path) -> None:
    """Predicted over measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), layout="constrained")
    ax = figure.subplots()
    for network in NETWORKS:
        some = [row for row in rows if row["network"] == network and "measured" in row]
        points = [[row[key] / 2**30 for row in some] for key in ("measured", "predicted")]
        ax.loglog(*points, "o", alpha=0.7, label=network)
    ax.axline((1, 1), slope=1, color="black", linewidth=0.8)
    ax.set(xlabel="measured, GiB allocated", ylabel="predicted, GiB allocated")
    ax.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Predict, measure where there is a card, record, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    on_card = pick_device(parser.parse_args().device).type == "cuda"
    rows = []
    print("| network | s | batch | precision | attention | checkpointed | | predicted | measured |")
    print("|---|---|---|---|---|---|---|---|---|")
    for choices in configurations():
        row = row_of(choices, on_card)
        rows.append(row)
        shown = [str(value) for value in choices.values()]
        result = in_words(row["measured"]) if "measured" in row else "not measured"
        print(f"| {' | '.join(shown)} | {in_words(row['predicted'])} | {result} |", flush=True)
    times = [row["seconds_to_predict"] for row in rows]
    claim = {name: row_of(choices, on_card) for name, choices in eight_gib().items()}
    print("\n| batch of 4, 6 s, 15.4 M | predicted | measured |\n|---|---|---|")
    for name, row in claim.items():
        result = in_words(row["measured"]) if "measured" in row else "not measured"
        print(f"| {name} | {in_words(row['predicted'])} | {result} |")
    result = {
        "rows": rows,
        "eight_gib": claim,
        "seconds_to_predict_median": statistics.median(times),
    }
    if on_card:
        errors = [abs(row["error"]) for row in rows if "error" in row]
        result |= {"median_error": statistics.median(errors), "worst_error": max(errors)}
        plot(rows, RESULTS / "memory_prediction-gpu.png")
        print(f"median error {result['median_error']:.1%}, worst {result['worst_error']:.1%}")
    record("memory_prediction-gpu" if on_card else "memory_prediction", result)
    print(f"predicted in {statistics.median(times):.1f} s (median), {max(times):.1f} s at most")


if __name__ == "__main__":
    main()
