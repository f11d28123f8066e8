"""Read, write, resample and measure sound; `decode` does the reading.

Axis letters: `c` channels, `s` samples.

Notebook: 01_sound_to_spectrogram
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import scipy.signal
import scipy.special
import soundfile
import torch
from torch import Tensor
from torch.nn import functional as F

from tfswa_lab.decode import decode
from tfswa_lab.decode import ensure_ffmpeg as ensure_ffmpeg
from tfswa_lab.durable import parts_of

SAMPLE_RATE = 44_100
STEMS = ("vocals", "drums", "bass", "other")
LARGEST_RATIO = 2_000  # of two rates, reduced; 48 000 : 44 100 is 160 : 147
LARGEST_FACTOR = 400_000  # the same where only one of its sides counts
# The filter of `resample`: it is flat up to 0.93 of the lower rate's limit and ends below 1.02.
# torchaudio's own choice, 6 zero crossings, passes a tone 10 % above the limit at −14 dB.
ZERO_CROSSINGS, ROLLOFF, KAISER_BETA = 96, 0.95, 12.0
REACH = math.ceil(ZERO_CROSSINGS / ROLLOFF)  # periods of the lower rate to either side
SHORTEST, LONGEST = 0.001, 1e6  # seconds: some samples of any song, and more than one can have


def read(path: str | Path, start: int = 0, frames: int = -1) -> tuple[Tensor, int]:
    """Read a part of a sound file.

    WAV, AIFF and FLAC are read from there on, all others are decoded from their beginning.

    Args:
        path: any file that libsndfile reads (WAV, AIFF, FLAC, Ogg, MP3 …) or ffmpeg (m4a, webm …).
        start: first sample.
        frames: number of samples, -1 for the rest of the file.

    Returns:
        Waveform `(c, s)`, float32 in [-1, 1], and its sample rate in Hz.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not audio, is empty or truncated, or contains NaN or infinite
            samples.
    """
    path = Path(path)
    samples, rate = decode(path, start, frames)
    if not samples.size:
        raise ValueError(f"{path} holds no samples from sample {start} on; export it again")
    check_finite(samples, path)
    return torch.from_numpy(samples), rate


def check_finite(samples: np.ndarray, path: Path) -> None:
    """Refuse what a damaged or wrongly exported file can hold.

    Raises:
        ValueError: a sample is NaN or infinite.
    """
    if not np.isfinite(samples).all():
        raise ValueError(f"{path} contains NaN or infinite samples; export it again as 16-bit PCM")


def write(path: str | Path, waveform: Tensor, rate: int = SAMPLE_RATE) -> Path:
    """Write a waveform `(c, s)` as 16-bit audio, completely or not at all.

    The file is written under another name and renamed, so an interrupted run leaves no half
    file. Samples beyond ±1 are an error, because 16-bit audio would clip them.

    Raises:
        ValueError: the waveform is not `(c, s)`, not finite, or exceeds [-1, 1]; or libsndfile
            does not know the file type or cannot write it at this rate.
    """
    path = Path(path)
    if waveform.ndim != 2:
        raise ValueError(f"expected a waveform (channels, samples), got {tuple(waveform.shape)}")
    if not torch.isfinite(waveform).all():
        raise ValueError(f"{path}: the waveform contains NaN or infinite samples")
    peak = waveform.abs().max().item() if waveform.numel() else 0.0
    if peak > 1.0:
        raise ValueError(f"{path}: peak {peak:.3f} would clip; scale the waveform below 1.0 first")
    path.parent.mkdir(parents=True, exist_ok=True)
    form = path.suffix[1:].upper()
    try:
        with (
            parts_of([path]) as (part,),
            new_file(part, rate, len(waveform), form, "PCM_16") as file,
        ):
            file.write(to_int16(waveform).T.numpy())
    except (soundfile.LibsndfileError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be written as 16-bit audio at {rate} Hz ({error}); "
            "use a name that ends in .wav or .flac and a usual rate"
        ) from error
    return path


@contextmanager
def new_file(
    path: Path, rate: int, channels: int, form: str, subtype: str
) -> Iterator[soundfile.SoundFile]:
    """A sound file to write to, of a format and subtype of libsndfile, under any name."""
    with path.open("wb") as file:
        # libsndfile refuses long paths and other bytes than UTF-8; a full disk is an error only
        # for a descriptor, and Windows knows no foreign ones.
        target = file if os.name == "nt" else file.fileno()
        with soundfile.SoundFile(
            target, "w", rate, channels, subtype, format=form, closefd=False
        ) as sound:
            yield sound


def to_int16(waveform: Tensor) -> Tensor:
    """Samples in [-1, 1] as the nearest 16-bit integers, on the CPU.

    The floats that `read` gives for a 16-bit file become the same integers again. libsndfile would
    round floats down.

    >>> to_int16(torch.tensor([-1.0, 0.0, 2.6 / 32_768, 1.0])).tolist()
    [-32768, 0, 3, 32767]
    """
    return (waveform.detach().cpu().float() * 32_768).round().clamp(-32_768, 32_767).to(torch.int16)


@lru_cache(maxsize=8)
def _resampler(
    rate_in: int, rate_out: int, dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    # Imported here, so that a broken torchaudio breaks only resampling.
    from torchaudio.transforms import Resample

    # The filter is computed in this precision, which should be better than float32.
    shape = ("sinc_interp_kaiser", ZERO_CROSSINGS, ROLLOFF, KAISER_BETA)
    return Resample(rate_in, rate_out, *shape, dtype=torch.float64).to(device, dtype)


def resample(waveform: Tensor, rate_in: int, rate_out: int) -> Tensor:
    """Change the sample rate of `(…, s)` with one cached windowed-sinc filter per pair of rates.

    To another rate and back, a tone at two thirds of the lower rate's limit keeps 129 dB of SNR,
    one at 0.9 of it 117 dB; a tone 10 % above the limit is 136 dB lower (`benchmarks/resamplers.py`
    compares others). Rates without a small ratio, such as 44 099 Hz, pass no gradient, and go
    through scipy on the CPU: torchaudio's filter would take GiB.

    Args:
        waveform: `(…, s)`, any floating type.
        rate_in: its rate in Hz.
        rate_out: the rate wanted in Hz.

    Returns:
        `(…, ⌈s · rate_out / rate_in⌉)` on the same device.

    Raises:
        ValueError: a rate is not a positive whole number, the rates are far from any ratio, or
            the samples are no floats.

    >>> resample(torch.zeros(2, 48_000), 48_000, 16_000).shape
    torch.Size([2, 16000])
    """
    if not all(is_number(rate) and rate > 0 and rate % 1 == 0 for rate in (rate_in, rate_out)):
        raise ValueError(
            f"rates must be positive whole numbers of Hz, got {rate_in!r}, {rate_out!r}"
        )
    if not waveform.is_floating_point():
        raise ValueError(f"expected a waveform of floats, got {waveform.dtype}; convert it first")
    rate_in, rate_out = int(rate_in), int(rate_out)
    if rate_in == rate_out or not waveform.shape[-1]:
        return waveform
    if max(rate_in, rate_out) // math.gcd(rate_in, rate_out) > LARGEST_RATIO:
        return _resample_odd(waveform, rate_in, rate_out)
    # torchaudio counts in float32: from 2²⁴ samples (six minutes) on, the last may be missing.
    length = -(-waveform.shape[-1] * rate_out // rate_in)
    padded = F.pad(waveform, (0, 100 * rate_in // rate_out + 1))
    resampler = _resampler(rate_in, rate_out, waveform.dtype, waveform.device)
    return resampler(padded)[..., :length]


def _resample_odd(waveform: Tensor, rate_in: int, rate_out: int) -> Tensor:
    """The same by scipy, whose filter does not grow with the product of the rates."""
    divisor = math.gcd(rate_in, rate_out)
    up, down = rate_out // divisor, rate_in // divisor
    if max(up, down) > LARGEST_FACTOR:
        raise ValueError(
            f"{rate_in} Hz cannot be resampled to {rate_out} Hz: they have no small ratio, and the "
            "filter would take GiB; is the rate right?"
        )
    samples = scipy.signal.resample_poly(
        waveform.detach().cpu().double().numpy(), up, down, axis=-1, window=_filter(max(up, down))
    )
    return torch.from_numpy(samples).to(waveform)


@lru_cache(maxsize=2)
def _filter(factor: int) -> np.ndarray:
    """The filter of `resample` with `factor` values to a period of the lower rate."""
    reach = math.ceil(ZERO_CROSSINGS / ROLLOFF * factor)
    crossings = np.arange(-reach, reach + 1) * ROLLOFF / factor
    taper = np.sqrt(np.clip(1 - (crossings / ZERO_CROSSINGS) ** 2, 0, None))
    window = scipy.special.i0(KAISER_BETA * taper) / scipy.special.i0(KAISER_BETA)
    return np.sinc(crossings) * window * ROLLOFF / factor


def to_stereo(waveform: Tensor) -> Tensor:
    """Mono `(1, s)` twice, stereo `(2, s)` as it is.

    Raises:
        ValueError: there are more than two channels, and no rule says how to mix them.
    """
    if waveform.shape[-2] not in (1, 2):
        raise ValueError(f"expected 1 or 2 channels, got {waveform.shape[-2]}; downmix first")
    return waveform.expand(*waveform.shape[:-2], 2, waveform.shape[-1])


def to_channels(waveform: Tensor, channels: int) -> Tensor:
    """Convert to mono (1) by averaging, or to stereo (2) by doubling a single channel.

    >>> to_channels(torch.tensor([[1.0], [0.0]]), 1)
    tensor([[0.5000]])

    Raises:
        ValueError: the waveform has more than two channels.

    Notebook: 03_tfswa_unet
    """
    stereo = to_stereo(waveform)
    return stereo if channels == 2 else stereo.mean(-2, keepdim=True)


def check_seconds(name: str, value: float) -> None:
    """Refuse a duration that makes no sense.

    Raises:
        ValueError: it is shorter than a millisecond, infinite, or not a number.
    """
    if not (is_number(value) and SHORTEST <= value <= LONGEST):
        raise ValueError(f"{name}={value!r} must be seconds, from {SHORTEST} to {LONGEST:.0f}")


def is_number(value: object, kind: type = Real) -> bool:
    """Whether a value is a number of Python or numpy, of a kind such as `Integral`; a bool is not.

    >>> is_number(np.int64(3)), is_number(True), is_number("3")
    (True, False, False)
    """
    return isinstance(value, kind) and not isinstance(value, bool)


def plain_number(value: Real) -> int | float:
    """A number of Python or numpy as Python's, because JSON does not know those of numpy.

    >>> plain_number(np.int64(3)), plain_number(np.float32(0.5))
    (3, 0.5)
    """
    return int(value) if is_number(value, Integral) else float(value)


def decibels(signal: Tensor, noise: Tensor) -> Tensor:
    """The ratio of two energies in dB, infinite where there is no noise.

    >>> decibels(torch.tensor([1.0, 1.0]), torch.tensor([0.01, 0.0]))
    tensor([20., inf])

    Notebook: 08_evaluation
    """
    return (10 * (signal / noise).log10()).masked_fill(noise == 0, torch.inf)


def rms_db(waveform: Tensor) -> float:
    """Root-mean-square level in dB relative to full scale; silence is -inf.

    >>> round(rms_db(0.5 * torch.ones(2, 100)), 2)
    -6.02

    Notebook: 00_start_here
    """
    return 20 * waveform.cpu().double().square().mean().sqrt().log10().item()


def peak_db(waveform: Tensor) -> float:
    """Peak level in dB relative to full scale; silence is -inf.

    >>> round(peak_db(torch.tensor([[0.0, -0.5]])), 2)
    -6.02

    Notebook: 00_start_here
    """
    return 20 * waveform.cpu().double().abs().max().log10().item()
