"""Sound files in blocks, so that memory does not grow with the song: read, resample, write.

Axis letters: `n` stems, `c` channels, `s` samples.

Notebook: 08_evaluation
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import soundfile
import torch
from torch import Tensor

from tfswa_lab import audio
from tfswa_lab.decode import BLOCK, open_sound

VORBIS_BLOCK = 2**12  # samples; more at once overflow the stack of small threads in libvorbis
WAV_BYTES = 2**32 - 2**16  # a plain WAV file counts its bytes with 32 bits


def read_blocks(
    path: str | Path, size: int = BLOCK, start: int = 0, channels: int | None = None
) -> Iterator[Tensor]:
    """Decode a file from front to back, each sample once.

    Args:
        path: of the file.
        size: samples of a block.
        start: first sample.
        channels: more than so many are mixed down by ffmpeg; None keeps them.

    Yields:
        Blocks `(c, s)` of `size` samples or fewer, float32.

    Raises:
        FileNotFoundError: there is no such file.
        TruncatedError: the file is shorter than its header says, or damaged: after its last block.
        ValueError: the file is not audio, is empty, or has NaN or infinite samples.
    """
    with open_sound(path, channels) as sound, closing(sound.blocks(size, start)) as blocks:
        for block in blocks:
            audio.check_finite(block, Path(path))
            yield torch.from_numpy(block)


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
    context = down * math.ceil(audio.REACH * max(1, rate_in / rate_out) / down)
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
    form: str = "WAV",
) -> float:
    """Write one sound file per stem from blocks `(n, c, s)`.

    Args:
        paths: n of them.
        blocks: one after the other; what they have beyond `shape` is left out.
        rate: in Hz.
        shape: channels and samples of each file.
        subtype: one of libsndfile's; "PCM_16" and "PCM_24" clip.
        form: of the files, one of libsndfile's.

    Returns:
        The largest magnitude in any file.

    Raises:
        OSError: a file cannot be written.
        ValueError: a block contains NaN or infinite samples, or all are too short together.
    """
    peak, missing = 0.0, shape[1]
    form = _large_enough(form, shape, subtype)
    with _named_failure(paths[0].parent), ExitStack() as stack:
        files = [
            stack.enter_context(audio.new_file(path, rate, shape[0], form, subtype))
            for path in paths
        ]
        for block in blocks:
            if not missing:
                break
            block = block[..., :missing]
            missing -= block.shape[-1]
            if not block.isfinite().all():
                raise ValueError(f"{paths[0].parent}: a stem would contain NaN or infinite samples")
            peak = max(peak, block.abs().max().item())
            for file, stem in zip(files, block, strict=True):
                for part in stem.split(VORBIS_BLOCK if subtype == "VORBIS" else BLOCK, dim=-1):
                    file.write(_as_written(part, subtype).T.numpy())
    if missing:
        raise ValueError(f"{paths[0].parent}: the stems lack {missing} of {shape[1]} samples")
    return peak


def _as_written(stem: Tensor, subtype: str) -> Tensor:
    """The nearest integers, because libsndfile would round down; floats as they are."""
    if subtype == "PCM_16":
        return audio.to_int16(stem)
    if subtype == "PCM_24":  # in the upper bytes of 32 bits
        return (stem.double() * 2**23).round().clamp(-(2**23), 2**23 - 1).to(torch.int32) * 256
    return stem


def _large_enough(form: str, shape: tuple[int, int], subtype: str) -> str:
    """A WAV format that can count the bytes: RF64 does it with 64 bits."""
    size = shape[0] * shape[1] * {"PCM_16": 2, "PCM_24": 3}.get(subtype, 4)
    return "RF64" if form == "WAV" and size >= WAV_BYTES else form


@contextmanager
def _named_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except (soundfile.LibsndfileError, OSError) as error:
        raise OSError(
            f"a stem cannot be written into {folder} ({error}); is the disk full, or the folder "
            "read-only?"
        ) from error
