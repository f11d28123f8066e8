"""Does ten minutes of training on two CPU cores separate a voice, and where do the minutes go?

    python benchmarks/training.py [--device cuda]

First the tiny preset is trained on the band's training songs, as `tfswa-lab train` does it, and
scored on its test songs: SDR of whole songs, between the mixture taken for the voice (the floor)
and the ideal ratio mask (the ceiling). Then a few steps of each preset are timed part by part, at
each precision, with and without checkpointing, in a process each, for its peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import torch
from record import record
from torch import Tensor

from tfswa_lab.device import pick_device
from tfswa_lab.evaluation.separate import separate_track
from tfswa_lab.models.separator import Separator
from tfswa_lab.training.presets import PRESETS, TINY, Preset
from tfswa_lab.training.run import build_trainer, songs_of

GPU = True
STEPS = 4  # timed, after one that is not


def sdr(target: Tensor, estimate: Tensor) -> float:
    """One ratio for a whole song, in dB."""
    return (10 * (target.square().sum() / (target - estimate).square().sum()).log10()).item()


def best_gain(target: Tensor, mixture: Tensor) -> Tensor:
    """The mixture at the one level that fits the target best: what no mask at all can do."""
    return (target * mixture).sum() / mixture.square().sum() * mixture


def ideal_ratio_mask(separator: Separator, stems: Tensor) -> Tensor:
    """The first stem, cut out of the mixture by its true share of the magnitudes."""
    spectrograms = separator.stft(stems)
    share = spectrograms[0].abs() / spectrograms.abs().sum(0).clamp(min=1e-9)
    return separator.stft.istft(share * spectrograms.sum(0), stems.shape[-1])


def score_voice(separator: Separator, preset: Preset) -> dict[str, float]:
    """Mean SDR of the voice over the whole test songs: floor, gain, estimate and ceiling."""
    songs = songs_of(replace(preset, segment_seconds=None), "test")
    segment = round(preset.segment_seconds * preset.sample_rate)
    scores = defaultdict(list)
    for song in songs:
        mixture, stems = song["mixture"], song["stems"]
        estimate = separate_track(separator, mixture, segment)[0].cpu()
        scores["floor: the mixture"].append(sdr(stems[0], mixture))
        scores["the mixture, one gain"].append(sdr(stems[0], best_gain(stems[0], mixture)))
        scores["tiny preset"].append(sdr(stems[0], estimate))
        scores["ceiling: ideal ratio mask"].append(
            sdr(stems[0], ideal_ratio_mask(separator, stems))
        )
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


def now(device: torch.device) -> float:
    """The time in seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(call: Callable, spent: dict[str, float], name: str, device: torch.device) -> Callable:
    """The same function, its seconds added to `spent[name]`."""

    def measured(*args, **kwargs):
        began = now(device)
        result = call(*args, **kwargs)
        spent[name] += now(device) - began
        return result

    return measured


def throughput(preset: Preset) -> dict:
    """Seconds of audio per second, the share of each part, and peak memory, of some steps."""
    trainer = build_trainer(replace(preset, max_steps=STEPS + 1), None)
    device, spent = trainer.fabric.device, defaultdict(float)
    batches = iter(trainer.loader.epoch(0, 0))
    trainer.train_step(next(batches))
    trainer.model.forward = timed(trainer.model.forward, spent, "forward", device)
    trainer.loss.forward = timed(trainer.loss.forward, spent, "loss", device)
    trainer.fabric.backward = timed(trainer.fabric.backward, spent, "backward", device)
    trainer.optimizer.step = timed(trainer.optimizer.step, spent, "optimizer", device)
    fetch = timed(next, spent, "data", device)
    began = now(device)
    for _ in range(STEPS):
        trainer.train_step(fetch(batches))
    seconds = now(device) - began
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    audio = STEPS * preset.batch_size * preset.segment_seconds
    return {
        "audio_seconds_per_second": round(audio / seconds, 3),
        "peak_gib": round(peak / 2**30, 2),
        "share": {name: round(part / seconds, 3) for name, part in spent.items()},
    }


def configurations(device: str) -> dict[str, dict]:
    """What is measured: preset, precision, checkpointing."""
    precisions = ["32-true", "bf16-mixed"] + ["16-mixed"] * (device == "cuda")
    return {
        f"{name}, {precision}{', checkpointed' * checkpointed}": {
            "preset": name,
            "precision": precision,
            "activation_checkpointing": checkpointed,
            "num_workers": 2,
            "device": device,
            "samples_per_track": 8,
            **({} if name == "tiny" else {"batch_size": 2, "segment_seconds": 3.0}),
        }
        for name in ("tiny", "small")
        for precision in precisions
        for checkpointed in (False, True)
    }


def measure(changes: dict) -> dict:
    """Run `throughput` in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps(changes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, record, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        name = asked.one.pop("preset")
        return print(json.dumps(throughput(replace(PRESETS[name], **asked.one))))
    device = pick_device(asked.device).type
    speeds = {name: measure(each) for name, each in configurations(device).items()}
    tiny = train_tiny(device)
    record(
        "training" if device == "cpu" else "training-gpu",
        {"tiny": tiny, "throughput": speeds, "threads": torch.get_num_threads()},
    )
    print(f"tiny preset on the band, {tiny['minutes']} min\n\n| vocals | SDR in dB |\n|---|---|")
    for name, db in tiny["vocals_sdr_db"].items():
        print(f"| {name} | {db} |")
    print("\n| run | audio s/s | peak GiB | shares |\n|---|---|---|---|")
    for name, row in speeds.items():
        shares = ", ".join(f"{part} {share:.0%}" for part, share in row["share"].items())
        print(f"| {name} | {row['audio_seconds_per_second']} | {row['peak_gib']} | {shares} |")


if __name__ == "__main__":
    main()
