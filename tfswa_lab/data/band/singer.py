"""The singer: an invented language, a sung line, how it is performed, and the sound of the voice.

Vowel formants: Peterson & Barney, *Control methods used in a study of the vowels* (1952), averages
of the men. Source-filter synthesis after Fant, *Acoustic Theory of Speech Production* (1960), and
Klatt, *Software for a cascade/parallel formant synthesizer* (1980); consonants are simplified from
the latter.

Axis letters: `s` samples, `t` control frames, `k` formants.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import minimum_filter1d, uniform_filter1d
from scipy.signal import sosfilt

from .score import STEPS_PER_BAR, Grid, Harmony, Syllable
from .sound import RATE, band_noise, frequency, place, samples_of, shape

# F1, F2, F3 in Hz.
VOWELS = {
    "ah": (730.0, 1090.0, 2440.0),
    "eh": (530.0, 1840.0, 2480.0),
    "ee": (270.0, 2290.0, 3010.0),
    "oh": (570.0, 840.0, 2410.0),
    "oo": (300.0, 870.0, 2240.0),
}


@dataclass(frozen=True)
class Consonant:
    """How long a consonant lasts, and how much of it is voice and noise.

    Args:
        seconds: from its start to the start of the vowel.
        voicing: level of the voice in it, 0 for a voiceless consonant.
        formants: F1, F2, F3 in Hz that the voice glides from, where it is voiced.
        noise: level of the noise relative to a vowel, 0 for none.
        band: lowest and highest frequency of the noise in Hz.
        burst: the noise is a short decaying burst after a silent closure.
    """

    seconds: float
    voicing: float = 0.0
    formants: tuple[float, float, float] | None = None
    noise: float = 0.0
    band: tuple[float, float] = (0.0, 0.0)
    burst: bool = False


CONSONANTS = {
    "t": Consonant(0.06, noise=0.45, band=(3000, 8000), burst=True),
    "k": Consonant(0.07, noise=0.55, band=(1400, 3500), burst=True),
    "p": Consonant(0.06, noise=0.5, band=(400, 1800), burst=True),
    "s": Consonant(0.10, noise=0.25, band=(4500, 11000)),
    "f": Consonant(0.09, noise=0.16, band=(1500, 9000)),
    "h": Consonant(0.07, noise=0.16, band=(600, 3500)),
    "d": Consonant(0.05, 0.2, (250.0, 1700.0, 2600.0), 0.35, (2500, 7000), burst=True),
    "m": Consonant(0.08, 0.4, (250.0, 1000.0, 2200.0)),
    "n": Consonant(0.07, 0.4, (250.0, 1600.0, 2500.0)),
    "l": Consonant(0.06, 0.5, (350.0, 1100.0, 2700.0)),
}


# Lengths in eighths; a phrase of at most ten of the sixteen eighths in two bars leaves time to
# breathe, and leaves the voice silent in part of every song.
_RHYTHMS = (
    (1, 1, 2, 1, 1, 4),
    (2, 1, 1, 2, 4),
    (1, 1, 1, 1, 2, 4),
    (3, 1, 2, 4),
    (2, 2, 1, 1, 3),
    (1, 2, 1, 2, 3),
    (3, 3, 4),
    (1, 1, 2, 1, 1, 1, 2),
)
_PHRASE_STEPS = 2 * STEPS_PER_BAR


def sung_part(
    rng: np.random.Generator, grid: Grid, harmony: Harmony, center: int
) -> list[Syllable]:
    """Two-bar phrases within a fifth of the singer's centre, with rhythms in the form A A B A."""
    scale = harmony.scale(center - 7, center + 7)
    rhythms = {form: _RHYTHMS[rng.integers(len(_RHYTHMS))] for form in "AB"}
    entries = {form: 2 * int(rng.integers(0, 4)) for form in "AB"}
    degree = len(scale) // 2
    syllables: list[Syllable] = []
    for phrase in range((grid.bars + 1) // 2):
        form = "AABA"[phrase % 4]
        step, notes = phrase * _PHRASE_STEPS + entries[form], []
        for eighths in rhythms[form]:
            degree = _next_degree(rng, scale, degree, step, harmony)
            notes.append((step, 2 * eighths, scale[degree]))
            step += 2 * eighths
        syllables += _syllables(rng, grid, notes)
    return syllables


def _next_degree(
    rng: np.random.Generator, scale: list[int], degree: int, step: int, harmony: Harmony
) -> int:
    """A small step along the scale; notes on the beat go to the nearest chord tone."""
    degree = int(np.clip(degree + rng.choice([-2, -1, -1, 0, 1, 1, 2]), 0, len(scale) - 1))
    if step % 4:
        return degree
    chord = harmony.chords[min(step // STEPS_PER_BAR, len(harmony.chords) - 1)]
    inside = [k for k, pitch in enumerate(scale) if pitch % 12 in chord.pitch_classes]
    return min(inside, key=lambda k: abs(k - degree))


def _syllables(
    rng: np.random.Generator, grid: Grid, notes: list[tuple[int, int, int]]
) -> list[Syllable]:
    """Put a consonant before every note: vowels, not consonants, fall on the beat."""
    notes = [note for note in notes if grid.time(note[0]) < grid.seconds - 0.25]
    syllables: list[Syllable] = []
    for step, length, pitch in notes:
        consonant, vowel = (str(rng.choice(list(sounds))) for sounds in (CONSONANTS, VOWELS))
        start = max(grid.time(step) - CONSONANTS[consonant].seconds, 0.0)
        if syllables:  # notes are joined: the vowel lasts until the next consonant
            syllables[-1] = replace(syllables[-1], end=start)
        # Until another note joins it, it ends early, to breathe, and before the song does.
        end = min(grid.time(step + length) - 0.08, grid.seconds - 0.05)
        syllables.append(Syllable(start, grid.time(step), end, consonant, vowel, pitch))
    return syllables


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
    """How the singer sings these syllables, for every control frame of the song."""
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
    # Shrink every voiced passage before its edges are smoothed, so that no sound leaks out.
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
