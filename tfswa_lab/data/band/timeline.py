"""The time axis of a song: its sample rate, its tuning, and how a sound is laid onto it.

Axis letters: `s` samples.
"""

from __future__ import annotations

import numpy as np

RATE = 44_100


def samples_of(seconds: float) -> int:
    """The sample nearest to a time in seconds.

    >>> samples_of(0.5)
    22050
    """
    return round(seconds * RATE)


def frequency(pitch: float | np.ndarray) -> float | np.ndarray:
    """MIDI pitch in Hz; the whole band tunes to A4 = 440 Hz.

    >>> frequency(69)
    440.0
    """
    return 440.0 * 2 ** ((pitch - 69) / 12)


def shape(sound: np.ndarray, attack_seconds: float, release_seconds: float) -> np.ndarray:
    """Fade a sound `(s,)` in and out with raised cosines, so that neither end clicks."""
    attack = min(samples_of(attack_seconds), len(sound) // 2)
    release = min(samples_of(release_seconds), len(sound) // 2)
    shaped = sound.copy()
    shaped[:attack] *= 0.5 - 0.5 * np.cos(np.pi * np.arange(attack) / attack)
    shaped[len(sound) - release :] *= 0.5 + 0.5 * np.cos(
        np.pi * np.arange(1, release + 1) / release
    )
    return shaped


def place(track: np.ndarray, sound: np.ndarray, start_seconds: float) -> None:
    """Add a sound `(s,)` or `(s, 2)` to a track in place; what passes the end is cut off."""
    start = samples_of(start_seconds)
    room = max(len(track) - start, 0)
    track[start : start + len(sound)] += sound[:room]
