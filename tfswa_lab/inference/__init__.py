"""From waveforms and files to stems.

>>> from tfswa_lab.inference import Segmentation
>>> Segmentation(segment_seconds=6.0, overlap=0.25).samples(44_100)
(264600, 66150)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["separate"],  # which can be called
    submod_attrs={
        "files": ["Reading", "SeparatedFile", "Writing", "separate_file"],
        "separate": ["Segmentation", "separate_stream", "separate_track"],
    },
)
