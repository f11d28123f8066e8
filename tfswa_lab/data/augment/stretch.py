"""Time, pitch and both at once: a phase vocoder and a resampler.

Axis letters: `c` channels, `s` samples, `f` bins, `t` frames, `j` jumps. A shape `(…, c, s)` may
hold several stems of one segment; channels are those of one stem.

Notebook: 07_training
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

from tfswa_lab.audio import resample
from tfswa_lab.stft import STFTProcessor

LOBE = 5  # bins: the main lobe of the Hann window, where one tone sounds


def simple_ratio(factor: float) -> Fraction:
    """The nearest fraction with a denominator up to 100: a resampler needs that many filters.

    Between 0.5 and 2 it is 9 cents off at worst. An exact ratio of two rates in Hz that share no
    divisor would take gigabytes.

    >>> simple_ratio(2 ** (2 / 12))
    Fraction(55, 49)
    """
    return Fraction(factor).limit_denominator(100)


def change_speed(waveform: Tensor, factor: float | Fraction) -> Tensor:
    """Play a waveform faster: duration divided, and all frequencies multiplied, by the factor.

    Args:
        waveform: `(…, s)`.
        factor: rounded to its `simple_ratio`.

    Returns:
        `(…, ⌈s / factor⌉)`.

    >>> change_speed(torch.zeros(2, 44_100), 1.05).shape
    torch.Size([2, 42000])
    """
    ratio = simple_ratio(factor)
    return resample(waveform, ratio.numerator, ratio.denominator)


def pitch_shift(waveform: Tensor, semitones: float, n_fft: int = 2048) -> Tensor:
    """Move the pitch and keep the time: stretch by the ratio of frequencies, then play faster.

    Args:
        waveform: `(…, c, s)`.
        semitones: upwards.
        n_fft: window of the phase vocoder in samples.

    Returns:
        `(…, c, s)`; formants move with the pitch.
    """
    samples = waveform.shape[-1]
    ratio = simple_ratio(2 ** (semitones / 12))
    longer = looped(waveform, samples + n_fft)  # so that the last window has something to read
    return change_speed(time_stretch(longer, float(ratio), n_fft), ratio)[..., :samples]


def time_stretch(waveform: Tensor, factor: float, n_fft: int = 2048) -> Tensor:
    """Change the duration and keep the pitch, with a phase vocoder that repeats or omits frames.

    A moment lands within a hop of its place (12 ms). Music loses some 0.5 dB, more where drums hit
    the splices. We do not use the phase vocoders of torchaudio and librosa: they turn each bin
    on its own, which costs more than 2 dB on real music (`tests/data/test_augment_stretch.py`).

    Args:
        waveform: `(…, c, s)`.
        factor: of the duration; above 1 is slower.
        n_fft: window in samples, 46 ms of 44 100 Hz by default.

    Returns:
        `(…, c, round(s · factor))`.

    Raises:
        ValueError: the factor is not between 0.25 and 4.

    >>> time_stretch(torch.zeros(2, 44_100), 1.1).shape
    torch.Size([2, 48510])
    """
    if not 0.25 <= factor <= 4:
        raise ValueError(f"factor={factor}: stretch by 0.25 to 4, further needs another method")
    stft = STFTProcessor(n_fft, n_fft // 4)
    samples = round(waveform.shape[-1] * factor)
    frames = stft(waveform).mT  # (…, c, t, f): a view in which each frame is contiguous
    return stft.istft(_stretched(frames, factor, 1 + samples // stft.hop_length).mT, samples)


def _stretched(frames: Tensor, factor: float, count: int) -> Tensor:
    """Frames `(…, c, t, f)` of a spectrogram to `count` frames, `factor` times as slow.

    Frames are copied in runs. Where one is repeated or left out, all that follow are turned in
    phase, so as to go on from the frame that was due: the next one of the original.
    """
    last = frames.shape[-2] - 1
    place = (torch.arange(count, dtype=torch.float64) / factor).round().long().clamp(max=last)
    is_jump = F.pad(place.diff() != 1, (1, 0))
    jumps = is_jump.nonzero()[:, 0]
    due = frames[..., (place[jumps - 1] + 1).clamp(max=last), :]
    turns = _turns((due * frames[..., place[jumps], :].conj()).sum(-3))
    return frames[..., place, :] * turns[..., None, is_jump.cumsum(0), :]


def _turns(match: Tensor) -> Tensor:
    """Phasors `(…, 1 + j, f)` for the runs, from the match `(…, j, f)` of due and coming frame.

    A tone fills several bins, which must turn together: turned one by one they drift apart, and
    music loses about 3 dB. So every bin takes the turn that fits its neighbourhood best. Channels
    share a turn, which keeps the stereo image.

    Source: after Laroche and Dolson, "Improved phase vocoder time-scale modification of audio",
    IEEE TSAP 1999 (there the bins around a peak follow the peak).
    """
    turns = [match.new_ones(*match.shape[:-2], match.shape[-1])]
    for jump in match.unbind(-2):
        fit = turns[-1] * jump
        angle = torch.atan2(_near(fit.imag), _near(fit.real))
        turns.append(torch.polar(torch.ones_like(angle), angle))
    return torch.stack(turns, -2)


def _near(x: Tensor) -> Tensor:
    """Mean over `LOBE` neighbours along the last axis."""
    return F.avg_pool1d(x.reshape(-1, x.shape[-1]), LOBE, 1, LOBE // 2).reshape(x.shape)


def looped(waveform: Tensor, samples: int) -> Tensor:
    """The first samples of a waveform `(…, s)` that starts again where it ends.

    >>> looped(torch.tensor([1, 2, 3]), 5)
    tensor([1, 2, 3, 1, 2])
    """
    return waveform[..., torch.arange(samples) % waveform.shape[-1]]
