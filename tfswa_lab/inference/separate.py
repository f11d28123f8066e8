"""Whole songs through a separator that sees a few seconds at a time.

Axis letters: `b` batch, `n` stems, `c` audio channels, `s` samples.

Notebook: 03_tfswa_unet
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import islice
from numbers import Integral
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from tfswa_lab import audio
from tfswa_lab.decode import decode
from tfswa_lab.memory.out_of_memory import is_out_of_memory, retreat
from tfswa_lab.models import storage

Progress = Callable[[list[int]], Iterable[int]]  # wraps the list of segment starts, e.g. `tqdm`


@dataclass(frozen=True)
class Segmentation:
    """How a song is cut into the segments that a separator sees, and how many it sees at once.

    Args:
        segment_seconds: length of a segment; a shorter song is separated whole.
        overlap: share of a segment that the next one covers again, from 0 to 0.5.
        shifts: average so many estimates, whose segments begin elsewhere; 0 and 1 are one.
        batch_size: segments at once; halved, and halved again, where memory runs out.

    Raises:
        ValueError: a value is out of range or of another type.
    """

    segment_seconds: float = 6.0
    overlap: float = 0.25
    shifts: int = 1
    batch_size: int = 1

    def __post_init__(self):
        audio.check_seconds("segment_seconds", self.segment_seconds)
        if not (audio.is_number(self.overlap) and 0 <= self.overlap <= 0.5):
            raise ValueError(
                f"overlap={self.overlap!r} must be a share of a segment, from 0 to 0.5"
            )
        if not (audio.is_number(self.shifts, Integral) and self.shifts >= 0):
            raise ValueError(f"shifts={self.shifts!r} must be 0 or more estimates to average")
        if not (audio.is_number(self.batch_size, Integral) and self.batch_size >= 1):
            raise ValueError(f"batch_size={self.batch_size!r} must be 1 or more segments at once")
        for name, value in vars(self).items():
            object.__setattr__(self, name, audio.plain_number(value))

    def samples(self, rate: int) -> tuple[int, int]:
        """Samples of a segment and of its overlap with the next, at a rate in Hz.

        Raises:
            ValueError: a segment is shorter than a sample, or there are more shifts than places
                where a segment can begin.

        >>> Segmentation(6.0, overlap=0.25).samples(44_100)
        (264600, 66150)
        """
        segment = round(self.segment_seconds * rate)
        fade = int(segment * self.overlap)
        if segment < 1:
            raise ValueError(
                f"segment_seconds={self.segment_seconds} is less than a sample at {rate} Hz"
            )
        if self.shifts > segment - fade:
            raise ValueError(
                f"shifts={self.shifts} must be from 0 to {segment - fade}, the hop of the segments"
            )
        return segment, fade


def separate(
    song: Tensor | np.ndarray | str | Path,
    sample_rate: int | None = None,
    model: nn.Module | str | Path = "band",
    segmentation: Segmentation = Segmentation(),
    progress: Progress = iter,
) -> dict[str, Tensor]:
    """Separate a song in memory, at any sample rate, into a waveform for each stem.

    `inference.files.separate_file` writes files instead, of songs that need not fit into memory.

    Args:
        song: a waveform `(c, s)` of floats, mono or stereo, or `(s,)`, on any device; or the path
            of a sound file, whose channels are mixed down to two.
        sample_rate: of a waveform, in Hz; the model's own if None. A file states its own.
        model: what `load_separator` takes, or a separator in evaluation mode. The song is resampled
            to its rate, and the stems back.
        segmentation: how the song is cut.
        progress: wraps the list of segment starts, e.g. `tqdm`.

    Returns:
        Stem → `(c, s)`, with the model's channels, at the rate and of the length of the song.

    Raises:
        FileNotFoundError: there is no such file or model.
        ValueError: the song is damaged, empty, not finite or not `(c, s)`, or a number makes no
            sense.
        torch.OutOfMemoryError: there is no memory even for one segment.
    """
    if isinstance(song, nn.Module):
        raise ValueError("the song comes first: separate(song, sample_rate, model)")
    if isinstance(song, str | Path):
        if sample_rate is not None:
            raise ValueError(f"{song} states its sample rate: leave sample_rate out")
        path = Path(song)
        song, sample_rate = decode(path, channels=2)
        audio.check_finite(song, path)
    if isinstance(song, np.ndarray):
        song = _from_numpy(song)
    if isinstance(song, Tensor) and song.ndim == 1:
        song = song[None]
    _check_waveform(song)
    separator = model if isinstance(model, nn.Module) else storage.load_separator(model)
    own = separator.sample_rate
    rate = own if sample_rate is None else sample_rate
    precise = audio.to_channels(song.to(_at_least_float32(song.dtype)), separator.audio_channels)
    heard = audio.resample(precise, rate, own)
    estimates = separate_track(separator, heard, segmentation, progress)
    estimates = audio.resample(estimates, own, rate)[..., : song.shape[-1]].to(song.dtype)
    return dict(zip(separator.stems, estimates, strict=True))


def _from_numpy(song: np.ndarray) -> Tensor:
    """A copy in this machine's order of bytes, whatever the array's strides; integers stay so."""
    native = np.dtype(np.float64) if song.dtype.itemsize > 8 else song.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(song, native, order="C"))


def separate_track(
    separator: nn.Module,
    mixture: Tensor,
    segmentation: Segmentation = Segmentation(),
    progress: Progress = iter,
) -> Tensor:
    """Separate a mixture of any length by overlap-add of faded segments.

    Segments overlap by a fixed share, the last one by more, so that it is as long as the others:
    silence appended to it would change what the network sees. Where segments overlap they are
    averaged with weights that fade in and out, so no seam is heard and no tail is lost.

    Args:
        separator: maps `(b, c, s)` to `(b, n, c, s)`, and has a `sample_rate`; put it in evaluation
            mode first.
        mixture: `(c, s)` at that rate, moved to the separator's device a batch of segments at a
            time.
        segmentation: how the mixture is cut.
        progress: wraps the list of segment starts, e.g. `tqdm`.

    Returns:
        Estimates `(n, c, s)` on the mixture's device.

    Raises:
        ValueError: the mixture is empty, not finite or not `(c, s)`, the segmentation does not fit
            its rate, or the separator is in training mode and has batch norm or dropout.
        torch.OutOfMemoryError: there is no memory even for one segment.
    """
    _check_waveform(mixture)
    length = mixture.shape[1]
    estimates = separate_stream(separator, [mixture], length, segmentation, progress)
    return torch.cat(list(estimates), dim=-1).to(mixture.dtype)


def _check_waveform(mixture: Tensor) -> None:
    if not isinstance(mixture, Tensor):
        raise ValueError(
            f"expected a waveform as a tensor, got a {type(mixture).__name__}; use "
            "torch.as_tensor(waveform), or the path of a file"
        )
    if mixture.ndim != 2 or mixture.shape[1] == 0:
        raise ValueError(f"expected a mixture (channels, samples), got {tuple(mixture.shape)}")
    if mixture.shape[0] > 2 >= mixture.shape[1]:
        raise ValueError(
            f"{tuple(mixture.shape)} looks like (samples, channels), as soundfile reads; pass "
            "waveform.T"
        )
    if not mixture.is_floating_point():
        raise ValueError(
            f"expected a mixture of floats in [-1, 1], got {mixture.dtype}; divide 16-bit integers "
            "by 32768"
        )
    if not mixture.float().isfinite().all():  # float64 holds more than the model does
        raise ValueError("the mixture contains NaN or infinite samples, or some beyond float32")


def separate_stream(
    separator: nn.Module,
    blocks: Iterable[Tensor],
    length: int,
    segmentation: Segmentation = Segmentation(),
    progress: Progress = iter,
) -> Iterator[Tensor]:
    """`separate_track` for a mixture that comes in blocks and need not fit into memory.

    Shifts only add segments: the weights of one row of them sum to 1 (but at the song's ends), so
    the overlap-add of n rows is the average of n estimates.

    Args:
        blocks: `(c, s)` each, any lengths, one after the other; read when they are needed.
        length: samples of them all.

    The other arguments and the errors are those of `separate_track`.

    Returns:
        An iterator of estimates `(n, c, s)`, one after the other, together `length` samples.

    Notebook: 08_evaluation
    """
    if not isinstance(segmentation, Segmentation):
        raise ValueError(
            f"segmentation={segmentation!r}: pass a Segmentation, such as Segmentation(6.0)"
        )
    refuse_training_mode(separator)
    segment, fade = segmentation.samples(separator.sample_rate)
    starts = segment_starts(length, segment, fade, max(segmentation.shifts, 1))
    window = fade_window(min(segment, length), fade)
    precise = (block.to(_at_least_float32(block.dtype)) for block in blocks)
    segments = cut_segments(precise, starts, len(window))
    estimates = separate_batches(separator, segments, segmentation.batch_size)
    return overlap_add(progress(starts), estimates, window)


def refuse_training_mode(separator: nn.Module) -> None:
    """Refuse layers that answer otherwise in training mode: running statistics and dropout.

    Raises:
        ValueError: names the first.
    """
    for module in separator.modules():
        share = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
        drops = audio.is_number(share) and share > 0
        if module.training and (drops or getattr(module, "running_mean", None) is not None):
            raise ValueError(
                f"the separator has {type(module).__name__} in training mode; call its eval() first"
            )


def fade_window(length: int, fade: int) -> Tensor:
    """Ones with a linear ramp of `fade` samples at both ends; never zero.

    >>> fade_window(6, 2).tolist()
    [0.25, 0.75, 1.0, 1.0, 0.75, 0.25]
    """
    ramp = (torch.arange(length) + 0.5) / max(fade, 1)
    return torch.minimum(ramp, ramp.flip(0)).clamp(max=1.0)


def segment_starts(length: int, segment: int, fade: int, shifts: int = 1) -> list[int]:
    """Where segments begin that overlap by `fade` samples; the last one ends with the song.

    With `shifts`, that many rows of segments in one list, evenly shifted against each other.

    >>> segment_starts(100, 40, 10)
    [0, 30, 60]
    >>> segment_starts(105, 40, 10)
    [0, 30, 60, 65]
    >>> segment_starts(25, 40, 10)
    [0]
    >>> segment_starts(105, 40, 10, shifts=2)
    [0, 15, 30, 45, 60, 65]
    """
    last, hop = max(length - segment, 0), segment - fade
    before_last = -(-last * shifts // hop)
    return [*(k * hop // shifts for k in range(before_last)), last]


@torch.inference_mode()
def overlap_add(
    starts: Iterable[int], estimates: Iterable[Tensor], window: Tensor
) -> Iterator[Tensor]:
    """Average segments `(…, s)` where they overlap, weighted by a window `(s,)`.

    Yields:
        `(…, s)`, one after the other, as soon as no later segment can change them.

    Notebook: 08_evaluation

    >>> segments = [torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 5, 6])]
    >>> [block.tolist() for block in overlap_add([0, 2], segments, torch.ones(3))]
    [[1.0, 2.0], [3.5, 5.0, 6.0]]
    """
    total, weight, position = 0.0, 0.0, 0  # sums over one window's length, from `position` on
    for start, estimate in zip(starts, estimates, strict=False):  # a bar closes with its starts
        if step := start - position:
            yield total[..., :step] / weight[:step]
            total, weight = (F.pad(held[..., step:], (0, step)) for held in (total, weight))
            position = start
        window = window.to(estimate)  # device and precision
        total, weight = total + estimate * window, weight + window
    yield total / weight


def cut_segments(blocks: Iterable[Tensor], starts: list[int], size: int) -> Iterator[Tensor]:
    """Overlapping segments `(c, size)` of a mixture that comes in blocks `(c, s)`.

    >>> [s.tolist() for s in cut_segments(torch.arange(6).split(2), [0, 2, 3], 3)]
    [[0, 1, 2], [2, 3, 4], [3, 4, 5]]

    Raises:
        ValueError: the blocks end before the last segment does.

    Notebook: 08_evaluation
    """
    blocks, position = iter(blocks), 0
    held = next(blocks, torch.empty(0))
    for start in starts:
        held, position = held[..., start - position :], start  # no later segment needs them
        while held.shape[-1] < size:
            if (block := next(blocks, None)) is None:
                got, expected = position + held.shape[-1], starts[-1] + size
                raise ValueError(f"the mixture has {got} samples, not length={expected}")
            held = torch.cat([held, block], dim=-1)
        yield held[..., :size]


def separate_batches(
    separator: nn.Module, segments: Iterable[Tensor], batch_size: int
) -> Iterator[Tensor]:
    """Estimates `(n, c, s)` of segments `(c, s)`, `batch_size` at once, fewer if memory runs out.

    Raises:
        torch.OutOfMemoryError: there is no memory even for one segment.

    Notebook: 08_evaluation
    """
    segments = iter(segments)
    waiting = list(islice(segments, batch_size))
    while waiting:
        batch = torch.stack(waiting[:batch_size])
        estimates, done = retreat(partial(_separate, separator, batch), len(batch))
        if done < len(batch):
            batch_size = done
        yield from estimates
        waiting = waiting[done:]
        waiting += islice(segments, max(batch_size - len(waiting), 0))


def _separate(separator: nn.Module, batch: Tensor, size: int) -> Tensor:
    """Estimates `(size, n, c, s)` of the first segments, on their device, in their precision."""
    weights = next(separator.parameters(), batch)
    precise = _at_least_float32(weights.dtype)  # the transform needs that much
    try:
        return separator(batch[:size].to(weights.device, precise)).to(batch)
    except Exception as error:
        if size > 1 or not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(
            f"{weights.device} has no memory for one segment of {batch.shape[-1]} samples; "
            "shorten the segments, or close other programs that use memory"
        ) from error


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """What fades and transforms need: in float16, the first weights of a fade are 0."""
    return torch.promote_types(dtype, torch.float32)


class _Callable(ModuleType):
    __call__ = staticmethod(separate)
    __signature__ = signature(separate)  # without it, the first parameter would be taken for `self`


sys.modules[__name__].__class__ = _Callable  # `inference.separate` is this file or its function
