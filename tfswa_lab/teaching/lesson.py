"""What lessons share: parameters, where the music is, versions, a song's excerpt, what fits a GPU.

Axis letters: `n` stems, `c` channels, `s` samples.

Notebook: 00_start_here
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tfswa_lab import __version__
from tfswa_lab.audio import SAMPLE_RATE, STEMS, rms_db

SILENCE_DB = -60.0  # a stem below this level has nothing to teach
SHARE_OF_FREE = 0.9  # of a GPU's memory that a step may take: workspaces are in no prediction

# Type of a lesson's parameter, the same in words, and a value for the command line.
PARAMETERS = {
    "quick": (bool, "True or False", "False"),
    "seed": (int, "a whole number", "0"),
    "device": (str | torch.device, "the name of a device", "cpu"),
    "data_root": (str, "the name of a folder", "/data/MUSDB18-HQ"),
}
A_NUMBER = (int | float, "a finite number", "8.0")  # what only one lesson has


class Excerpt(NamedTuple):
    """A few seconds of one track: `mixture` `(2, s)` and `stems` `(n, 2, s)`."""

    track: str
    start_seconds: float
    mixture: Tensor
    stems: Tensor


def check_parameters(**parameters: object) -> None:
    """Refuse a parameter of the wrong type, which would run another lesson than the one asked for.

    papermill reads `-p quick false` as the text "false", and a text is true.

    Args:
        parameters: all of a lesson's, by name. Those that not all lessons have are numbers.

    Raises:
        ValueError: one has the wrong type, or is no finite number.

    >>> check_parameters(quick=True, seed=0, device="auto", data_root="")
    """
    for name, value in parameters.items():
        kind, in_words, example = PARAMETERS.get(name, A_NUMBER)
        right_type = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not right_type or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(
                f"{name}={value!r} ({type(value).__name__}) must be {in_words}, such as {example}; "
                f"with papermill: -p {name} {example}"
            )


def lesson_root(data_root: str) -> Path:
    """The folder of songs a lesson works on: the embedded band, or your own.

    Args:
        data_root: "" for the band (made on first use), else a MUSDB18-shaped folder:
            `train/` and `test/`, one folder per track in each.

    Raises:
        FileNotFoundError: `data_root` is no such folder.
    """
    if not data_root:
        from tfswa_lab.data.band import ensure_band

        return Path(ensure_band())
    root = Path(data_root).expanduser().resolve()
    if not ((root / "train").is_dir() and (root / "test").is_dir()):
        raise FileNotFoundError(
            f"data_root={data_root!r} ({root}) must contain the folders train/ and test/ with one "
            'folder per track; data_root = "" is the embedded band, which needs no download'
        )
    return root


def versions(device: torch.device, packages: Sequence[str] = ("torch", "numpy")) -> str:
    """One line that makes a bug report answerable: versions and device."""
    found = [f"tfswa-lab {__version__}", *(f"{name} {version(name)}" for name in packages)]
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return " · ".join([f"Python {platform.python_version()}", *found, f"{device} ({hardware})"])


def fits(make_step: Callable[[], Callable[[], Any]], device: torch.device, **choices: Any) -> bool:
    """Whether a step fits in nine tenths of the GPU's free memory; prints a line if it does not.

    The memory is predicted, so this takes no memory of the GPU.

    Args:
        make_step: as for `memory.predict.predict`.
        device: where the step is to run; on the CPU it always fits.
        choices: the other arguments of `predict`.

    Notebook: 06_leak_diagnosis
    """
    from tfswa_lab.memory.gauges import device_memory
    from tfswa_lab.memory.predict import predict
    from tfswa_lab.memory.sizes import format_bytes

    if device.type != "cuda":
        return True
    needed = predict(make_step, **choices).peak
    torch.cuda.empty_cache()  # else what torch keeps for later tensors would not count as free
    free = device_memory(device).free
    if needed <= SHARE_OF_FREE * free:
        return True
    print(f"does not fit this GPU: would take {format_bytes(needed)}, {format_bytes(free)} is free")
    return False


def loudest_excerpt(tracks: Any, stem: str = "vocals", seconds: float = 6.0) -> Excerpt:
    """The loudest excerpt of one stem, in the first track where all stems can be heard in it.

    Instrumentals have silent vocals, and songs begin with long introductions: a fixed excerpt
    would often have nothing to show.

    Args:
        tracks: a `MUSDB18Dataset` of full tracks (`segment_seconds=None`) with all four stems, at
            44 100 Hz (`sample_rate=44_100` resamples others).
        stem: whose level decides.
        seconds: length of the excerpt; a shorter track is taken whole.

    Raises:
        ValueError: the stem is unknown, the tracks have another rate, or none has such an excerpt.

    Notebook: 01_sound_to_spectrogram
    """
    if stem not in STEMS:
        raise ValueError(f"stem={stem!r} must be one of {', '.join(STEMS)}")
    if tracks.sample_rate != SAMPLE_RATE:
        raise ValueError(f"tracks at {tracks.sample_rate} Hz; pass sample_rate=44_100 to resample")
    for index in range(len(tracks)):
        item = tracks[index]
        start = _loudest_start(item["stems"][STEMS.index(stem)], round(seconds * SAMPLE_RATE))
        cut = slice(start, start + round(seconds * SAMPLE_RATE))
        stems = item["stems"][..., cut]
        if min(map(rms_db, stems)) > SILENCE_DB:
            return Excerpt(item["track"], start / SAMPLE_RATE, item["mixture"][..., cut], stems)
    raise ValueError(
        f"in none of {len(tracks)} tracks can all of {', '.join(STEMS)} be heard where the {stem} "
        "are loudest; choose another stem, split or data_root"
    )


def _loudest_start(waveform: Tensor, length: int, step: int = SAMPLE_RATE // 10) -> int:
    """First sample of the window of `length` with the most energy, on a grid of `step`."""
    energy = waveform.double().square().sum(0).cumsum(0)
    energy = torch.cat([energy.new_zeros(1), energy])
    starts = torch.arange(0, max(1, waveform.shape[-1] - length + 1), step)
    ends = (starts + length).clamp(max=waveform.shape[-1])
    return int(starts[(energy[ends] - energy[starts]).argmax()])
