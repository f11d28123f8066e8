"""One song from one seed: write the score, let everybody play, mix, and keep the truth.

Axis letters: `s` samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import drums, keys, strings
from .annotations import annotate
from .arrangement import bass_part, drum_part, guitar_part, keys_part
from .melody import sung_part
from .mix import mix
from .names import song_name
from .score import draw_grid, draw_harmony
from .singer import draw_singer, perform
from .timeline import samples_of
from .voice import sing


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
    # Everybody draws from a stream of their own: a change to one leaves the others as they were.
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
        drums=drums.render(beating, notes["drums"], samples),
        bass=strings.render(bassing, notes["bass"], strings.draw_bass(bassing), samples),
        guitar=strings.render(picking, notes["guitar"], strings.draw_guitar(picking), samples),
        keys=keys.render(notes["keys"], keys.draw_keyboard(pressing), samples),
    )
    return Song(song_name(seed), stems, annotate(grid, harmony, notes, syllables, control))
