"""Where the sound stands: panning, and a small room that is different at each ear.

Axis letters: `s` samples.
"""

from __future__ import annotations

import numpy as np
from scipy.signal import butter, oaconvolve, sosfilt

from .timeline import RATE, samples_of


def pan(sound: np.ndarray, position: float) -> np.ndarray:
    """A mono sound `(s,)` between left (−1) and right (1) at constant power, as `(s, 2)`.

    >>> pan(np.ones(1), 0.0).round(3)
    array([[0.707, 0.707]])
    """
    angle = (position + 1) * np.pi / 4
    return sound[:, None] * np.array([np.cos(angle), np.sin(angle)])


def draw_room(rng: np.random.Generator) -> np.ndarray:
    """An impulse response `(s, 2)` of unit energy per ear: decaying noise after a short delay."""
    delay, t60 = samples_of(rng.uniform(0.004, 0.015)), rng.uniform(0.15, 0.4)
    tail = np.arange(samples_of(t60)) / samples_of(t60)
    noise = rng.normal(size=(len(tail), 2)) * 10 ** (-3 * tail)[:, None]
    # Walls swallow the highest frequencies; no room of this size carries the lowest.
    band = butter(1, (200, rng.uniform(4000, 8000)), "bandpass", fs=RATE, output="sos")
    response = np.concatenate([np.zeros((delay, 2)), sosfilt(band, noise, axis=0)])
    return response / np.sqrt(np.square(response).sum(axis=0))


def in_room(stereo: np.ndarray, room: np.ndarray, wet: float) -> np.ndarray:
    """Add the room's answer to a dry stereo sound `(s, 2)`, at `wet` times its level."""
    mono = stereo.mean(axis=1, keepdims=True)
    return stereo + wet * oaconvolve(mono, room, axes=0)[: len(stereo)]
