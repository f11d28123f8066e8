"""The truth beside the sound: everything that was played, as plain values for JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from .score import Grid, Harmony, Note, Syllable
from .singer import HOP, Control
from .timeline import RATE

_F0_FRAMES = 3  # control frames per annotated F0 value: every 441 samples, 10 ms


def annotate(
    grid: Grid,
    harmony: Harmony,
    notes: dict[str, list[Note]],
    syllables: list[Syllable],
    control: Control,
) -> dict:
    """Describe a song.

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
