"""Bass and guitar: plucked strings after Karplus & Strong (1983), in tune after Jaffe & Smith.

A string is a delay line of one period that feeds back through a two-tap low-pass (the loss at
high frequencies) and a first-order all-pass (the fraction of a sample that makes it in tune).
Jaffe & Smith, *Extensions of the Karplus-Strong plucked-string algorithm* (1983).

Axis letters: `s` samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.signal import lfilter
from scipy.signal.windows import tukey

from .score import Note
from .timeline import RATE, frequency, place, samples_of, shape


@dataclass(frozen=True)
class Strings:
    """How the strings of one song sound.

    Args:
        tilt_db: how fast the harmonics of the pluck fall, in dB per octave.
        top_hertz: above this they fall by 24 dB per octave more.
        pick: where the string is plucked, as a fraction of its length.
        damping: the delayed tap of the loop's low-pass, 0 … 0.5; more is duller.
        ring_seconds: time in which the fundamental falls by 60 dB.
    """

    tilt_db: float
    top_hertz: float
    pick: float
    damping: float
    ring_seconds: float


def draw_bass(rng: np.random.Generator) -> Strings:
    """A bass between round and twangy."""
    return Strings(
        tilt_db=rng.uniform(-9, -5),
        top_hertz=rng.uniform(600, 2000),
        pick=rng.uniform(0.12, 0.4),
        damping=rng.uniform(0.3, 0.5),
        ring_seconds=rng.uniform(2, 5),
    )


def draw_guitar(rng: np.random.Generator) -> Strings:
    """A guitar between mellow and bright."""
    return Strings(
        tilt_db=rng.uniform(-7, -3),
        top_hertz=rng.uniform(3000, 8000),
        pick=rng.uniform(0.08, 0.3),
        damping=rng.uniform(0.15, 0.5),
        ring_seconds=rng.uniform(1.5, 4),
    )


def loop(hertz: float, strings: Strings) -> tuple[int, np.ndarray, np.ndarray]:
    """What a wave meets on its way along the string and back, for exactly this frequency.

    Returns:
        The delay in whole samples, and numerator and denominator of the filter after it: low-pass,
        losses, and the all-pass that makes the phase delay of the loop one period.
    """
    omega = 2 * np.pi * hertz / RATE
    low_pass = np.array([1 - strings.damping, strings.damping])
    response = low_pass[0] + low_pass[1] * np.exp(-1j * omega)
    remaining = RATE / hertz + np.angle(response) / omega
    delay = int(remaining - 0.3)
    fraction = remaining - delay  # 0.3 … 1.3 samples, where a first-order all-pass is flat
    c = np.sin(omega * (1 - fraction) / 2) / np.sin(omega * (1 + fraction) / 2)
    gain = min(10 ** (-3 / (hertz * strings.ring_seconds)) / abs(response), 0.9999)
    return delay, gain * np.convolve([c, 1.0], low_pass), np.array([1.0, c])


def burst(rng: np.random.Generator, hertz: float, velocity: float, strings: Strings) -> np.ndarray:
    """One period of noise `(s,)` of unit power, with the spectrum of a plucked string.

    A harmonic with a node where the string is plucked is missing, and a softer pluck is duller.
    """
    period = int(RATE / hertz)
    harmonic = np.arange(1, period // 2 + 1)
    tilt = 10 ** ((strings.tilt_db - 3 * (1 - velocity)) * np.log2(harmonic) / 20)
    roll_off = 1 / (1 + (harmonic * hertz / strings.top_hertz) ** 4)
    level = tilt * roll_off * np.abs(np.sin(np.pi * harmonic * strings.pick))
    spectrum = level * np.exp(2j * np.pi * rng.random(len(harmonic)))
    # The string's period is not whole: ends that are not zero would meet with a click. No harmonic
    # 0, and a taper that brings none back, because the string would hold DC for long.
    taper = tukey(period, 0.4)
    noise = np.fft.irfft(np.append(0, spectrum), period) * taper
    noise -= taper * noise.sum() / taper.sum()
    return noise / noise.std()


def pluck(rng: np.random.Generator, note: Note, strings: Strings) -> np.ndarray:
    """One note `(s,)`, faded at both ends."""
    hertz = frequency(note.pitch)
    sound = np.zeros(samples_of(note.end - note.start))
    place(sound, burst(rng, hertz, note.velocity, strings), 0)
    delay, numerator, denominator = loop(hertz, strings)
    state = np.zeros(2)
    for start in range(delay, len(sound), delay):  # the string repeats itself, a little changed
        sent = sound[start - delay : start]
        returned, state = lfilter(numerator, denominator, sent, zi=state)
        sound[start : start + delay] += returned[: len(sound) - start]
    return note.velocity * shape(sound, 0.003, 0.03)


def render(
    rng: np.random.Generator, notes: list[Note], strings: Strings, samples: int
) -> np.ndarray:
    """All notes of one instrument as a mono track `(s,)`."""
    track = np.zeros(samples)
    for note in notes:
        place(track, pluck(rng, note, strings), note.start)
    return track
