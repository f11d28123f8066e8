"""The drum kit: damped modes for what rings, filtered noise for what hisses.

Axis letters: `s` samples.
"""

from __future__ import annotations

import numpy as np

from .arrangement import CLOSED_HAT, CRASH, KICK, OPEN_HAT, SNARE, TOM
from .noise import band_noise
from .score import Note
from .space import pan
from .timeline import RATE, place, samples_of, shape


def _modes(
    hertz: np.ndarray, levels: np.ndarray, decay_seconds: float, seconds: float
) -> np.ndarray:
    """A sum of exponentially damped sinusoids; higher modes die sooner."""
    time = np.arange(samples_of(seconds)) / RATE
    sound = np.zeros(len(time))
    for frequency, level in zip(hertz, levels, strict=True):
        decay = np.exp(-time / (decay_seconds * np.sqrt(hertz[0] / frequency)))
        sound += level * decay * np.sin(2 * np.pi * frequency * time)
    return sound


def _hiss(
    rng: np.random.Generator, band: tuple[float, float], decay_seconds: float, seconds: float
) -> np.ndarray:
    """Band-passed noise that decays exponentially."""
    noise = band_noise(rng, band, seconds)
    return noise * np.exp(-np.arange(len(noise)) / (decay_seconds * RATE))


def _kick(rng: np.random.Generator) -> np.ndarray:
    """A membrane whose pitch falls within milliseconds, and a beater click."""
    time = np.arange(samples_of(0.35)) / RATE
    base, sweep = rng.uniform(45, 62), rng.uniform(2, 4)
    hertz = base * (1 + sweep * np.exp(-time / rng.uniform(0.012, 0.03)))
    body = np.sin(2 * np.pi * np.cumsum(hertz) / RATE) * np.exp(-time / rng.uniform(0.07, 0.13))
    body[: samples_of(0.05)] += rng.uniform(0.03, 0.12) * _hiss(rng, (800, 5000), 0.004, 0.05)
    return body


def _snare(rng: np.random.Generator) -> np.ndarray:
    """Two membrane modes and the wires."""
    skins = _modes(rng.uniform(165, 235) * np.array([1, 1.6]), np.array([1, 0.6]), 0.06, 0.3)
    wires = _hiss(rng, (rng.uniform(900, 2000), rng.uniform(7000, 12000)), 0.06, 0.3)
    return 0.6 * skins + 0.3 * wires


def _tom(rng: np.random.Generator) -> np.ndarray:
    """A lower membrane that rings longer."""
    hertz = rng.uniform(90, 140) * np.array([1, 1.6, 2.1])
    return _modes(hertz, np.array([1, 0.4, 0.2]), 0.12, 0.4)


def _metal(rng: np.random.Generator, low: float, decay_seconds: float) -> np.ndarray:
    """A cymbal: a dozen inharmonic modes under noise."""
    hertz = np.sort(rng.uniform(low, 11_000, 12))
    ring = _modes(hertz, rng.uniform(0.2, 1.0, 12), decay_seconds, 6 * decay_seconds)
    hiss = _hiss(rng, (low, 15_000), decay_seconds, 6 * decay_seconds)
    return 0.5 * ring / np.abs(ring).max() + 0.2 * hiss


def draw_kit(rng: np.random.Generator) -> dict[int, tuple[np.ndarray, float]]:
    """Sound `(s,)` and position (−1 left … 1 right) of every piece of one song's kit."""
    side = rng.choice([-1.0, 1.0])
    hat = side * rng.uniform(0.3, 0.7)
    kit = {
        KICK: (_kick(rng), 0.0),
        SNARE: (_snare(rng), rng.uniform(-0.1, 0.1)),
        TOM: (_tom(rng), -side * rng.uniform(0.2, 0.5)),
        CLOSED_HAT: (0.35 * _metal(rng, rng.uniform(4500, 7000), 0.025), hat),
        OPEN_HAT: (0.35 * _metal(rng, rng.uniform(4500, 7000), 0.09), hat),
        CRASH: (0.35 * _metal(rng, rng.uniform(2500, 4500), 0.35), -side * rng.uniform(0.3, 0.6)),
    }
    return {piece: (shape(sound, 0.0005, 0.02), place) for piece, (sound, place) in kit.items()}


def render(rng: np.random.Generator, notes: list[Note], samples: int) -> np.ndarray:
    """The whole part as a stereo track `(s, 2)`."""
    kit = draw_kit(rng)
    track = np.zeros((samples, 2))
    for note in notes:
        sound, position = kit[note.pitch]
        place(track, note.velocity * pan(sound, position), note.start)
    # Tape-like saturation: without it the peaks of the kit would set the level of the song.
    return np.tanh(1.5 * track) / 1.5
