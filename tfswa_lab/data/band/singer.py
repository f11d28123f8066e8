"""The singer: pitch, voicing, level and formants, written down before any sound is made.

Axis letters: `t` control frames, `k` formants.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import minimum_filter1d

from .phonemes import CONSONANTS, VOWELS
from .score import Syllable
from .timeline import RATE, frequency

HOP = 147  # samples per control frame, 300 frames a second
_RAMP_SECONDS = 0.03  # from silence to voice and back
_FORMANTS = 9  # up to 10 kHz, so that the voice is not dull

# MIDI pitch around which each register sings, and its formants against the table's men.
_REGISTERS = ((48, 1.0), (53, 1.04), (60, 1.14), (65, 1.18))


@dataclass(frozen=True)
class Singer:
    """Who sings.

    Args:
        center: MIDI pitch around which the singer sings.
        tract: scale of all formants against the table's; a shorter tract is higher.
        open_quotient: share of a period for which the glottis is open; less is brighter.
        breath: level of the noise in the voice.
        vibrato_hertz: rate of the vibrato.
        vibrato_semitones: its depth, from the middle to the peak.
        glide_seconds: time that the pitch takes from note to note.
    """

    center: int
    tract: float
    open_quotient: float
    breath: float
    vibrato_hertz: float
    vibrato_semitones: float
    glide_seconds: float


@dataclass(frozen=True)
class Control:
    """What the voice does in every control frame.

    Args:
        f0: fundamental frequency `(t,)` in Hz, also where nobody sings.
        voiced: whether the glottis sounds, `(t,)`.
        level: amplitude `(t,)`, 0 outside the voiced frames.
        formants: formant frequencies `(t, k)` in Hz.
    """

    f0: np.ndarray
    voiced: np.ndarray
    level: np.ndarray
    formants: np.ndarray


def draw_singer(rng: np.random.Generator, register: int) -> Singer:
    """A singer of one of four registers, 0 the lowest."""
    center, tract = _REGISTERS[register]
    return Singer(
        center=center + int(rng.integers(-2, 3)),
        tract=tract * rng.uniform(0.95, 1.05),
        open_quotient=rng.uniform(0.5, 0.75),
        breath=rng.uniform(0.003, 0.015),
        vibrato_hertz=rng.uniform(5.0, 6.0),
        vibrato_semitones=rng.uniform(0.25, 0.6),
        glide_seconds=rng.uniform(0.06, 0.12),
    )


def perform(
    rng: np.random.Generator, syllables: list[Syllable], singer: Singer, samples: int
) -> Control:
    """How the singer sings these syllables, from the first sample of the song to its last."""
    time = np.arange(samples // HOP + 1) * HOP / RATE
    f0 = frequency(_pitch(rng, time, syllables, singer))
    voiced, level = _voicing(rng, time, syllables)
    return Control(f0, voiced, level, _formants(time, syllables, singer, f0))


def _smooth(track: np.ndarray, seconds: float) -> np.ndarray:
    """Turn the steps of a track `(t, …)` into S-shaped glides of this length."""
    half = round(seconds / 2 * RATE / HOP)
    window = np.hanning(2 * half + 3)[1:-1]
    edges = [(half, half)] + [(0, 0)] * (track.ndim - 1)
    padded = np.pad(track, edges, mode="edge")
    return np.apply_along_axis(np.convolve, 0, padded, window / window.sum(), mode="valid")


def _pitch(
    rng: np.random.Generator, time: np.ndarray, syllables: list[Syllable], singer: Singer
) -> np.ndarray:
    """MIDI pitch: notes joined by glides, vibrato that sets in on longer notes, a slow drift."""
    starts = np.array([s.vowel_start for s in syllables])
    pitches = np.array([float(s.pitch) for s in syllables])
    # The glide is centred a little before the vowel: singers arrive on the beat.
    note = np.searchsorted(starts[1:] - singer.glide_seconds / 4, time, side="right")
    depth = singer.vibrato_semitones * np.clip((time - starts[note] - 0.12) / 0.25, 0, 1)
    vibrato = _smooth(depth, 0.05) * np.sin(2 * np.pi * singer.vibrato_hertz * time)
    knots = np.arange(0, time[-1] + 0.4, 0.4)
    drift = _smooth(np.interp(time, knots, rng.normal(0, 0.05, len(knots))), 0.2)
    return _smooth(pitches[note], singer.glide_seconds) + vibrato + drift


def _voicing(
    rng: np.random.Generator, time: np.ndarray, syllables: list[Syllable]
) -> tuple[np.ndarray, np.ndarray]:
    """Which frames are voiced, and how loud: full in vowels, less in voiced consonants."""
    level = np.zeros(len(time))
    for s, following in zip(syllables, [*syllables[1:], None], strict=True):
        accent = rng.uniform(0.75, 1.0)
        consonant = (time >= s.start) & (time < s.vowel_start)
        level[consonant] = accent * CONSONANTS[s.consonant].voicing
        vowel = (time >= s.vowel_start) & (time < s.end)
        level[vowel] = accent
        if following is None or following.start > s.end:  # a phrase dies away
            level[vowel] *= np.clip((s.end - time[vowel]) / 0.2, 0.05, 1)
    voiced = level > 0
    # Shrink every stretch before its edges are smoothed, so that no sound leaks out of it.
    shrunk = minimum_filter1d(level, 2 * round(_RAMP_SECONDS / 2 * RATE / HOP) + 1)
    return voiced, _smooth(shrunk, _RAMP_SECONDS)


def _formants(
    time: np.ndarray, syllables: list[Syllable], singer: Singer, f0: np.ndarray
) -> np.ndarray:
    """Formants that glide from consonant to vowel to the next consonant."""
    tracks = np.empty((len(time), _FORMANTS))
    tracks[:, 3:] = 3500 + 1000 * np.arange(_FORMANTS - 3)
    tracks[:, :3] = VOWELS[syllables[0].vowel]
    for s in syllables:
        tracks[time >= s.vowel_start, :3] = VOWELS[s.vowel]
        locus = CONSONANTS[s.consonant].formants
        if locus:
            tracks[(time >= s.start) & (time < s.vowel_start), :3] = locus
    tracks = singer.tract * _smooth(tracks, 0.06)
    # High voices open their mouth until the first formant meets the fundamental.
    tracks[:, 0] = np.maximum(tracks[:, 0], f0)
    return tracks
