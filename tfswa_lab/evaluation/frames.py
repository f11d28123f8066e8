"""References and estimates before they are compared: checks, frames, and where they are silent.

Axis letters: `n` stems, `c` channels, `s` samples, `m` frames.

Notebook: 08_evaluation
"""

from __future__ import annotations

import math
import operator

import numpy as np
import torch
from torch import Tensor

Span = tuple[int, int]  # first sample, and the one after the last

QUIETEST, LOUDEST = 1e-100, 1e100  # peaks: the squares of other samples over- or underflow


def checked_pair(
    references: Tensor | np.ndarray, estimates: Tensor | np.ndarray
) -> tuple[Tensor, Tensor]:
    """Both as tensors of floats `(n, c, s)` on the references' device.

    Raises:
        ValueError: the shapes differ or are not of this form; samples are integers, not finite, or
            of a level too far from 1 for sums of squares.
    """
    references, estimates = _floats("references", references), _floats("estimates", estimates)
    if references.shape != estimates.shape or references.ndim not in (2, 3):
        raise ValueError(
            f"references {tuple(references.shape)} and estimates {tuple(estimates.shape)} must "
            "have the same shape, (stems, channels, samples) or (stems, samples); cut or pad the "
            "estimates, and mind that museval has the channels last"
        )
    if not references.numel():
        raise ValueError(f"there is nothing to compare in {tuple(references.shape)}")
    _check_order(references.shape)
    if references.ndim == 2:
        references, estimates = references[:, None], estimates[:, None]
    for name, stems in (("references", references), ("estimates", estimates)):
        _check_levels(name, stems)
    return references, estimates.to(references.device)


def _floats(name: str, stems: Tensor | np.ndarray) -> Tensor:
    if not isinstance(stems, Tensor | np.ndarray):
        raise ValueError(
            f"{name} are a {type(stems).__name__}; stack the stems into one tensor or array, "
            "(stems, channels, samples)"
        )
    stems = torch.as_tensor(stems).detach()
    if not stems.is_floating_point():
        raise ValueError(
            f"{name} are {str(stems.dtype).removeprefix('torch.')}; waveforms are floats in "
            "[-1, 1]: divide integers by their full scale, 32768 for 16 bits"
        )
    return stems


def _check_order(shape: tuple[int, ...]) -> None:
    """Refuse the orders of other libraries, which would be taken for many tiny stems."""
    *_, samples = shape
    if shape[0] <= samples and shape[-2] <= samples:
        return
    more = "stems" if shape[0] > samples else "channels"
    fix = (
        "soundfile has the channels last: pass x.T, or x.T[None] if these are the channels of one "
        "stem"
        if len(shape) == 2
        else "the order is (stems, channels, samples): pass x.swapaxes(1, 2) if it is museval's"
    )
    raise ValueError(f"{tuple(shape)} has more {more} than samples; {fix}")


def _check_levels(name: str, stems: Tensor) -> None:
    for number, stem in enumerate(stems):
        low, high = stem.aminmax()  # NaN if any sample is
        peak = max(-low.item(), high.item())
        if not math.isfinite(peak):
            raise ValueError(f"{name}[{number}] contains NaN or infinite samples")
        if peak and not QUIETEST < peak < LOUDEST:
            raise ValueError(
                f"{name}[{number}] has a peak of {peak:.0e}, too far from 1 for sums of squares; "
                "scale references and estimates alike, which changes no ratio"
            )


def checked_taps(filter_length: int) -> int:
    """The length of distortion filters, from any type of whole number.

    Raises:
        ValueError: it is not a whole number, or it is below 1.
    """
    try:
        taps = operator.index(filter_length)
    except TypeError:
        taps = 0
    if taps < 1:
        raise ValueError(f"filter_length={filter_length!r}: a whole number of taps, 1 or more")
    return taps


def frames_in_seconds(samples: int, window: float, hop: float, rate: float) -> list[Span]:
    """Frames of some samples, for a window and a hop in seconds.

    Raises:
        ValueError: window, hop or rate makes no sense.

    >>> frames_in_seconds(88_200, 0.7, 0.7, 44_100)[0]  # 0.7 * 44100 is a little below 30870
    (0, 30870)
    """
    if not (rate > 0 and window * rate >= 1 and hop * rate >= 1):
        raise ValueError(
            f"window={window} s and hop={hop} s must hold a sample or more, at rate={rate} Hz"
        )
    if hop == math.inf != window:
        raise ValueError("hop=inf goes with window=inf: one frame that is the whole track")
    return frames_of(samples, _in_samples(window, rate), _in_samples(hop, rate))


def _in_samples(seconds: float, rate: float) -> float:
    """A whole number where only rounding keeps it from being one."""
    samples = seconds * rate
    whole = math.inf if math.isinf(samples) else round(samples)
    return whole if math.isclose(samples, whole, rel_tol=1e-12) else samples


def frames_of(samples: int, window: float, hop: float) -> list[Span]:
    """Start and end of each whole frame; if the window covers all samples, one frame.

    >>> frames_of(10, 4, 3)
    [(0, 4), (3, 7), (6, 10)]
    >>> frames_of(9, 4, 4)
    [(0, 4), (4, 8)]
    >>> frames_of(9, math.inf, math.inf)
    [(0, 9)]
    """
    if window >= samples:
        return [(0, samples)]
    count = math.floor((samples - window + hop) / hop)
    return [(math.floor(k * hop), math.floor(k * hop + window)) for k in range(count)]


def audible(references: Tensor, estimates: Tensor) -> tuple[list[int], list[int], tuple[str, ...]]:
    """Stems whose reference sounds, stems that can be scored, and why the others cannot.

    A stem whose channels cancel is silence to museval and has no ratios, but it sounds: where it
    leaks into other estimates it is interference.
    """
    sounding, scored, notes = [], [], ()
    for stem, (reference, estimate) in enumerate(zip(references, estimates, strict=True)):
        if not _is_silent(reference) or reference.any():
            sounding.append(stem)
        if _is_silent(reference):
            notes += (f"stem {stem} {_manner(reference)}, so it has no ratios",)
        elif _is_silent(estimate):
            notes += (f"the estimate of stem {stem} {_manner(estimate)}: no ratios",)
        else:
            scored.append(stem)
    return sounding, scored, notes


def _manner(silent: Tensor) -> str:
    if silent.any():
        return "has channels that cancel throughout, which counts as silence"
    return "is silent throughout"


def select_stems(stems: Tensor, which: list[int]) -> Tensor:
    """The stems with these numbers; no copy where they are all of them."""
    return stems if len(which) == len(stems) else stems[which]


def silent_frames(
    references: Tensor, estimates: Tensor, stems: list[int], frames: list[Span]
) -> Tensor:
    """In which frames `(m,)` the reference or the estimate of any of these stems is silent."""
    both = [x[stem] for stem in stems for x in (references, estimates)]
    silent = [any(_is_silent(stem[:, start:stop]) for stem in both) for start, stop in frames]
    return torch.tensor(silent, device=references.device)


def _is_silent(stem: Tensor) -> bool:
    """Whether the channels `(c, s)` add up to 0 at every sample, which is museval's silence."""
    few = stem[:, ::97].sum(0, dtype=torch.float64)  # mostly enough: any sound is found here
    return not few.any() and not stem.sum(0, dtype=torch.float64).any()
