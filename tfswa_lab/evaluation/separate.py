"""Whole songs through a separator that sees a few seconds at a time.

Axis letters: `b` batch, `n` stems, `c` audio channels, `s` samples.

Notebook: 03_tfswa_unet
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fade_window(length: int, fade: int) -> Tensor:
    """Ones with a linear ramp of `fade` samples at both ends; never zero.

    >>> fade_window(6, 2).tolist()
    [0.25, 0.75, 1.0, 1.0, 0.75, 0.25]
    """
    ramp = (torch.arange(length) + 0.5) / max(fade, 1)
    return torch.minimum(ramp, ramp.flip(0)).clamp(max=1.0)


@torch.inference_mode()
def separate_track(
    separator: nn.Module,
    mixture: Tensor,
    segment: int,
    overlap: float = 0.25,
    progress: Callable[[range], object] = iter,
) -> Tensor:
    """Separate a mixture of any length by overlap-add of faded segments.

    Every segment has the same length (the last is padded with silence and cut again), segments
    overlap by a fixed share, and where they overlap they are averaged with weights that fade in
    and out, so no seam is heard and no tail is lost.

    Args:
        separator: maps `(1, c, s)` to `(1, n, c, s)`; put it in evaluation mode first.
        mixture: `(c, s)`, moved to the separator's device a segment at a time.
        segment: samples per segment.
        overlap: share of a segment that the next one covers again, in [0, 0.5].
        progress: wraps the range of segment starts, e.g. `tqdm`.

    Returns:
        Estimates `(n, c, s)` on the mixture's device.

    Raises:
        ValueError: the mixture is empty or not `(c, s)`, or the overlap is out of range.

    Notebook: 03_tfswa_unet
    """
    if mixture.ndim != 2 or mixture.shape[1] == 0:
        raise ValueError(f"expected a mixture (channels, samples), got {tuple(mixture.shape)}")
    if not 0 <= overlap <= 0.5:
        raise ValueError(f"overlap={overlap} must lie between 0 and 0.5")
    length = mixture.shape[1]
    fade = int(segment * overlap)
    window = fade_window(segment, fade)
    parameter = next(separator.parameters(), mixture)
    total, weight = None, torch.zeros(length)
    for start in progress(range(0, max(length - fade, 1), segment - fade)):
        chunk = mixture[:, start : start + segment]
        size = chunk.shape[1]
        padded = F.pad(chunk, (0, segment - size)).to(parameter.device)
        estimates = separator(padded[None])[0].to(mixture.device)
        if total is None:
            total = mixture.new_zeros(*estimates.shape[:-1], length)
        total[..., start : start + size] += estimates[..., :size] * window[:size]
        weight[start : start + size] += window[:size]
    return total / weight
