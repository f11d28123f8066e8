"""What is compared with what: pairs of stems, their frames, and where one of them is silent.

Axis letters: `n` stems, `c` channels, `s` samples, `m` frames.

Notebook: 08_evaluation
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

Stretch = tuple[int, int]  # first sample, and the one after the last


def checked_pair(
    references: Tensor | np.ndarray, estimates: Tensor | np.ndarray
) -> tuple[Tensor, Tensor]:
    """Both as real tensors `(n, c, s)` on the references' device.

    Raises:
        ValueError: the shapes differ or are not of this form, or samples are not finite.

    Notebook: 08_evaluation
    """
    references, estimates = (torch.as_tensor(x).detach() for x in (references, estimates))
    if references.shape != estimates.shape or references.ndim not in (2, 3):
        raise ValueError(
            f"references {tuple(references.shape)} and estimates {tuple(estimates.shape)} must "
            "have the same shape, (stems, channels, samples) or (stems, samples); cut or pad the "
            "estimates, and mind that museval has the channels last"
        )
    if not references.numel():
        raise ValueError(f"there is nothing to compare in {tuple(references.shape)}")
    if references.ndim == 2:
        references, estimates = references[:, None], estimates[:, None]
    if references.shape[1] > references.shape[2]:
        raise ValueError(
            f"{tuple(references.shape)} has more channels than samples; bring it into the order "
            "(stems, channels, samples)"
        )
    for name, stems in (("references", references), ("estimates", estimates)):
        _check_finite(name, stems)
    return references, estimates.to(references.device)


def _check_finite(name: str, stems: Tensor) -> None:
    if stems.is_complex():
        raise ValueError(f"{name} are complex; BSSEval compares waveforms")
    for number, stem in enumerate(stems):
        # The sum of finite float64 samples is finite, and one pass is enough to form it.
        if not stem.sum(dtype=torch.float64).isfinite():
            raise ValueError(f"{name}[{number}] contains NaN or infinite samples")


def frames_in_seconds(samples: int, window: float, hop: float, rate: float) -> list[Stretch]:
    """Frames of some samples, for a window and a hop in seconds.

    Raises:
        ValueError: window, hop or rate makes no sense.

    Notebook: 08_evaluation

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


def frames_of(samples: int, window: float, hop: float) -> list[Stretch]:
    """Where frames begin and end; all that are whole, or one that is all there is.

    >>> frames_of(10, 4, 3)
    [(0, 4), (3, 7), (6, 10)]
    >>> frames_of(9, 4, 4)
    [(0, 4), (4, 8)]
    >>> frames_of(9, math.inf, math.inf)
    [(0, 9)]

    Notebook: 08_evaluation
    """
    if window >= samples:
        return [(0, samples)]
    count = math.floor((samples - window + hop) / hop)
    return [(math.floor(k * hop), math.floor(k * hop + window)) for k in range(count)]


def audible(references: Tensor, estimates: Tensor) -> tuple[list[int], list[int], tuple[str, ...]]:
    """Stems whose reference is not silent throughout, those of them that can be scored, and why.

    Notebook: 08_evaluation
    """
    sounding, scored, notes = [], [], ()
    for stem, (reference, estimate) in enumerate(zip(references, estimates, strict=True)):
        if _is_silent(reference):
            notes += (f"stem {stem} is silent throughout, so it has no ratios",)
            continue
        sounding.append(stem)
        if _is_silent(estimate):
            notes += (f"the estimate of stem {stem} is silent throughout: no ratios",)
        else:
            scored.append(stem)
    return sounding, scored, notes


def chosen(stems: Tensor, which: list[int]) -> Tensor:
    """Some of the stems; all of them are not copied.

    Notebook: 08_evaluation
    """
    return stems if len(which) == len(stems) else stems[which]


def silent_frames(references: Tensor, estimates: Tensor, frames: list[Stretch]) -> Tensor:
    """In which frames `(m,)` any reference or estimate `(n, c, s)` is silent.

    Notebook: 08_evaluation
    """
    both = [*references, *estimates]
    silent = [any(_is_silent(stem[:, start:stop]) for stem in both) for start, stop in frames]
    return torch.tensor(silent, device=references.device)


def _is_silent(stem: Tensor) -> bool:
    """Whether the channels `(c, s)` add up to 0 at every sample, which is museval's silence."""
    few = stem[:, ::97].sum(0, dtype=torch.float64)  # mostly enough to see that it is not
    return not few.any() and not stem.sum(0, dtype=torch.float64).any()
