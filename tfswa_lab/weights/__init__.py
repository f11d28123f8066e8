"""Trained separators that ship with the package, each a folder for `load_separator`.

`BAND` was trained on the embedded band's synthetic songs alone, so nobody else has rights in it: a
separator to work with offline. Its README.md is its card.

>>> from tfswa_lab.models.storage import load_separator
>>> load_separator(BAND).stems
('vocals', 'drums', 'bass', 'other')
"""

from pathlib import Path

BAND = Path(__file__).parent / "band"
