"""Which resampler keeps what it should keep, removes what it should remove, and at what price?

    python benchmarks/resamplers.py

Tones of half of full scale in float32, as songs are; a tenth of a second at either end of two
seconds does not count. Above the limit, a tone goes one way and should vanish. Below it, a tone
goes there and back and should come back as it was. The price is the time of the processor, on one
thread, for a stereo song of three minutes; all take turns, after a first round that warms up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import librosa
import numpy as np
import soxr
import torch
import torchaudio
from record import record, table

from tfswa_lab import audio

SONG_SECONDS, ROUNDS = 180, 3
ABOVE = 1.1  # of the limit: half of the lower rate
BELOW = (2 / 3, 0.9)
ONE_WAY = ((96_000, 44_100), (44_100, 16_000))
BACK = ((48_000, 44_100), (44_100, 16_000))  # and back
JOBS = {
    "48 → 44.1 → 48": (48_000, 44_100, 48_000),
    "96 → 44.1": (96_000, 44_100),
    "44.1 → 16": (44_100, 16_000),
}
# What resampy calls kaiser_best, in torchaudio's terms (its tutorial "Audio Resampling").
KAISER_BEST = {
    "resampling_method": "sinc_interp_kaiser",
    "lowpass_filter_width": 64,
    "rolloff": 0.9475937167399596,
    "beta": 14.769656459379492,
}
Resampler = Callable[[np.ndarray, int, int], np.ndarray]  # (s,) or (c, s), old rate, new rate


def of_torch(resample: Callable, **how) -> Resampler:
    """A resampler of tensors, for arrays."""

    def resampler(samples: np.ndarray, old: int, new: int) -> np.ndarray:
        return resample(torch.from_numpy(samples), old, new, **how).numpy()

    return resampler


def of_soxr(quality: str) -> Resampler:
    """soxr, which takes samples first."""

    def resampler(samples: np.ndarray, old: int, new: int) -> np.ndarray:
        return soxr.resample(samples.T, old, new, quality).T

    return resampler


def by_librosa(samples: np.ndarray, old: int, new: int) -> np.ndarray:
    """Its default, which is soxr's HQ."""
    return librosa.resample(samples, orig_sr=old, target_sr=new)


RESAMPLERS = {
    "tfswa_lab": of_torch(audio.resample),
    "torchaudio, default": of_torch(torchaudio.functional.resample),
    "torchaudio, kaiser-best": of_torch(torchaudio.functional.resample, **KAISER_BEST),
    "soxr HQ": of_soxr("HQ"),
    "soxr VHQ": of_soxr("VHQ"),
    "librosa, default": by_librosa,
}


def tone(hz: float, rate: int) -> np.ndarray:
    """Two seconds of it."""
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(2 * rate) / rate)).astype(np.float32)


def inner(samples: np.ndarray, rate: int) -> np.ndarray:
    """Without a tenth of a second at either end, in float64."""
    return samples[rate // 10 : 2 * rate - rate // 10].astype(np.float64)


def decibels(signal: np.ndarray, noise: np.ndarray) -> float:
    """The ratio of their powers."""
    return round(10 * float(np.log10(np.mean(signal**2) / np.mean(noise**2))), 3)


def comes_through_db(resampler: Resampler, old: int, new: int, share: float) -> float:
    """Level of a tone at a share of the limit, after over before, one way."""
    before = tone(share * min(old, new) / 2, old)
    return decibels(inner(resampler(before, old, new), new), inner(before, old))


def there_and_back_db(resampler: Resampler, old: int, new: int, share: float) -> float:
    """SNR of such a tone after it went to the other rate and back."""
    before = tone(share * min(old, new) / 2, old)
    after = resampler(resampler(before, old, new), new, old)
    signal = inner(before, old)
    return decibels(signal, inner(after, old) - signal)


def quality(resampler: Resampler) -> dict:
    """Stop band and pass band in dB, by rates in Hz."""
    return {
        "comes_through_above": {
            f"{old} {new}": comes_through_db(resampler, old, new, ABOVE) for old, new in ONE_WAY
        },
        "level_below": {
            f"{old} {new}": [comes_through_db(resampler, old, new, share) for share in BELOW]
            for old, new in BACK
        },
        "snr_there_and_back": {
            f"{old} {new}": [there_and_back_db(resampler, old, new, share) for share in BELOW]
            for old, new in BACK
        },
    }


def cpu_seconds(resampler: Resampler, song: np.ndarray, rates: tuple[int, ...]) -> float:
    """Seconds of the processor for a song that goes through some rates."""
    began = time.process_time()
    for old, new in pairwise(rates):
        song = resampler(song, old, new)
    return time.process_time() - began


def prices() -> dict[str, dict[str, float]]:
    """Median seconds of each job, by resampler."""
    found = {name: {} for name in RESAMPLERS}
    for job, rates in JOBS.items():
        noise = np.random.default_rng(0).standard_normal((2, SONG_SECONDS * rates[0]))
        song, times = (0.1 * noise).astype(np.float32), {name: [] for name in RESAMPLERS}
        for _ in range(1 + ROUNDS):
            for name, resampler in RESAMPLERS.items():
                times[name].append(cpu_seconds(resampler, song, rates))
        for name, seconds in times.items():
            found[name][job] = round(statistics.median(seconds[1:]), 2)
    return found


def row(name: str, result: dict) -> list[str]:
    """A line of the table."""
    above = [f"{db:.0f}" for db in result["comes_through_above"].values()]
    snr = [f"{db:.0f}" for db in result["snr_there_and_back"]["48000 44100"]]
    level = f"{result['level_below']['48000 44100'][1]:.3f}"
    return [name, *above, *snr, level, *(f"{x:.2f}" for x in result["cpu_seconds"].values())]


def main() -> None:
    """Measure, record, print."""
    torch.set_num_threads(1)
    seconds = prices()
    results = {
        name: quality(resampler) | {"cpu_seconds": seconds[name]}
        for name, resampler in RESAMPLERS.items()
    }
    facts = {"above": ABOVE, "below": BELOW, "song_seconds": SONG_SECONDS}
    versions = {package.__name__: package.__version__ for package in (torchaudio, soxr, librosa)}
    record("resamplers", "cpu", {"resamplers": results, "versions": versions, **facts})
    columns = ["resampler", "1.1, 96 → 44.1", "1.1, 44.1 → 16", "SNR at 2/3", "SNR at 0.9"]
    columns += ["level at 0.9", *(f"s, {job}" for job in JOBS)]
    print(table(columns, [row(name, result) for name, result in results.items()]))


if __name__ == "__main__":
    main()
