"""The sound of the voice: glottal pulses through moving formants, and consonants in between.

Source-filter synthesis after Fant, *Acoustic Theory of Speech Production* (1960), and Klatt,
*Software for a cascade/parallel formant synthesizer* (1980).

Axis letters: `s` samples, `t` control frames, `k` formants.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import uniform_filter1d
from scipy.signal import sosfilt

from .noise import band_noise
from .phonemes import CONSONANTS
from .score import Syllable
from .singer import HOP, Control, Singer
from .timeline import RATE, place, samples_of, shape

_TABLE = 4096
_BANDWIDTHS = np.array([60, 80, 120, 160, 200, 250, 300, 350, 400])  # Hz, one per formant


def glottal_pulse(open_quotient: float, harmonics: int) -> np.ndarray:
    """One period of the airflow's derivative, band-limited, of unit power.

    The flow is Rosenberg's pulse C (*Effect of glottal pulse shape on the quality of natural
    vowels*, 1971): a raised cosine while the glottis opens, a quarter of a cosine while it
    closes. Its derivative is what leaves the lips.
    """
    time = np.arange(_TABLE) / _TABLE
    opening = 0.75 * open_quotient
    closing = open_quotient - opening
    rise = 0.5 - 0.5 * np.cos(np.pi * time / opening)
    fall = np.cos(np.pi / 2 * (time - opening) / closing)
    flow = np.where(time < opening, rise, np.where(time < open_quotient, fall, 0.0))
    spectrum = np.fft.rfft(flow) * 2j * np.pi * np.arange(_TABLE // 2 + 1)
    spectrum[harmonics + 1 :] = 0
    pulse = np.fft.irfft(spectrum)
    return pulse / pulse.std()


def _source(rng: np.random.Generator, f0: np.ndarray, singer: Singer) -> np.ndarray:
    """Glottal pulses at exactly f0 `(s,)`, and a little breath."""
    pulse = glottal_pulse(singer.open_quotient, int(20_000 / f0.max()))
    phase = np.cumsum(f0) / RATE % 1
    voice = np.interp(phase, np.arange(_TABLE + 1) / _TABLE, np.append(pulse, pulse[0]))
    return voice + singer.breath * rng.normal(size=len(f0))


def _resonators(formants: np.ndarray) -> np.ndarray:
    """Klatt's two-pole resonators for formants `(t, k)`, as second-order sections `(t, k, 6)`."""
    radius = np.exp(-np.pi * _BANDWIDTHS / RATE)
    sections = np.zeros((*formants.shape, 6))
    sections[..., 3] = 1
    sections[..., 4] = -2 * radius * np.cos(2 * np.pi * formants / RATE)
    sections[..., 5] = radius**2
    sections[..., 0] = sections[..., 3:].sum(axis=-1)  # gain 1 at 0 Hz
    return sections


def _through_tract(source: np.ndarray, formants: np.ndarray) -> np.ndarray:
    """Filter a source `(s,)` through a cascade of formants that moves every frame."""
    sections = _resonators(formants)
    state = np.zeros((formants.shape[1], 2))
    sound = np.empty(len(source))
    for t, start in enumerate(range(0, len(source), HOP)):
        frame = slice(start, start + HOP)
        sound[frame], state = sosfilt(sections[t], source[frame], zi=state)
    return sound


def _level_off(sound: np.ndarray) -> np.ndarray:
    """Give every vowel and pitch the same loudness: divide by the level over 150 ms."""
    power = uniform_filter1d(np.square(sound), samples_of(0.15))
    return sound / np.sqrt(power + 1e-4 * power.max())


def _consonant(rng: np.random.Generator, syllable: Syllable) -> np.ndarray:
    """The noise of a consonant `(s,)`, which ends where the vowel starts."""
    kind = CONSONANTS[syllable.consonant]
    noise = band_noise(rng, kind.band, kind.seconds)
    if not kind.burst:
        return kind.noise * shape(noise, 0.02, 0.02)
    closure = samples_of(kind.seconds - 0.035)
    noise[:closure] = 0
    noise[closure:] *= np.exp(-np.arange(len(noise) - closure) / (0.01 * RATE))
    noise[closure:] = shape(noise[closure:], 0.001, 0.01)
    return kind.noise * noise


def _breath(rng: np.random.Generator) -> np.ndarray:
    """A soft intake of air."""
    return 0.04 * shape(band_noise(rng, (1000, 5000), 0.25), 0.15, 0.08)


def sing(
    rng: np.random.Generator,
    syllables: list[Syllable],
    singer: Singer,
    control: Control,
    samples: int,
) -> np.ndarray:
    """The whole part as a mono track `(s,)`; a vowel has unit power.

    Args:
        rng: for the noise in it.
        syllables: what is sung.
        singer: who sings.
        control: how, from `perform`.
        samples: length of the song.
    """
    frames, time = np.arange(len(control.f0)) * HOP, np.arange(samples)
    source = _source(rng, np.interp(time, frames, control.f0), singer)
    track = _level_off(_through_tract(source, control.formants))
    track *= np.interp(time, frames, control.level)
    end = -1.0
    for s in syllables:
        if CONSONANTS[s.consonant].noise:
            place(track, _consonant(rng, s), s.start)
        if s.start - end > 0.45 and s.start > 0.3:
            place(track, _breath(rng), s.start - 0.3)
        end = s.end
    return track
