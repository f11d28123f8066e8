"""The embedded band: a synthetic four-piece with truth, so that the lab works offline for ever.

Every song comes from one integer seed: key, tempo, chords, drum pattern, bass line, comping and a
sung melody, played by instruments whose timbre, place and room differ from song to song. Needs
nothing but numpy, scipy and soundfile.

`song.py` shows how a song is made, top to bottom; one file per instrument; `write.py` puts the
tree on disk.

Notebook: 00_start_here
"""

from .song import Song, render_song
from .write import band_root, ensure_band, make_band

__all__ = ["Song", "band_root", "ensure_band", "make_band", "render_song"]
