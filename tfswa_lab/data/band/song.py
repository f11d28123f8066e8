"""One song from one seed: write the score, play it, mix it, and annotate what was played.

Axis letters: `s` samples.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .instruments import (
    draw_bass,
    draw_guitar,
    draw_keyboard,
    play_drums,
    play_keys,
    play_strings,
)
from .score import (
    Grid,
    Harmony,
    Note,
    Syllable,
    bass_part,
    draw_grid,
    draw_harmony,
    drum_part,
    guitar_part,
    keys_part,
)
from .singer import HOP, Control, draw_singer, perform, sing, sung_part
from .sound import RATE, mix, samples_of


@dataclass(frozen=True)
class Song:
    """One rendered song.

    Args:
        name: `Artist - Title`.
        stems: int16 `(s, 2)` for vocals, drums, bass and other, at 44 100 Hz.
        annotations: what was played, ready for JSON.
    """

    name: str
    stems: dict[str, np.ndarray]
    annotations: dict

    @property
    def mixture(self) -> np.ndarray:
        """The exact sum of the stems, int16 `(s, 2)`; `mix` leaves room for it."""
        return sum(self.stems.values())


def render_song(seed: int, seconds: float = 12.0) -> Song:
    """Compose, play and mix one song.

    Args:
        seed: decides everything; `seed % 4` is the singer's register, from low to high.
        seconds: length, at least 4.

    Raises:
        ValueError: the song would be too short to hold a phrase.

    Notebook: 00_start_here
    """
    if seconds < 4:
        raise ValueError(f"seconds={seconds}: a song needs at least 4 s to hold a sung phrase")
    # Each player has a random stream of its own: a change to one leaves the others unchanged.
    streams = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(8))
    writing, beating, bassing, picking, pressing, singing, breathing, mixing = streams
    samples = samples_of(seconds)

    grid = draw_grid(writing, seconds)
    harmony = draw_harmony(writing, grid)
    singer = draw_singer(singing, seed % 4)
    syllables = sung_part(singing, grid, harmony, singer.center)
    notes = {
        "drums": drum_part(beating, grid),
        "bass": bass_part(bassing, grid, harmony),
        "guitar": guitar_part(picking, grid, harmony),
        "keys": keys_part(pressing, grid, harmony),
    }
    control = perform(singing, syllables, singer, samples)

    stems = mix(
        mixing,
        vocals=sing(breathing, syllables, singer, control, samples),
        drums=play_drums(beating, notes["drums"], samples),
        bass=play_strings(bassing, notes["bass"], draw_bass(bassing), samples),
        guitar=play_strings(picking, notes["guitar"], draw_guitar(picking), samples),
        keys=play_keys(notes["keys"], draw_keyboard(pressing), samples),
    )
    return Song(song_name(seed), stems, annotate(grid, harmony, notes, syllables, control))


_FIRST = ("Copper", "Quiet", "Paper", "Northern", "Velvet", "Hollow", "Amber", "Borrowed")
_SECOND = ("Lanterns", "Foxes", "Signals", "Orchards", "Pilots", "Engines", "Rivers", "Kites")
_VERBS = ("Leaving", "Finding", "Painting", "Crossing", "Chasing", "Counting", "Holding")
_PLACES = ("the Shore", "Tomorrow", "Every Window", "Your Echo", "Open Water", "Small Hours")


def song_name(seed: int) -> str:
    """The folder name `Artist - Title` of a song; any 64 consecutive seeds have different artists.

    >>> song_name(0)
    'Copper Lanterns - Leaving the Shore'
    """
    # 37 is odd, so its multiples visit all 64 pairs before one returns.
    first, second = divmod(37 * seed % 64, 8)
    verb, place = _VERBS[seed % len(_VERBS)], _PLACES[seed % len(_PLACES)]
    return f"{_FIRST[first]} {_SECOND[second]} - {verb} {place}"


_F0_FRAMES = 3  # control frames per annotated F0 value: every 441 samples, 10 ms


def annotate(
    grid: Grid,
    harmony: Harmony,
    notes: dict[str, list[Note]],
    syllables: list[Syllable],
    control: Control,
) -> dict:
    """Everything that was played, as plain values for JSON.

    Returns:
        `rate` in Hz, `seconds`, `tempo` in beats per minute, `key`, `beats` and `downbeats` in
        seconds, `chords` (start, end, label), `notes` per instrument (start, end, MIDI pitch,
        velocity; drums use the numbers of General MIDI), `syllables` (start, vowel_start, end,
        consonant, vowel, pitch, text), and `f0`: the frequency of the voice in Hz at every
        multiple of `f0_hop_seconds`, 0 where it is unvoiced.
    """
    sung = [Note(s.vowel_start, s.end, s.pitch) for s in syllables]
    chords = [{"start": c.start, "end": c.end, "label": c.label} for c in harmony.chords]
    return {
        "rate": RATE,
        "seconds": grid.seconds,
        "tempo": grid.tempo,
        "key": harmony.key,
        "beats": _rounded(grid.every(4)),
        "downbeats": _rounded(grid.every(16)),
        "chords": _rounded(chords),
        "notes": {
            name: _rounded([asdict(note) for note in part])
            for name, part in {"vocals": sung, **notes}.items()
        },
        "syllables": _rounded([asdict(s) | {"text": s.consonant + s.vowel} for s in syllables]),
        "f0_hop_seconds": _F0_FRAMES * HOP / RATE,
        "f0": _rounded(np.where(control.voiced, control.f0, 0.0)[::_F0_FRAMES].tolist()),
    }


def _rounded(value: Any) -> Any:
    """The same nested value with every float at a microsecond or a microhertz."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value
