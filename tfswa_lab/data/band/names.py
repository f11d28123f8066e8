"""Invented names: every seed has its band and its song, safe as the name of a folder."""

from __future__ import annotations

_FIRST = ("Copper", "Quiet", "Paper", "Northern", "Velvet", "Hollow", "Amber", "Borrowed")
_SECOND = ("Lanterns", "Foxes", "Signals", "Orchards", "Pilots", "Engines", "Rivers", "Kites")
_VERBS = ("Leaving", "Finding", "Painting", "Crossing", "Chasing", "Counting", "Holding")
_PLACES = ("the Shore", "Tomorrow", "Every Window", "Your Echo", "Open Water", "Small Hours")


def song_name(seed: int) -> str:
    """The folder name `Artist - Title` of a song; any 64 seeds in a row have different artists.

    >>> song_name(0)
    'Copper Lanterns - Leaving the Shore'
    """
    # 37 is odd, so its multiples visit all 64 pairs before one returns.
    first, second = divmod(37 * seed % 64, 8)
    verb, place = _VERBS[seed % len(_VERBS)], _PLACES[seed % len(_PLACES)]
    return f"{_FIRST[first]} {_SECOND[second]} - {verb} {place}"
