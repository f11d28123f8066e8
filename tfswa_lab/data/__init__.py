"""Tracks, stems, augmentation and the embedded band.

>>> from tfswa_lab.data import render_song
>>> render_song(seed=0, seconds=4.0).name
'Copper Lanterns - Leaving the Shore'
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["augment"],
    submod_attrs={
        "band": ["ensure_band", "make_band", "render_song"],
        "download": ["extract_zip", "fetch"],
        "mir1k": ["MIR1K"],
        "musdb": ["MUSDB18Dataset"],
    },
)
