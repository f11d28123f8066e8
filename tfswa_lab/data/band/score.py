"""What the band plays: the grid and harmony of a song, and each instrument's part as notes.

Pitches are MIDI note numbers with A4 = 69 = 440 Hz; times are seconds. A bar of a part is written
as sixteen characters, one for each sixteenth: `.` is silence, `-` holds the note before it, and
any other character starts a note whose meaning each part explains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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


# General MIDI percussion numbers.
KICK, SNARE, TOM, CLOSED_HAT, OPEN_HAT, CRASH = 36, 38, 45, 42, 46, 49

# X accent, x normal, o ghost note.
_DRUM_BARS = (
    {KICK: "X.......x.x.....", SNARE: "....X.......X...", CLOSED_HAT: "X.x.X.x.X.x.X.x."},
    {KICK: "X..x..x...x.....", SNARE: "....X..o.o..X...", CLOSED_HAT: "XoxoXoxoXoxoXoxo"},
    {KICK: "X...X...X...X...", SNARE: "....X.......X..o", OPEN_HAT: "..x...x...x...x."},
    {KICK: "X.....x.x.......", SNARE: "........X.......", CLOSED_HAT: "X...x...X...x.x."},
    {KICK: "X..x....X.x.....", SNARE: "....X.......X.o.", CLOSED_HAT: "X.x.X.x.X.x.X..."},
    {KICK: "X.x...x...x..x..", SNARE: "....X..o....X..o", CLOSED_HAT: "x.X.x.X.x.X.x.X."},
)
_FILLS = ({SNARE: "XoxX"}, {TOM: "XxX."}, {SNARE: "X.x.", TOM: ".x.X"}, {SNARE: "..xx"})
_VELOCITY = {"X": 1.0, "x": 0.7, "o": 0.35}

# r root, f fifth, o octave, a approach: one scale step from the next root.
_BASS_BARS = (
    "r-r-r-r-r-r-r-r-",
    "r-----r-f-----r-",
    "r---f---o---f---",
    "r--r--r-..r-o-r-",
    "r-------r---f-a-",
    "r-o-r-o-r-o-f-a-",
)
# x the chord; 0 1 2 … one chord tone from the lowest.
_KEYS_BARS = (
    "x-------------..",
    "x-----x---x---..",
    "..x-..x-..x-..x-",
    "0-1-2-1-0-1-2-1-",
    "x--x--x-..x--x-.",
)
# d down stroke, u up stroke; digits as for the keys.
_GUITAR_BARS = (
    "d---d-u-..u-d-u-",
    "d-d-d-d-d-d-d-d-",
    "d-----..d---u-..",
    "0-2-3-2-4-2-3-2-",
    "..d...d...d...d.",
    "d-du..du..d-d-u-",
)


def read_bar(bar: str) -> Iterator[tuple[int, int, str]]:
    """The notes of a written bar as (step, length in steps, symbol).

    >>> list(read_bar("r--..f-."))
    [(0, 3, 'r'), (5, 2, 'f')]
    """
    for step, symbol in enumerate(bar):
        if symbol not in ".-":
            rest = bar[step + 1 :]
            yield step, 1 + len(rest) - len(rest.lstrip("-")), symbol


def drum_part(rng: np.random.Generator, grid: Grid) -> list[Note]:
    """One pattern throughout, a fill at the end of every fourth bar and a crash after it."""
    pattern, fill = rng.choice(_DRUM_BARS), rng.choice(_FILLS)
    notes = []
    for bar in range(grid.bars):
        lines = dict(pattern)
        if bar % 4 == 3:
            for piece in pattern | fill:
                lines[piece] = pattern.get(piece, "." * 16)[:12] + fill.get(piece, "....")
        if bar % 4 == 0:
            lines[CRASH] = "x"
        for piece, line in lines.items():
            for step, _, symbol in read_bar(line):
                velocity = _VELOCITY[symbol] * rng.uniform(0.9, 1.0)
                notes.append(grid.note(bar * STEPS_PER_BAR + step, 1, piece, velocity))
    return _heard(grid, notes)


def bass_part(rng: np.random.Generator, grid: Grid, harmony: Harmony) -> list[Note]:
    """One written bar, transposed to every chord; roots lie between E1 and Eb2."""
    pattern = rng.choice(_BASS_BARS)
    roots = [28 + (chord.root - 28) % 12 for chord in harmony.chords]
    notes = []
    for bar, (root, ahead) in enumerate(zip(roots, [*roots[1:], roots[0]], strict=True)):
        neighbours = [p for p in harmony.scale(28, ahead + 2) if p != ahead]
        approach = min(neighbours, key=lambda pitch: abs(pitch - ahead))
        pitches = {"r": root, "f": root + 7, "o": root + 12, "a": approach}
        for step, length, symbol in read_bar(pattern):
            step += bar * STEPS_PER_BAR
            notes.append(grid.note(step, length, pitches[symbol], rng.uniform(0.8, 1.0)))
    return _heard(grid, notes)


def keys_part(rng: np.random.Generator, grid: Grid, harmony: Harmony) -> list[Note]:
    """Close triads inside one octave, so that voices move as little as they can."""
    low = int(rng.integers(55, 62))
    voicings = [chord.tones(low, low + 11) for chord in harmony.chords]
    return _comping(rng, grid, voicings, rng.choice(_KEYS_BARS), strum_seconds=0.0)


def guitar_part(rng: np.random.Generator, grid: Grid, harmony: Harmony) -> list[Note]:
    """Strummed or picked chords over an octave and a half."""
    low = int(rng.integers(45, 51))
    voicings = [chord.tones(low, low + 18) for chord in harmony.chords]
    return _comping(rng, grid, voicings, rng.choice(_GUITAR_BARS), rng.uniform(0.006, 0.014))


def _comping(
    rng: np.random.Generator,
    grid: Grid,
    voicings: list[list[int]],
    pattern: str,
    strum_seconds: float,
) -> list[Note]:
    """One written bar, played on the voicing of every chord; strings sound one after another."""
    notes = []
    for bar, voicing in enumerate(voicings):
        for step, length, symbol in read_bar(pattern):
            pitches = [voicing[int(symbol) % len(voicing)]] if symbol.isdigit() else voicing
            velocity = rng.uniform(0.75, 1.0)
            for k, pitch in enumerate(reversed(pitches) if symbol == "u" else pitches):
                note = grid.note(bar * STEPS_PER_BAR + step, length, pitch, velocity)
                notes.append(replace(note, start=note.start + k * strum_seconds))
    return _heard(grid, notes)


def _heard(grid: Grid, notes: list[Note]) -> list[Note]:
    """The notes in order, without those that start too late to be heard before the song ends."""
    in_time = [note for note in notes if note.start < grid.seconds - 0.15]
    return sorted(in_time, key=lambda note: (note.start, note.pitch))
