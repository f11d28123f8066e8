"""Whether a mixture is the sum of its stems: another song, or a mastered mix, is not.

Axis letters: `c` channels, `s` samples.

Notebook: 08_evaluation
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from tfswa_lab.audio import decibels, rms_db
from tfswa_lab.evaluation.alignment import best_lag, faults_of, match

# Five files, each rounded to 16 bits, leave 0.65 steps of 2⁻¹⁵ (RMS); with dither, 1.1 steps.
ROUNDING_DB = -80.8  # three steps
LOSSLESS = (".wav", ".flac", ".aiff", ".aif")
# Five streams, coded one by one, do not add up: real .stem.mp4 leave -32 to -15 dB of the mixture.
LOSSY_DB = -10.0
# Mastered mixes of Music Delta leave -41, -18, -5.2 and -4.1 dB; another song 0 to +3 dB, as the
# energies of two unrelated songs add up.
LIMIT_DB = -2.0


def residual_db(mixture: Tensor, total: Tensor) -> float:
    """Energy of the mixture minus the sum of its stems, relative to the mixture, in dB.

    Args:
        mixture: `(c, s)`.
        total: sum of all stems, `(c, s)`.

    Returns:
        -inf where both differ by no more than files of 16 bits do.
    """
    residual = mixture - total
    if rms_db(residual) <= ROUNDING_DB:
        return -math.inf
    energies = (x.double().square().sum() for x in (residual, mixture))
    return decibels(*energies).item()


def residual_notes(
    mixture: Tensor, total: Tensor, files: Sequence[Path], rate: int, allow: bool = False
) -> tuple[str, ...]:
    """A note if something is left of the mixture without its stems.

    Args:
        mixture: `(c, s)`.
        total: sum of all stems, `(c, s)`.
        files: of the song; lossy ones may leave more.
        rate: samples per second.
        allow: whatever is left.

    Raises:
        ValueError: so much is left, also at the best lag and gain, that this must be the mixture
            of another song.
    """
    left = residual_db(mixture, total)
    if left > LIMIT_DB and (shifted := _shifted_note(mixture, total, rate)):
        return (shifted,)
    if left > LIMIT_DB and not allow:
        raise ValueError(
            f"{files[0]} is not the sum of its stems: without them, {left:+.1f} dB of it are left "
            "(another song leaves 0 to +3 dB, a mastered mix -4 dB and less); check that all are "
            "of one song, or evaluate with --allow-mismatch (allow_mismatch=True)"
        )
    lossless = all(path.suffix.lower() in LOSSLESS for path in files)
    if left == -math.inf or (left < LOSSY_DB and not lossless):
        return ()
    return (
        f"the mixture is not the sum of its stems: without them, {left:+.1f} dB of it are left",
    )


def _shifted_note(mixture: Tensor, total: Tensor, rate: int) -> str:
    """A note if the mixture is the sum of its stems at another time or level; else nothing."""
    if not (mixture.any() and total.any()):
        return ""
    lag = best_lag(mixture, total, rate)
    fit = match(mixture, total, lag)
    left = -fit.usdr_with(fit.gain)
    faults = " and ".join(faults_of(lag, fit.gain, rate))
    if left > LIMIT_DB or not faults:
        return ""
    return f"the sum of the stems {faults}; corrected, {left:+.1f} dB of the mixture would be left"
