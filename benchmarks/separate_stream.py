"""Does the memory that `separate_file` takes grow with the song, and how fast is it?

    python benchmarks/separate_stream.py [--minutes 1 10 30] [--batch-size 1]

Songs of each length (44.1 kHz, stereo, 16 bits: a chord that comes and goes in noise) are separated
by the shipped weights into 16-bit stems, each in a process of its own, for its peak memory. The
same songs in memory, with `separate_track`, are the peer; both take the same segments.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from record import record, table
from subprocess_benchmark import peak_gib, run, start

from tfswa_lab import audio
from tfswa_lab.inference.files import separate_file
from tfswa_lab.inference.separate import Segmentation, separate_track
from tfswa_lab.models.storage import load_separator
from tfswa_lab.weights import BAND

SEGMENT_SECONDS = 6.0


def write_song(path: Path, minutes: float) -> None:
    """A song in one-second blocks, so that its maker takes no memory either."""
    rng = np.random.default_rng(0)
    t = np.arange(audio.SAMPLE_RATE)[:, None] / audio.SAMPLE_RATE
    chord = sum(np.sin(2 * np.pi * f * t) for f in (110, 220, 277, 330)) * np.exp(-3 * t)
    with soundfile.SoundFile(path, "w", audio.SAMPLE_RATE, 2, "PCM_16") as file:
        for _ in range(round(60 * minutes)):
            file.write(0.1 * chord + 0.02 * rng.standard_normal((audio.SAMPLE_RATE, 2)))


def in_memory(separator, song: Path, out: Path, batch_size: int) -> None:
    """What `separate_file` does, with the whole song at hand."""
    mixture, rate = audio.read(song)
    segmentation = Segmentation(SEGMENT_SECONDS, batch_size=batch_size)
    estimates = separate_track(separator, mixture, segmentation)
    gain = 1 / max(1.0, estimates.abs().max().item())
    for stem, estimate in zip(separator.stems, estimates, strict=True):
        audio.write(out / f"{stem}.wav", gain * estimate, rate)


def separate(song: str, way: str, batch_size: int) -> dict:
    """Seconds and peak memory of this process."""
    song, separator = Path(song), load_separator(BAND)
    with tempfile.TemporaryDirectory(dir=song.parent) as out:
        began = time.perf_counter()
        if way == "streamed":
            segmentation = Segmentation(SEGMENT_SECONDS, batch_size=batch_size)
            separate_file(separator, song, out, segmentation)
        else:
            in_memory(separator, song, Path(out), batch_size)
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_rss_gib": peak_gib()}


def measure(minutes: float, way: str, batch_size: int) -> dict:
    """Run `separate` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        song = Path(folder) / "song.wav"
        write_song(song, minutes)
        result = run(__file__, song=str(song), way=way, batch_size=batch_size)
    return {
        "seconds_per_second": round(result["seconds"] / (60 * minutes), 4),
        "peak_rss_gib": result["peak_rss_gib"],
    }


def main() -> None:
    """Measure, record, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 10, 30])
    parser.add_argument("--batch-size", type=int, default=1)
    asked = parser.parse_args()
    rows = {
        f"{minutes:g} min": {
            way: measure(minutes, way, asked.batch_size) for way in ("streamed", "whole")
        }
        for minutes in asked.minutes
    }
    facts = {"batch_size": asked.batch_size, "threads": torch.get_num_threads()}
    record("separate_stream", "cpu", {"songs": rows, **facts})
    lines = []
    for name, row in rows.items():
        memory = (f"{each['peak_rss_gib']} GiB" for each in row.values())
        speed = (each["seconds_per_second"] for each in row.values())
        lines.append((name, *memory, *speed))
    columns = "song", "RSS, streamed", "RSS, whole", "s per s, streamed", "s per s, whole"
    print(table(columns, lines))


if __name__ == "__main__":
    start(main, separate)
