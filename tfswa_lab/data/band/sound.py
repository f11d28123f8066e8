"""The band's sound: time axis and tuning, noise, places in a room, and the mix of four stems.

Axis letters: `s` samples.
"""

from __future__ import annotations

import numpy as np
from scipy.signal import butter, oaconvolve, sosfilt

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
    """Add a sound `(s,)` or `(s, 2)` to a track in place; the part beyond the end is cut off."""
    start = samples_of(start_seconds)
    room = max(len(track) - start, 0)
    track[start : start + len(sound)] += sound[:room]


def band_noise(rng: np.random.Generator, band: tuple[float, float], seconds: float) -> np.ndarray:
    """Noise `(s,)` of unit power between two frequencies in Hz."""
    white = rng.normal(size=samples_of(seconds))
    noise = sosfilt(butter(2, band, "bandpass", fs=RATE, output="sos"), white)
    return noise / noise.std()


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
    """Add the room's reverberation to a dry stereo sound `(s, 2)`, at `wet` times its level."""
    mono = stereo.mean(axis=1, keepdims=True)
    return stereo + wet * oaconvolve(mono, room, axes=0)[: len(stereo)]


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
    # Room for the sum of all stems, even if all peaked at once with the same sign.
    peak = sum(np.abs(track) for track in loud.values()).max()
    gain = _HEADROOM * np.iinfo(np.int16).max / peak
    return {name: np.round(gain * track).astype(np.int16) for name, track in loud.items()}


def _unit(track: np.ndarray) -> np.ndarray:
    return track / np.sqrt(np.square(track).mean())


def _tidy(track: np.ndarray) -> np.ndarray:
    """Remove DC and rumble, and fade out, because a song ends in the middle of a bar."""
    track = sosfilt(butter(2, 25, "highpass", fs=RATE, output="sos"), track, axis=0)
    fade = samples_of(0.1)
    track[-fade:] *= 0.5 + 0.5 * np.cos(np.pi * np.arange(1, fade + 1) / fade)[:, None]
    return track
