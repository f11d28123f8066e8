"""Whole songs through a separator that sees a few seconds at a time.

Axis letters: `b` batch, `n` stems, `c` audio channels, `s` samples.

Notebook: 03_tfswa_unet
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def fade_window(length: int, fade: int) -> Tensor:
    """Ones with a linear ramp of `fade` samples at both ends; never zero.

    >>> fade_window(6, 2).tolist()
    [0.25, 0.75, 1.0, 1.0, 0.75, 0.25]

    Notebook: 03_tfswa_unet
    """
    ramp = (torch.arange(length) + 0.5) / max(fade, 1)
    return torch.minimum(ramp, ramp.flip(0)).clamp(max=1.0)


def segment_starts(length: int, segment: int, fade: int) -> list[int]:
    """Where segments begin that overlap by `fade` samples; the last one ends with the song.

    >>> segment_starts(100, 40, 10)
    [0, 30, 60]
    >>> segment_starts(105, 40, 10)
    [0, 30, 60, 65]
    >>> segment_starts(25, 40, 10)
    [0]

    Notebook: 03_tfswa_unet
    """
    last = max(length - segment, 0)
    return [*range(0, last, segment - fade), last]


@torch.inference_mode()
def separate_track(
    separator: nn.Module,
    mixture: Tensor,
    segment: int,
    overlap: float = 0.25,
    progress: Callable[[list[int]], Iterable[int]] = iter,
) -> Tensor:
    """Separate a mixture of any length by overlap-add of faded segments.

    Segments overlap by a fixed share, the last one by more, so that it is as long as the others:
    silence appended to it would change what the network sees. Where segments overlap they are
    averaged with weights that fade in and out, so no seam is heard and no tail is lost.

    Args:
        separator: maps `(1, c, s)` to `(1, n, c, s)`; put it in evaluation mode first.
        mixture: `(c, s)`, moved to the separator's device a segment at a time.
        segment: samples per segment; a shorter mixture is separated whole.
        overlap: share of a segment that the next one covers again, in [0, 0.5].
        progress: wraps the list of segment starts, e.g. `tqdm`.

    Returns:
        Estimates `(n, c, s)` on the mixture's device.

    Raises:
        ValueError: the mixture is empty or not `(c, s)`, or segment or overlap are out of range.

    Notebook: 03_tfswa_unet
    """
    if mixture.ndim != 2 or mixture.shape[1] == 0:
        raise ValueError(f"expected a mixture (channels, samples), got {tuple(mixture.shape)}")
    if not (isinstance(segment, int) and segment >= 1 and 0 <= overlap <= 0.5):
        raise ValueError(
            f"segment={segment} must be a number of samples, overlap={overlap} from 0 to 0.5"
        )
    length, fade = mixture.shape[1], int(segment * overlap)
    window = fade_window(min(segment, length), fade).to(mixture.device)
    device = next(separator.parameters(), mixture).device
    total, weight = None, mixture.new_zeros(length)
    for start in progress(segment_starts(length, segment, fade)):
        place = slice(start, min(start + segment, length))
        estimates = separator(mixture[None, :, place].to(device))[0].to(mixture.device)
        if total is None:
            total = mixture.new_zeros(*estimates.shape[:-1], length)
        total[..., place] += estimates * window
        weight[place] += window
    return total / weight
