"""The sung line: phrases with pauses between them, pitches from the key, syllables to sing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .phonemes import CONSONANTS, VOWELS
from .score import STEPS_PER_BAR, Grid, Harmony, Syllable

# Lengths in eighths; a phrase of at most ten of the sixteen eighths in two bars leaves time to
# breathe, and gives every song stretches without voice.
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
    place = len(scale) // 2
    syllables: list[Syllable] = []
    for phrase in range((grid.bars + 1) // 2):
        form = "AABA"[phrase % 4]
        step, notes = phrase * _PHRASE_STEPS + entries[form], []
        for eighths in rhythms[form]:
            place = _next_place(rng, scale, place, step, harmony)
            notes.append((step, 2 * eighths, scale[place]))
            step += 2 * eighths
        syllables += _sing(rng, grid, notes)
    return syllables


def _next_place(
    rng: np.random.Generator, scale: list[int], place: int, step: int, harmony: Harmony
) -> int:
    """A small step along the scale; notes on the beat go to the nearest chord tone."""
    place = int(np.clip(place + rng.choice([-2, -1, -1, 0, 1, 1, 2]), 0, len(scale) - 1))
    if step % 4:
        return place
    chord = harmony.chords[min(step // STEPS_PER_BAR, len(harmony.chords) - 1)]
    inside = [k for k, pitch in enumerate(scale) if pitch % 12 in chord.pitch_classes]
    return min(inside, key=lambda k: abs(k - place))


def _sing(
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
        # For now it ends a little early, to breathe, and before the song does.
        end = min(grid.time(step + length) - 0.08, grid.seconds - 0.05)
        syllables.append(Syllable(start, grid.time(step), end, consonant, vowel, pitch))
    return syllables
