"""Keyboards by additive synthesis: a sum of harmonics, each with its own decay.

Axis letters: `s` samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .score import Note
from .timeline import RATE, frequency, place, samples_of, shape

_HARMONICS = 12


@dataclass(frozen=True)
class Keyboard:
    """How the keyboard of one song sounds.

    Args:
        levels: amplitude of every harmonic.
        decay_seconds: time constant of the fundamental; harmonic k decays k^0.7 times faster.
        attack_seconds: rise time.
        tremolo_hertz: rate of the amplitude modulation.
        tremolo: its depth, 0 … 1.
    """

    levels: np.ndarray
    decay_seconds: float
    attack_seconds: float
    tremolo_hertz: float
    tremolo: float


def draw_keyboard(rng: np.random.Generator) -> Keyboard:
    """An electric piano, an organ or a soft pad, each with its own spectrum."""
    harmonic = np.arange(1, _HARMONICS + 1)
    uneven = rng.uniform(0.3, 1.0, _HARMONICS)
    uneven[0] = 1.0
    kind = rng.integers(3)
    if kind == 0:
        return Keyboard(uneven * harmonic**-1.6, rng.uniform(0.5, 1.2), 0.004, 5.0, 0.0)
    if kind == 1:
        drawbars = np.where(np.isin(harmonic, (1, 2, 3, 4, 6, 8)), uneven, 0.0)
        return Keyboard(drawbars / harmonic**0.7, 60.0, 0.012, rng.uniform(5.5, 7), 0.15)
    return Keyboard(uneven * harmonic**-1.2, 6.0, rng.uniform(0.04, 0.1), rng.uniform(3, 5), 0.1)


def strike(note: Note, keyboard: Keyboard) -> np.ndarray:
    """One note `(s,)`, faded at both ends."""
    release = 0.06
    time = np.arange(samples_of(note.end - note.start + release)) / RATE
    sound = np.zeros(len(time))
    for k, level in enumerate(keyboard.levels, start=1):
        hertz = k * frequency(note.pitch)
        if level and hertz < 12_000:
            decay = np.exp(-time * k**0.7 / keyboard.decay_seconds)
            # A phase that differs between harmonics keeps the peak of the sum low.
            sound += level * decay * np.sin(2 * np.pi * hertz * time + k * k)
    sound *= 1 - keyboard.tremolo * np.sin(2 * np.pi * keyboard.tremolo_hertz * time) ** 2
    return note.velocity * shape(sound, keyboard.attack_seconds, release)


def render(notes: list[Note], keyboard: Keyboard, samples: int) -> np.ndarray:
    """All notes as a mono track `(s,)`."""
    track = np.zeros(samples)
    for note in notes:
        place(track, strike(note, keyboard), note.start)
    return track
