"""How fast are 6 s chunks read? MUSDB18Dataset against musdb's own reading, in one run.

Both read the same random segments of the same 3-minute stereo track (16-bit WAV, noise) from the
page cache, in one process, in turns. Samples are compared, so that both do the same work.

    python benchmarks/dataset.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import musdb
import numpy as np
import soundfile
import torch
from record import record, table

from tfswa_lab import audio
from tfswa_lab.data.musdb import MUSDB18Dataset
from tfswa_lab.performance.timing import seconds_of

MINUTES = 3
SECONDS = 6.0
CHUNKS = 30  # random places
Reader = Callable[[int], Sequence[np.ndarray]]  # place -> samples of each file
MUSDB_ORDER = ("drums", "bass", "other", "vocals")


def make_tree(root: Path) -> None:
    """Write one track of noise; the content does not matter to a PCM reader."""
    folder = root / "train" / "Noise - Three Minutes"
    folder.mkdir(parents=True)
    samples, mixture = MINUTES * 60 * audio.SAMPLE_RATE, 0
    for number, stem in enumerate(audio.STEMS):
        generator = np.random.default_rng(number)
        waveform = generator.integers(-8000, 8000, (samples, 2), dtype=np.int16)
        soundfile.write(folder / f"{stem}.wav", waveform, audio.SAMPLE_RATE)
        mixture = mixture + waveform
    soundfile.write(folder / "mixture.wav", mixture, audio.SAMPLE_RATE)


def compare(ours: Reader, theirs: Reader) -> dict:
    """Time both readers at the same random places, once each, in turns; medians over the places."""
    for index in range(CHUNKS):
        for our_samples, their_samples in zip(ours(index), theirs(index), strict=True):
            np.testing.assert_array_equal(our_samples, their_samples.T)
    readers = ours, theirs
    times = [[seconds_of(partial(f, place)) for f in readers] for place in range(CHUNKS)]
    our_seconds, their_seconds = np.median(times, axis=0)
    return {
        "tfswa_lab_ms": round(1000 * our_seconds, 2),
        "musdb_ms": round(1000 * their_seconds, 1),
        "tfswa_lab_chunks_per_second": round(1 / our_seconds, 1),
        "musdb_chunks_per_second": round(1 / their_seconds, 2),
        "ratio": round(their_seconds / our_seconds, 1),
    }


def measure(root: Path) -> dict[str, dict]:
    """Compare on a whole training item, and on the file of one stem."""
    dataset = MUSDB18Dataset(
        root, target_stems=MUSDB_ORDER, segment_seconds=SECONDS, samples_per_track=CHUNKS
    )
    (track,), (peer,) = dataset.tracks, musdb.DB(root=str(root), is_wav=True)
    starts = [item["start_seconds"] for item in dataset]
    peer.chunk_duration = SECONDS

    def our_item(index: int) -> Sequence[np.ndarray]:
        item = dataset[index]
        return [item["mixture"].numpy(), *item["stems"].numpy()]

    def their_item(index: int) -> Sequence[np.ndarray]:
        peer.chunk_start = starts[index]
        return peer.stems

    def our_file(index: int) -> Sequence[np.ndarray]:
        start = round(starts[index] * track.rate)
        return [track.read(["vocals"], start, dataset.segment, track.rate)["vocals"].numpy()]

    def their_file(index: int) -> Sequence[np.ndarray]:
        peer.chunk_start = starts[index]
        return [peer.sources["vocals"].audio]

    return {
        "mixture + 4 stems": compare(our_item, their_item),
        "one file": compare(our_file, their_file),
    }


def main() -> None:
    """Measure, print a Markdown table, keep the result."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        make_tree(Path(root))
        result = measure(Path(root))
    columns = ["6 s stereo chunk", "tfswa_lab", "musdb"]
    columns += ["chunks/s, ours", "chunks/s, musdb", "ratio"]
    rows = []
    for what, row in result.items():
        milliseconds = f"{row['tfswa_lab_ms']} ms", f"{row['musdb_ms']} ms"
        speeds = row["tfswa_lab_chunks_per_second"], row["musdb_chunks_per_second"]
        rows.append((what, *milliseconds, *speeds, f"{row['ratio']}x"))
    print(table(columns, rows))
    print(record("dataset", "cpu", result))


if __name__ == "__main__":
    main()
