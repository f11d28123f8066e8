"""Band-passed noise: what hisses in drums and consonants.

Axis letters: `s` samples.
"""

from __future__ import annotations

import numpy as np
from scipy.signal import butter, sosfilt

from .timeline import RATE, samples_of


def band_noise(rng: np.random.Generator, band: tuple[float, float], seconds: float) -> np.ndarray:
    """Noise `(s,)` of unit power between two frequencies in Hz."""
    white = rng.normal(size=samples_of(seconds))
    noise = sosfilt(butter(2, band, "bandpass", fs=RATE, output="sos"), white)
    return noise / noise.std()
