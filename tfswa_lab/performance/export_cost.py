"""What an exported program costs: bytes, seconds, and decibels on songs.

Axis letters: `n` stems, `c` channels, `s` samples.

Notebook: 10_staged_pipelines
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tfswa_lab import audio
from tfswa_lab.data.band import ensure_band
from tfswa_lab.data.musdb import stem_parts
from tfswa_lab.data.tracks import Track, find_tracks
from tfswa_lab.evaluation.ratios import usdr
from tfswa_lab.inference.separate import separate_track
from tfswa_lab.models.exported import Program, needed, open_program
from tfswa_lab.models.separator import Separator
from tfswa_lab.models.storage import from_program
from tfswa_lab.performance.precision import quiet
from tfswa_lab.performance.timing import seconds_of

SONGS, SONG_SECONDS = 3, 6.0  # test songs that are separated, and how much of each
TIMES = 3  # that a call is timed; the fastest counts


@dataclass(frozen=True)
class Variant:
    """One way to run a network.

    Args:
        name: of the way.
        bytes: of its file; of parameters and buffers where there is none.
        seconds: of one call; None if it was not timed.
        sdr: mean over songs and stems in dB; None if it was not measured.
    """

    name: str
    bytes: int
    seconds: float | None = None
    sdr: float | None = None

    def change(self, before: Variant) -> float | None:
        """In dB, negative for a loss; None if one was not measured."""
        return None if None in (self.sdr, before.sdr) else self.sdr - before.sdr


class Excerpt(NamedTuple):
    """A piece of a song: mixture `(c, s)`, stems `(n, c, s)`."""

    mixture: Tensor
    stems: Tensor


def read_excerpts(separator: nn.Module, songs: str | Path | None = None) -> list[Excerpt]:
    """The middle of the first test songs, at the separator's rate and with its channels.

    Args:
        separator: whose stems are wanted.
        songs: a MUSDB18-shaped tree; the band's if None.

    Raises:
        FileNotFoundError: there are no songs.
        ValueError: it is no separator, or has stems that no song has.
    """
    if not isinstance(separator, Separator):
        raise ValueError(f"{type(separator).__name__} is no Separator and separates no song")
    parts = stem_parts(separator.stems)
    sources = _sources(parts)
    tracks = find_tracks(ensure_band() if songs is None else songs, "test", sources)
    return [_excerpt(separator, track, parts) for track in tracks[:SONGS]]


def _excerpt(separator: Separator, track: Track, parts: dict[str, tuple[str, ...]]) -> Excerpt:
    rate = separator.sample_rate
    whole, wanted = track.length(rate), round(SONG_SECONDS * rate)
    start = max(0, (whole - wanted) // 2)
    heard = track.read(_sources(parts), start, min(wanted, whole), rate)
    heard = {x: audio.to_channels(sound, separator.audio_channels) for x, sound in heard.items()}
    stems = [sum(heard[part] for part in names) for names in parts.values()]
    return Excerpt(heard["mixture"], torch.stack(stems))


def _sources(parts: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    return ("mixture", *dict.fromkeys(part for names in parts.values() for part in names))


def mean_sdr(separator: nn.Module, excerpts: list[Excerpt]) -> float | None:
    """Of all stems that are heard; None without excerpts."""
    if not excerpts:
        return None
    ratios = [usdr(song.stems, separate_track(separator, song.mixture)) for song in excerpts]
    return torch.cat(ratios).nanmean().item()


def seconds_per_call(function: Callable[[Tensor], Any], x: Tensor) -> float:
    """Of the fastest of a few calls, after one that warms up."""
    function(x)
    return min(seconds_of(partial(function, x)) for _ in range(TIMES))


def tensor_bytes(module: nn.Module) -> int:
    """Of parameters and buffers."""
    return sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))


def of_file(program: Program, x: Tensor, excerpts: list[Excerpt], name: str) -> Variant:
    """An exported file."""
    sdr = mean_sdr(from_program(program).eval(), excerpts) if excerpts else None
    return Variant(name, program.path.stat().st_size, seconds_per_call(program.run, x), sdr)


def of_network(
    separator: Separator, network: nn.Module, excerpts: list[Excerpt], name: str
) -> Variant:
    """A separator in eager mode with another network in it."""
    other = copy.copy(separator)
    other._modules = separator._modules | {"model": network}
    return Variant(name, tensor_bytes(network), sdr=mean_sdr(other, excerpts))


def dynamic_int8(plain: Path, file: Path, metadata: dict[str, Any]) -> Program:
    """Let onnxruntime quantise an ONNX file: activations as well, when it runs.

    Weights are unsigned, because onnxruntime has no convolution of signed ones.

    Args:
        plain: of float32.
        file: that is written.
        metadata: of the program, which the tool drops.
    """
    quantization = needed("onnxruntime.quantization")
    with quiet():
        quantization.quantize_dynamic(plain, file, weight_type=quantization.QuantType.QUInt8)
    return replace(open_program(file), metadata=metadata)
