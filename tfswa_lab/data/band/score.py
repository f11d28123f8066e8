"""What the band plays: the events of one song, and the grid and harmony they hang on.

Pitches are MIDI note numbers with A4 = 69 = 440 Hz; times are seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

PITCH_NAMES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
STEPS_PER_BAR = 16

# Scale degrees from 0, one chord a bar. All of their triads are major or minor.
_PROGRESSIONS = {
    "major": ((0, 4, 5, 3), (5, 3, 0, 4), (0, 5, 3, 4), (0, 3, 5, 4), (1, 4, 0, 5), (0, 2, 3, 4)),
    "minor": ((0, 5, 2, 6), (0, 3, 6, 2), (0, 6, 5, 6), (0, 3, 4, 0), (5, 6, 0, 2), (0, 4, 5, 3)),
}


@dataclass(frozen=True)
class Note:
    """One note or drum hit: seconds, MIDI pitch, and velocity in (0, 1]."""

    start: float
    end: float
    pitch: int
    velocity: float = 1.0


@dataclass(frozen=True)
class Syllable:
    """One sung syllable: the consonant from `start`, the vowel on the note from `vowel_start`."""

    start: float
    vowel_start: float
    end: float
    consonant: str
    vowel: str
    pitch: int


@dataclass(frozen=True)
class Chord:
    """A triad that holds from start to end; `label` follows Harte et al. (2005), e.g. `A:min`."""

    start: float
    end: float
    root: int
    quality: str

    @property
    def label(self) -> str:
        """The chord as mir_eval reads it."""
        return f"{PITCH_NAMES[self.root]}:{self.quality}"

    @property
    def pitch_classes(self) -> tuple[int, int, int]:
        """Root, third and fifth, each in 0 … 11."""
        third = 4 if self.quality == "maj" else 3
        return self.root, (self.root + third) % 12, (self.root + 7) % 12

    def tones(self, low: int, high: int) -> list[int]:
        """Every chord tone from MIDI pitch low to high, upwards."""
        return [p for p in range(low, high + 1) if p % 12 in self.pitch_classes]


@dataclass(frozen=True)
class Grid:
    """Sixteenth steps in time: 4/4 from `offset` on, every second sixteenth late by `swing`."""

    tempo: int
    offset: float
    swing: float
    seconds: float

    @property
    def step_seconds(self) -> float:
        """The length of a sixteenth."""
        return 15 / self.tempo

    @property
    def bars(self) -> int:
        """Bars begun before the song ends."""
        return int(np.ceil((self.seconds - self.offset) / (STEPS_PER_BAR * self.step_seconds)))

    def time(self, step: int) -> float:
        """When a sixteenth falls, in seconds; steps count from the first downbeat."""
        return self.offset + (step + self.swing * (step % 2)) * self.step_seconds

    def note(self, step: int, length: int, pitch: int, velocity: float) -> Note:
        """A note that starts on a step and lasts so many, but not beyond the song."""
        end = min(self.time(step + length), self.seconds)
        return Note(self.time(step), end, pitch, velocity)

    def every(self, steps: int) -> list[float]:
        """The time of every so many steps within the song."""
        times = (self.time(step) for step in range(0, self.bars * STEPS_PER_BAR, steps))
        return [time for time in times if time < self.seconds]


@dataclass(frozen=True)
class Harmony:
    """A key and one chord for every bar."""

    tonic: int
    mode: str
    chords: tuple[Chord, ...]

    @property
    def key(self) -> str:
        """The key in words, e.g. `Eb minor`."""
        return f"{PITCH_NAMES[self.tonic]} {self.mode}"

    def scale(self, low: int, high: int) -> list[int]:
        """Every tone of the key from MIDI pitch low to high, upwards."""
        degrees = {(self.tonic + step) % 12 for step in SCALES[self.mode]}
        return [pitch for pitch in range(low, high + 1) if pitch % 12 in degrees]


def draw_grid(rng: np.random.Generator, seconds: float) -> Grid:
    """A tempo of 80–140 beats a minute, a first downbeat and a swing."""
    tempo = int(rng.integers(80, 141))
    return Grid(tempo, rng.uniform(0.05, 0.3), float(rng.choice([0.0, 0.0, 0.2])), seconds)


def draw_harmony(rng: np.random.Generator, grid: Grid) -> Harmony:
    """A key and a progression that is repeated until the song ends."""
    tonic, mode = int(rng.integers(12)), str(rng.choice(list(SCALES)))
    degrees = rng.choice(_PROGRESSIONS[mode])
    starts = [*grid.every(STEPS_PER_BAR), grid.seconds]
    chords = []
    for bar, (start, end) in enumerate(pairwise(starts)):
        root, third = (SCALES[mode][(degrees[bar % 4] + k) % 7] for k in (0, 2))
        quality = "maj" if (third - root) % 12 == 4 else "min"
        chords.append(Chord(start, end, (tonic + root) % 12, quality))
    return Harmony(tonic, mode, tuple(chords))
