"""How much memory does it take to score one song, with its floor and its ceilings?

    python benchmarks/score_memory.py [--seconds 180]

`score_track` on a song of four stereo stems of noise (44.1 kHz, 16 bits), with one thread: each
bound alone, then all three as `tfswa-lab evaluate` scores them, each in a process of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import soundfile
from record import record, table
from subprocess_benchmark import peak_gib, run, start

from tfswa_lab.audio import SAMPLE_RATE, STEMS
from tfswa_lab.data.tracks import FolderTrack
from tfswa_lab.evaluation.estimates import FolderEstimates
from tfswa_lab.evaluation.oracles import BOUNDS
from tfswa_lab.evaluation.scoring import Scoring, score_track

SOURCES = ("mixture", *STEMS)


def write_song(folder: Path, seconds: int) -> None:
    """A song in one-second blocks, so that its maker takes no memory."""
    draw = np.random.default_rng(0)
    files = {
        name: soundfile.SoundFile(folder / f"{name}.wav", "w", SAMPLE_RATE, 2, "PCM_16")
        for name in SOURCES
    }
    for _ in range(seconds):
        stems = draw.integers(-5000, 5000, (len(STEMS), SAMPLE_RATE, 2), dtype=np.int16)
        for name, samples in zip(SOURCES, (stems.sum(0, dtype=np.int16), *stems), strict=True):
            files[name].write(samples)
    for file in files.values():
        file.close()


def measure(song: str, methods: list[str]) -> dict:
    """Peak memory of this process before the song and in all."""
    scoring = Scoring(FolderEstimates(song))  # which it is not asked for
    before = peak_gib()
    score_track(scoring, FolderTrack.open(Path(song), SOURCES), methods)
    return {"before_gib": before, "peak_gib": peak_gib()}


def main() -> None:
    """Measure, record, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=180)
    seconds = parser.parse_args().seconds
    jobs = {name: [name] for name in BOUNDS} | {"all three": list(BOUNDS)}
    with tempfile.TemporaryDirectory() as song:
        write_song(Path(song), seconds)
        rows = {name: run(__file__, 1, song=song, methods=some) for name, some in jobs.items()}
    record("score_memory", "cpu", {"bounds": rows, "seconds": seconds})
    peaks = [
        (name, f"{row['peak_gib']} GiB", f"{row['before_gib']} GiB") for name, row in rows.items()
    ]
    print(table([f"bounds of {seconds} s", "peak", "before the song"], peaks))


if __name__ == "__main__":
    start(main, measure)
