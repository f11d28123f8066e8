"""On a GPU: what lean training gains, and whether the finder finds the true maximum.

    python benchmarks/lean.py --device cuda    started by gpu.py

The training step is that of the published 15.4 M TFSWA-UNet, 4 segments of 6 s a step; what the
variants change is in their names; all have 4 heads, so that heads have 8 channels or more. The
finder is given a GPU of a few GiB; its answer is compared with the sizes near it, each tried by
three steps.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from dataclasses import replace
from functools import partial

import torch
from events import REHEARSAL, attempt
from subprocess_benchmark import peak_gib
from torch import nn

from tfswa_lab.memory import gauges, out_of_memory
from tfswa_lab.models.tfswa_unet import SIZES, TFSWAUNet
from tfswa_lab.performance.batch_size import find_batch_size
from tfswa_lab.performance.timing import real_time_factor, seconds_of
from tfswa_lab.training.presets import DEFAULT, TINY
from tfswa_lab.training.run import build_trainer

ITEMS = 4
STEPS = 1 if REHEARSAL else 4
LIMIT_GIB = 4  # of the finder's GPU
VARIANTS = {
    "float32": {},
    "float32, checkpointed": {"activation_checkpointing": True},
    "bfloat16, checkpointed": {"activation_checkpointing": True, "precision": "bf16-mixed"},
}
VARIANTS |= {
    f"bfloat16, checkpointed, {parts} parts": VARIANTS["bfloat16, checkpointed"]
    | {"accumulate": parts}
    for parts in (2, 4)
}


def training_step(changes: dict) -> dict:
    """Seconds of a step, audio per second, and peak memory."""
    preset = replace(TINY if REHEARSAL else DEFAULT, device="cuda", num_workers=0, num_heads=4)
    segment_seconds = 0.2 if REHEARSAL else 6.0
    preset = replace(preset, max_epochs=None, max_steps=100, segment_seconds=segment_seconds)
    preset = replace(preset, batch_size=ITEMS // changes.get("accumulate", 1), **changes)
    trainer = build_trainer(preset, None)
    epoch = trainer.loader.epoch(0, 0)
    batches = [next(epoch) for _ in range(preset.accumulate)]
    step = partial(trainer.learner.step, batches)
    torch.backends.cuda.matmul.allow_tf32 = preset.precision != "32-true"
    step()
    gauges.reset_peak()
    seconds = statistics.median(seconds_of(step) for _ in range(STEPS))
    return {
        "seconds_per_step": round(seconds, 4),
        "audio_seconds_per_second": round(real_time_factor(seconds, segment_seconds, ITEMS), 2),
        "peak_gib": peak_gib("cuda"),
    }


def finder() -> dict:
    """The finder's answer and the true maximum, on a GPU of a few GiB."""
    if not REHEARSAL:
        total = gauges.device_memory().total
        torch.cuda.set_per_process_memory_fraction(LIMIT_GIB * 2**30 / total)
    network = TFSWAUNet(2, 2, **SIZES["tiny"]).cuda()
    optimizer = torch.optim.AdamW(network.parameters())

    def step(size: int) -> None:
        optimizer.zero_grad()
        plane = torch.randn(size, 2, *((8, 8) if REHEARSAL else (128, 256)), device="cuda")
        nn.functional.mse_loss(network(plane), plane).backward()
        optimizer.step()

    most = 3 if REHEARSAL else 512
    found = find_batch_size(step, state=(network, optimizer), maximum=most)
    true = max(size for size in range(1, most + 1) if fits(step, size, found.largest))
    return {"largest": found.largest, "value": found.value, "knee": found.knee, "true": true}


def fits(step, size: int, near: int) -> bool:
    """Whether three steps run; sizes far from the finder's answer are not worth the time."""
    if abs(size - near) > 16:
        return size < near
    return out_of_memory.attempt(lambda: [step(size) for _ in range(3)])[1] is None


def main() -> None:
    """A line for each variant and one for the finder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda"], required=True)
    parser.parse_args()
    variants = [*VARIANTS.items()][-1:] if REHEARSAL else VARIANTS.items()
    for name, changes in variants:
        attempt("lean", partial(training_step, changes), run=name)
        gc.collect()
        torch.cuda.empty_cache()
    attempt("lean", finder, run=f"finder, {LIMIT_GIB} GiB")


if __name__ == "__main__":
    main()
