"""Does ten minutes of training on two CPU cores separate a voice, and where do the minutes go?

    python benchmarks/training.py [--device cuda]

First the tiny preset is trained on the band's training songs, as `tfswa-lab train` does it, and
scored on its test songs: SDR of whole songs, between the mixture taken for the voice (the floor)
and the ideal ratio mask (the ceiling). Then some steps of each preset are timed part by part, at
each precision, with and without checkpointing: first undisturbed, for the throughput, then part by
part. "data" is the wait for the workers; "other" is augmentation, the copy to the GPU, clipping and
averaging. On the CPU, each is a process of its own, for its peak memory; on a GPU, started by
gpu.py, only these steps are measured.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from events import REHEARSAL, attempt
from record import record, table
from subprocess_benchmark import peak_gib, run, start
from torch import Tensor

from tfswa_lab.device import pick_device
from tfswa_lab.evaluation.ratios import usdr
from tfswa_lab.inference.separate import Segmentation, separate_track
from tfswa_lab.memory import gauges
from tfswa_lab.models.separator import Separator
from tfswa_lab.performance.timing import now
from tfswa_lab.training.presets import PRESETS, Preset
from tfswa_lab.training.run import build_trainer, songs_of
from tfswa_lab.training.trainer import Trainer

TINY = PRESETS["tiny"]
WARM_UP = 6  # steps that empty what the two workers read ahead while torch set itself up
STEPS = 24  # timed, on the CPU
GPU_STEPS = 2 if REHEARSAL else 8  # on a GPU, after half as many


def best_gain(target: Tensor, mixture: Tensor) -> Tensor:
    """The mixture at the level that fits the target best: a separator without a mask."""
    return (target * mixture).sum() / mixture.square().sum() * mixture


def ideal_ratio_mask(separator: Separator, stems: Tensor) -> Tensor:
    """The first stem, cut out of the mixture by its true share of the magnitudes."""
    spectrograms = separator.stft(stems)
    share = spectrograms[0].abs() / spectrograms.abs().sum(0).clamp(min=1e-9)
    return separator.stft.istft(share * spectrograms.sum(0), stems.shape[-1])


def score_voice(separator: Separator, preset: Preset) -> dict[str, float]:
    """Mean SDR of the voice over the whole test songs: floor, gain, estimate and ceiling."""
    songs = songs_of(replace(preset, segment_seconds=None), "test")
    segmentation = Segmentation(preset.segment_seconds)
    scores = defaultdict(list)
    for song in songs:
        mixture, stems = song["mixture"], song["stems"]
        estimate = separate_track(separator, mixture, segmentation)[0].cpu()
        for name, voice in {
            "floor: the mixture": mixture,
            "the mixture, one gain": best_gain(stems[0], mixture),
            "tiny preset": estimate,
            "ceiling: ideal ratio mask": ideal_ratio_mask(separator, stems),
        }.items():
            scores[name].append(usdr(stems[:1], voice[None]).item())
    return {name: round(sum(values) / len(values), 2) for name, values in scores.items()}


def train_tiny(device: str) -> dict:
    """Train the tiny preset on the band and score it."""
    torch.manual_seed(TINY.seed)
    trainer = build_trainer(replace(TINY, device=device), None, progress=True)
    started = time.perf_counter()
    trainer.fit()
    minutes = (time.perf_counter() - started) / 60
    return {
        "minutes": round(minutes, 2),
        "steps": trainer.step,
        "parameters": sum(p.numel() for p in trainer.separator.parameters()),
        "vocals_sdr_db": score_voice(trainer.ema.module, TINY),
    }


def timed(call: Callable, spent: dict[str, float], name: str) -> Callable:
    """The same function, its seconds added to `spent[name]`."""

    def measured(*args, **kwargs):
        began = now()
        result = call(*args, **kwargs)
        spent[name] += now() - began
        return result

    return measured


def throughput(preset: str, steps: int = STEPS, warm_up: int = WARM_UP, **changes) -> dict:
    """Seconds of audio per second, the share of each part, and peak memory, of some steps."""
    preset = replace(PRESETS[preset], **changes)
    ends = replace(preset, max_epochs=None, max_steps=warm_up + 2 * steps)
    trainer = build_trainer(ends, None)
    device, batches = trainer.fabric.device, iter(trainer.loader.epoch(0, 0))
    spent_of_step(trainer, lambda: next(batches), warm_up)
    if device.type == "cuda":
        gauges.reset_peak()
    undisturbed = spent_of_step(trainer, lambda: next(batches), steps)
    peak = peak_gib(device.type)
    spent = watched(trainer)
    fetch = timed(next, spent, "data")
    watched_seconds = spent_of_step(trainer, lambda: fetch(batches), steps) * steps
    shares = {name: round(part / watched_seconds, 4) for name, part in spent.items()}
    return {
        "audio_seconds_per_second": round(
            preset.batch_size * preset.segment_seconds / undisturbed, 3
        ),
        "seconds_per_step": round(undisturbed, 4),
        "batch_size": preset.batch_size,
        "segment_seconds": preset.segment_seconds,
        "peak_gib": peak,
        "share": shares | {"other": round(1 - sum(shares.values()), 4)},
    }


def spent_of_step(trainer: Trainer, fetch: Callable[[], dict], steps: int) -> float:
    """Mean seconds of some steps."""
    began = now()
    for _ in range(steps):
        trainer.learner.step([fetch()])
    return (now() - began) / steps


def watched(trainer: Trainer) -> dict[str, float]:
    """Where the seconds of the parts of a step are added up from now on."""
    spent = defaultdict(float)
    for owner, method, name in (
        (trainer.separator, "forward", "forward"),
        (trainer.learner.loss, "forward", "loss"),
        (trainer.fabric, "backward", "backward"),
        (trainer.learner.optimizer, "step", "optimizer"),
    ):
        setattr(owner, method, timed(getattr(owner, method), spent, name))
    return spent


def configurations(device: str) -> dict[str, dict]:
    """All runs: preset, precision, checkpointing."""
    precisions = ["32-true", "bf16-mixed"] + ["16-mixed"] * (device == "cuda")
    # A CPU needs minutes for a step of `small` as it is meant.
    smaller = {} if device == "cuda" else {"batch_size": 1, "segment_seconds": 1.5}
    sizes = {"tiny": {}, "small": smaller}
    if device == "cuda":
        sizes["default"] = {"batch_size": 1}  # of each of several GPUs
    return {
        f"{name}, {precision}{', checkpointed' * checkpointed}": {
            "preset": name,
            "precision": precision,
            "activation_checkpointing": checkpointed,
            "num_workers": 8 if device == "cuda" and not REHEARSAL else 2,
            "device": device,
            "samples_per_track": 32,  # the steps must fit into one epoch
            **sizes[name],
        }
        for name in sizes
        for precision in precisions
        for checkpointed in (False, True)
    }


def on_gpu() -> None:
    """A line for each configuration; those that need the most memory come last."""
    jobs = configurations("cuda")
    if REHEARSAL:  # the first runs, which fit into a small GPU, with short segments
        little = {"batch_size": 2, "segment_seconds": 1.0}
        jobs = {name: job | little for name, job in [*jobs.items()][:2]}
    for name, job in jobs.items():
        job |= {"steps": GPU_STEPS, "warm_up": GPU_STEPS // 2}
        attempt("training", partial(throughput, **job), run=name)
        gc.collect()  # the functions that watch a trainer refer to it in a circle
        torch.cuda.empty_cache()


def main() -> None:
    """Measure, record, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    device = pick_device(parser.parse_args().device).type
    if device == "cuda":
        return on_gpu()
    tiny = train_tiny(device)
    jobs = configurations(device)
    speeds = {name: run(__file__, **job) for name, job in jobs.items()}
    threads = torch.get_num_threads()
    record("training", device, {"tiny": tiny, "throughput": speeds, "threads": threads})
    print(f"tiny preset on the band, {tiny['minutes']} min\n")
    print(table(["vocals", "SDR in dB"], tiny["vocals_sdr_db"].items()))
    rows = []
    for name, row in speeds.items():
        shares = ", ".join(f"{part} {share:.0%}" for part, share in row["share"].items())
        rows.append((name, row["audio_seconds_per_second"], row["peak_gib"], shares))
    print("\n" + table(["run", "audio s/s", "peak GiB", "shares"], rows))


if __name__ == "__main__":
    start(main, throughput)
