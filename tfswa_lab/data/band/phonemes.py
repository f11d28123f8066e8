"""The sounds of the invented language: five vowels and ten consonants.

Vowel formants: Peterson & Barney, *Control methods used in a study of the vowels* (1952),
averages of the men. Consonant loci and noise bands are simplified from Klatt, *Software for a
cascade/parallel formant synthesizer* (1980).
"""

from __future__ import annotations

from dataclasses import dataclass

# F1, F2, F3 in Hz.
VOWELS = {
    "ah": (730.0, 1090.0, 2440.0),
    "eh": (530.0, 1840.0, 2480.0),
    "ee": (270.0, 2290.0, 3010.0),
    "oh": (570.0, 840.0, 2410.0),
    "oo": (300.0, 870.0, 2240.0),
}


@dataclass(frozen=True)
class Consonant:
    """How long it lasts, and what of it is voice and what is noise.

    Args:
        seconds: from its start to the start of the vowel.
        voicing: level of the voice in it, 0 for a voiceless consonant.
        formants: F1, F2, F3 in Hz that the voice glides from, where it is voiced.
        noise: level of the noise relative to a vowel, 0 for none.
        band: lowest and highest frequency of the noise in Hz.
        burst: the noise is a short decaying burst after a silent closure.
    """

    seconds: float
    voicing: float = 0.0
    formants: tuple[float, float, float] | None = None
    noise: float = 0.0
    band: tuple[float, float] = (0.0, 0.0)
    burst: bool = False


CONSONANTS = {
    "t": Consonant(0.06, noise=0.45, band=(3000, 8000), burst=True),
    "k": Consonant(0.07, noise=0.55, band=(1400, 3500), burst=True),
    "p": Consonant(0.06, noise=0.5, band=(400, 1800), burst=True),
    "s": Consonant(0.10, noise=0.25, band=(4500, 11000)),
    "f": Consonant(0.09, noise=0.16, band=(1500, 9000)),
    "h": Consonant(0.07, noise=0.16, band=(600, 3500)),
    "d": Consonant(0.05, 0.2, (250.0, 1700.0, 2600.0), 0.35, (2500, 7000), burst=True),
    "m": Consonant(0.08, 0.4, (250.0, 1000.0, 2200.0)),
    "n": Consonant(0.07, 0.4, (250.0, 1600.0, 2500.0)),
    "l": Consonant(0.06, 0.5, (350.0, 1100.0, 2700.0)),
}
