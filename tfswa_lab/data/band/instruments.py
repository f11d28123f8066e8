"""The band's instruments: a drum kit, keyboards, and plucked strings for bass and guitar.

Drums are damped modes for what rings and filtered noise for what hisses. Keyboards add harmonics,
each with its own decay. A string (Karplus & Strong, 1983) is a delay line of one period that feeds
back through a two-tap low-pass, the loss at high frequencies, and a first-order all-pass, the
fraction of a sample that puts it in tune (Jaffe & Smith, *Extensions of the Karplus-Strong
plucked-string algorithm*, 1983).

Axis letters: `s` samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.signal import lfilter
from scipy.signal.windows import tukey

from .score import CLOSED_HAT, CRASH, KICK, OPEN_HAT, SNARE, TOM, Note
from .sound import RATE, band_noise, frequency, pan, place, samples_of, shape


def _modes(
    hertz: np.ndarray, levels: np.ndarray, decay_seconds: float, seconds: float
) -> np.ndarray:
    """A sum of exponentially damped sinusoids; higher modes die sooner."""
    time = np.arange(samples_of(seconds)) / RATE
    sound = np.zeros(len(time))
    for mode, level in zip(hertz, levels, strict=True):
        decay = np.exp(-time / (decay_seconds * np.sqrt(hertz[0] / mode)))
        sound += level * decay * np.sin(2 * np.pi * mode * time)
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


def play_drums(rng: np.random.Generator, notes: list[Note], samples: int) -> np.ndarray:
    """The drum part as a stereo track `(s, 2)`."""
    kit = draw_kit(rng)
    track = np.zeros((samples, 2))
    for note in notes:
        sound, position = kit[note.pitch]
        place(track, note.velocity * pan(sound, position), note.start)
    # Tape-like saturation: without it the peaks of the kit would set the level of the song.
    return np.tanh(1.5 * track) / 1.5


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


def play_keys(notes: list[Note], keyboard: Keyboard, samples: int) -> np.ndarray:
    """All notes as a mono track `(s,)`."""
    track = np.zeros(samples)
    for note in notes:
        place(track, strike(note, keyboard), note.start)
    return track


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
    """The delay line and filter of a string that sounds at exactly this frequency.

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
    # The period is no whole number of samples, so ends that are not zero would meet with a click.
    # The taper must add no DC, because the string would hold it for long.
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


def play_strings(
    rng: np.random.Generator, notes: list[Note], strings: Strings, samples: int
) -> np.ndarray:
    """All notes of one instrument as a mono track `(s,)`."""
    track = np.zeros(samples)
    for note in notes:
        place(track, pluck(rng, note, strings), note.start)
    return track
