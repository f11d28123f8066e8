"""Sound files in blocks, so that memory does not grow with the song: read, resample, write.

Axis letters: `n` stems, `c` channels, `s` samples.

Notebook: 08_evaluation
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import soundfile
import torch
from torch import Tensor

from tfswa_lab import audio

BLOCK = 2**18  # samples; 6 s
REACH = 12  # periods of the lower rate: no filter of `audio.resample` is longer to either side
WAV_BYTES = 2**32 - 2**16  # a plain WAV file counts its bytes with 32 bits


def read_blocks(path: str | Path, size: int = BLOCK) -> Iterator[Tensor]:
    """Decode a file from front to back, each sample once.

    Yields:
        Blocks `(c, s)` of `size` samples, the last one of fewer, float32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not audio, is empty, damaged, or has NaN or infinite samples.
    """
    audio.read(path, frames=1)  # its errors name a file that is missing or no audio
    position = 0
    try:
        with soundfile.SoundFile(path) as file:
            while len(samples := file.read(size, dtype="float32", always_2d=True)):
                block = torch.from_numpy(samples.T.copy())
                if not block.isfinite().all():
                    raise ValueError(
                        f"{path} contains NaN or infinite samples; export it again as 16-bit PCM"
                    )
                yield block
                position += len(samples)
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"{path} is damaged after sample {position} ({error}); copy or export it again"
        ) from error


def resample_blocks(
    blocks: Iterable[Tensor], rate_in: int, rate_out: int, size: int = BLOCK
) -> Iterator[Tensor]:
    """Change the rate of blocks `(…, s)` as `audio.resample` changes that of the whole.

    Blocks are resampled with what the filter sees on both sides of them, which is then cut off.
    They begin at multiples of the reduced rate, 147 for 44 100 : 48 000, where the filter's
    phases begin anew.

    Args:
        blocks: any lengths, one after the other.
        rate_in: their rate in Hz.
        rate_out: the rate wanted in Hz.
        size: samples to resample at once, at least; more for odd pairs of rates.

    Yields:
        Blocks `(…, s)`, ⌈s · rate_out / rate_in⌉ samples for all s together.
    """
    if rate_in == rate_out:
        yield from blocks
        return
    divisor = math.gcd(rate_in, rate_out)
    up, down = rate_out // divisor, rate_in // divisor
    context = down * math.ceil(REACH * max(1, rate_in / rate_out) / down)
    size = down * math.ceil(max(size, context) / down)
    blocks, before = iter(blocks), 0  # samples held from before the next block
    held = next(blocks)
    for block in blocks:
        held = torch.cat([held, block], dim=-1)
        while held.shape[-1] >= before + size + context:
            end = before + size
            resampled = audio.resample(held[..., : end + context], rate_in, rate_out)
            yield resampled[..., before * up // down : end * up // down]
            held, before = held[..., end - context :], context
    yield audio.resample(held, rate_in, rate_out)[..., before * up // down :]


def write_blocks(
    paths: Sequence[Path],
    blocks: Iterable[Tensor],
    rate: int,
    shape: tuple[int, int],
    subtype: str,
) -> float:
    """Write one WAV file per stem from blocks `(n, c, s)`.

    Args:
        paths: n of them.
        blocks: one after the other; what they have beyond `shape` is left out.
        rate: in Hz.
        shape: channels and samples of each file.
        subtype: "FLOAT" or "PCM_16", which clips.

    Returns:
        The largest magnitude in any file.

    Raises:
        OSError: a file cannot be written.
        ValueError: a block contains NaN or infinite samples, or all are too short together.
    """
    peak, missing = 0.0, shape[1]
    with ExitStack() as stack:
        files = [stack.enter_context(_wav_file(path, rate, shape, subtype)) for path in paths]
        for block in blocks:
            if not missing:
                break
            block = block[..., :missing]
            missing -= block.shape[-1]
            if not block.isfinite().all():
                raise ValueError(f"{paths[0]} would contain NaN or infinite samples")
            peak = max(peak, block.abs().max().item())
            for file, stem in zip(files, block, strict=True):
                file.write((audio.to_int16(stem) if subtype == "PCM_16" else stem).T.numpy())
    if missing:
        raise ValueError(f"{paths[0]}: the blocks lack {missing} of {shape[1]} samples")
    return peak


@contextmanager
def _wav_file(
    path: Path, rate: int, shape: tuple[int, int], subtype: str
) -> Iterator[soundfile.SoundFile]:
    channels, samples = shape
    size = channels * samples * {"PCM_16": 2, "FLOAT": 4}[subtype]
    form = "WAV" if size < WAV_BYTES else "RF64"  # counts its bytes with 64 bits
    try:
        with soundfile.SoundFile(path, "w", rate, channels, subtype, format=form) as file:
            yield file
    except soundfile.LibsndfileError as error:
        raise OSError(
            f"{path} cannot be written ({error}); is the disk full, or the folder read-only?"
        ) from error
