"""From five tracks to four integer stems: levels, places in the room, and a sum that is exact.

Axis letters: `s` samples.
"""

from __future__ import annotations

import numpy as np
from scipy.signal import butter, sosfilt

from .space import draw_room, in_room, pan
from .timeline import RATE, samples_of

# RMS level in dB relative to the vocals, and how wet, before each song's own deviation.
_LEVELS_DB = {"vocals": 0.0, "drums": -2.0, "bass": -2.5, "other": -3.0}
_WETNESS = {"vocals": 0.2, "drums": 0.12, "bass": 0.04, "other": 0.2}
_HEADROOM = 0.9


def mix(
    rng: np.random.Generator,
    vocals: np.ndarray,
    drums: np.ndarray,
    bass: np.ndarray,
    guitar: np.ndarray,
    keys: np.ndarray,
) -> dict[str, np.ndarray]:
    """Place, balance and quantise.

    Args:
        rng: draws the room, the positions and the levels.
        vocals: mono `(s,)`, like bass, guitar and keys.
        drums: stereo `(s, 2)`.

    Returns:
        int16 `(s, 2)` per stem. No sum of any of them leaves the range of int16.
    """
    side = rng.choice([-1.0, 1.0])
    tracks = {
        "vocals": pan(vocals, rng.uniform(-0.15, 0.15)),
        "drums": drums,
        "bass": pan(bass, rng.uniform(-0.08, 0.08)),
        "other": pan(_unit(guitar), side * rng.uniform(0.25, 0.7))
        + pan(_unit(keys), -side * rng.uniform(0.25, 0.7)) * rng.uniform(0.7, 1.2),
    }
    room = draw_room(rng)
    loud = {}
    for name, track in tracks.items():
        track = _tidy(in_room(track, room, _WETNESS[name] * rng.uniform(0.7, 1.3)))
        loud[name] = _unit(track) * 10 ** ((_LEVELS_DB[name] + rng.uniform(-1, 1)) / 20)
    # Even if all stems peaked with one sign at once, there would be room for their sum.
    peak = sum(np.abs(track) for track in loud.values()).max()
    gain = _HEADROOM * np.iinfo(np.int16).max / peak
    return {name: np.round(gain * track).astype(np.int16) for name, track in loud.items()}


def _unit(track: np.ndarray) -> np.ndarray:
    return track / np.sqrt(np.square(track).mean())


def _tidy(track: np.ndarray) -> np.ndarray:
    """Take away DC and rumble, and fade out: a song ends in the middle of a bar."""
    track = sosfilt(butter(2, 25, "highpass", fs=RATE, output="sos"), track, axis=0)
    fade = samples_of(0.1)
    track[-fade:] *= 0.5 + 0.5 * np.cos(np.pi * np.arange(1, fade + 1) / fade)[:, None]
    return track
