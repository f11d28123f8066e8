"""The embedded band: synthetic songs that say what was played, so the lessons need no network.

Every song comes from one integer seed: key, tempo, chords, drum pattern, bass line, comping and a
sung melody, played by instruments whose timbre, position and room differ from song to song.

`song.py` shows how a song is made, from top to bottom, out of `score.py` (the notes),
`instruments.py`, `singer.py` and `sound.py` (noise, room, mix); `write.py` puts the songs on disk.

Notebook: 00_start_here
"""

from .song import Song, render_song
from .write import band_root, ensure_band, make_band

__all__ = ["Song", "band_root", "ensure_band", "make_band", "render_song"]
