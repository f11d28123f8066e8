"""Is BSSEval here museval's on real songs too, mono stems and silence included?

    python benchmarks/bsseval_songs.py [ROOT] [--seconds 12]

ROOT is a folder of songs, SPLIT/TRACK/STEM.wav (or .flac): `data_scripts/get_music_delta.py` makes
one. Without ROOT it is `music_delta` in the folder that TFSWA_LAB_AUDIO names. The beginning of
each song is taken; the estimates are those of the ideal ratio mask; stems that are silent there are
left out, because museval refuses them. Where channels of stems repeat one another (a mono stem), no
filters are the only best ones: the notes of the result say so, and ratios agree less closely. Each
song is scored again with its stems in reverse order, which should change nothing.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from record import record, table

from tfswa_lab import audio
from tfswa_lab.evaluation.bsseval import BSSEval, bss_eval
from tfswa_lab.evaluation.oracles import ideal_ratio_mask

RATIOS = ("SDR", "ISR", "SIR", "SAR")
MOVES = {
    "reversed_museval_db": "museval, reversed order",
    "reversed_tfswa_lab_db": "ours, reversed order",
}


def songs(root: Path) -> list[Path]:
    """Folders with all four stems."""
    folders = sorted(root.glob("*/*"))
    return [x for x in folders if all(any(x.glob(f"{stem}.*")) for stem in audio.STEMS)]


def read(song: Path, seconds: float) -> dict[str, torch.Tensor]:
    """The beginning of each stem `(2, s)` that is heard in it."""
    stems = {}
    for stem in audio.STEMS:
        path = min(song.glob(f"{stem}.*"))
        waveform, _ = audio.read(path, 0, round(seconds * audio.SAMPLE_RATE))
        if waveform.sum(0).any():
            stems[stem] = waveform
    return stems


def stacked(result: BSSEval) -> np.ndarray:
    """Ratios in dB `(4, n, m)`."""
    return np.stack(list(result.ratios().values()))


def by_museval(references: torch.Tensor, estimates: torch.Tensor) -> np.ndarray:
    """The same, by the peer."""
    import museval

    last = (x.double().numpy().swapaxes(1, 2) for x in (references, estimates))
    rate = audio.SAMPLE_RATE
    return np.stack(museval.metrics.bss_eval(*last, window=rate, hop=rate)[:4])


def difference(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """The largest of each ratio in dB, over all stems and frames."""
    with np.errstate(invalid="ignore"):  # equal infinities
        distance = np.where(one == other, 0, np.abs(one - other))
    return dict(zip(RATIOS, np.nanmax(distance, (1, 2)).tolist(), strict=True))


def compare(song: Path, seconds: float) -> dict:
    """Differences from museval, why filters may differ, and what the order of stems changes."""
    stems = read(song, seconds)
    references = torch.stack(list(stems.values()))
    pair = references, ideal_ratio_mask(references.sum(0), references)
    turned = [x.flip(0) for x in pair]
    result, theirs = bss_eval(*pair), by_museval(*pair)
    ours = stacked(result)
    return {
        "stems": list(stems),
        "frames": ours.shape[-1],
        "frames_without_ratios": int(np.isnan(ours).any((0, 1)).sum()),
        "same_frames_without_ratios": bool((np.isnan(ours) == np.isnan(theirs)).all()),
        "difference_db": difference(ours, theirs),
        "reversed_tfswa_lab_db": difference(ours, stacked(bss_eval(*turned))[:, ::-1]),
        "reversed_museval_db": difference(theirs, by_museval(*turned)[:, ::-1]),
        "notes": list(result.notes),
    }


def main() -> None:
    """Measure, record, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, nargs="?")
    parser.add_argument("--seconds", type=float, default=12.0)
    asked = parser.parse_args()
    root = asked.root or Path(os.environ.get("TFSWA_LAB_AUDIO", "")) / "music_delta"
    found = songs(root)
    if not found:
        return print(f"no songs in {root}, nothing compared: name ROOT or set TFSWA_LAB_AUDIO")
    audio.ensure_ffmpeg()
    rows = {song.name: compare(song, asked.seconds) for song in found}
    record("bsseval_songs", "cpu", {"songs": rows, "seconds": asked.seconds})
    lines = []
    for name, row in rows.items():
        differences = (f"{db:.0e}" for db in row["difference_db"].values())
        frames = f"{row['frames_without_ratios']} of {row['frames']}"
        frames += "" if row["same_frames_without_ratios"] else ", not museval's"
        moves = (f"{max(row[key].values()):.0e}" for key in MOVES)
        lines.append((name, *differences, frames, "yes" if row["notes"] else "no", *moves))
    columns = ["song", *RATIOS, "frames without ratios", "filters not unique", *MOVES.values()]
    print(table(columns, lines))


if __name__ == "__main__":
    main()
