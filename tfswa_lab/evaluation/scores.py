"""The scores of songs, and the files that hold them, so that nothing is scored twice.

    OUTPUT/SPLIT/TRACK.json                 scores of the estimates
    OUTPUT/SPLIT.songs.txt                  names of all songs that are to be scored
    OUTPUT/bounds/BOUND/SPLIT/TRACK.json    of the floor (mixture) and the ceilings (irm, mwf)

A song's file is museval's JSON, and under a key of our own what museval lacks:
`museval.EvalStore().add_eval_dir(OUTPUT)` reads those of the test split. A frame without a value is
NaN, as museval writes it, though strict JSON has no such number; our own key is strict.

Notebook: 08_evaluation
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from torch import Tensor

from tfswa_lab.durable import write_whole
from tfswa_lab.evaluation.bsseval import ignoring_nan

ESTIMATES = "estimates"  # scored besides the bounds "mixture", "irm" and "mwf"
RATIOS = ("SDR", "ISR", "SIR", "SAR")  # of frames
WHOLE_RATIOS = ("uSDR", "SI-SDR")  # of whole songs
OURS = "tfswa_lab"  # the key
DECIMALS = 5  # museval's; bits beyond them depend on the number of threads

Ratios = dict[str, dict[str, float]]  # stem → name of a ratio → dB


@dataclass(frozen=True)
class TrackScores:
    """Scores of one set of estimates of one song, and everything that they depend on.

    Args:
        track: name of the song.
        frames: stem → SDR, ISR, SIR, SAR → dB of each frame; NaN for none.
        whole: stem → uSDR, SI-SDR → dB of the whole song.
        window: length of a frame in seconds.
        hop: from one frame to the next, in seconds.
        settings: everything that the numbers depend on, except the files.
        files: SHA-256 of each file.
        notes: why a number is missing, and how the estimates were changed.
        seconds: how much of the song was scored.
    """

    track: str
    frames: dict[str, dict[str, list[float]]]
    whole: Ratios
    window: float
    hop: float
    settings: dict
    files: dict[str, str]
    notes: tuple[str, ...]
    seconds: float

    @property
    def medians(self) -> Ratios:
        """Medians over the frames that have a value, NaN where none has."""
        return {
            stem: {
                name: float(ignoring_nan(np.nanmedian, values)) for name, values in ratios.items()
            }
            for stem, ratios in self.frames.items()
        }

    def comparable(self, other: TrackScores) -> bool:
        """Whether both are of the same frames of the same stems of the same audio."""
        same = ("window", "hop", "seconds")
        audio = self.files.keys() & other.files.keys()
        return (
            all(getattr(self, name) == getattr(other, name) for name in same)
            and self.frames.keys() == other.frames.keys()
            and all(self.files[name] == other.files[name] for name in audio)
        )


def frames_by_stem(
    ratios: Mapping[str, Tensor], stems: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """Ratios of frames `(n, m)` as museval stores them: rounded, NaN where they are infinite."""
    return {
        stem: {name: _rounded(values[i].tolist()) for name, values in ratios.items()}
        for i, stem in enumerate(stems)
    }


def _rounded(values: list[float]) -> list[float]:
    return [round(x, DECIMALS) if math.isfinite(x) else math.nan for x in values]


def whole_by_stem(ratios: Mapping[str, Tensor], stems: Sequence[str]) -> Ratios:
    """Ratios of whole songs `(n,)`, rounded as well."""
    return {
        stem: {name: round(values[i].item(), DECIMALS) for name, values in ratios.items()}
        for i, stem in enumerate(stems)
    }


@dataclass(frozen=True)
class Folders:
    """Where the scores lie.

    Args:
        output: of the estimates.
        bounds: of floor and ceilings; evaluations of several models can share it.
        split: `train`, `valid` or `test`.

    Raises:
        NotADirectoryError: one of them is a file.
        ValueError: they are the same.
    """

    output: Path
    bounds: Path
    split: str

    def __post_init__(self):
        for folder in (self.output, self.bounds):
            if folder.exists() and not folder.is_dir():
                raise NotADirectoryError(f"{folder} is a file; choose a folder for the scores")
        if self.output.resolve() == self.bounds.resolve():
            raise ValueError(
                f"bounds_dir={self.bounds} is the output folder itself; floor and ceilings need "
                f"one of their own, e.g. {self.bounds / 'bounds'}"
            )

    @classmethod
    def of(cls, output_dir: str | Path, bounds_dir: str | Path | None, split: str) -> Folders:
        """With the bounds in `output_dir/bounds` if `bounds_dir` is None."""
        return cls(Path(output_dir), Path(bounds_dir or Path(output_dir, "bounds")), split)

    def path(self, method: str, track: str) -> Path:
        """The file of the scores of a song."""
        folder = self.output if method == ESTIMATES else self.bounds / method
        return folder / self.split / f"{track}.json"

    def holds(self, method: str) -> bool:
        """Whether there is a folder of scores of this method."""
        return self.path(method, "").parent.is_dir()

    def scored(self) -> list[Path]:
        """The files of the estimates that are there."""
        return sorted((self.output / self.split).glob("[!.]*.json"))

    @property
    def _songs(self) -> Path:
        # Not in the folder of the split: museval takes any JSON file there for a song.
        return self.output / f"{self.split}.songs.txt"

    def write_songs(self, names: Iterable[str]) -> None:
        """Write the list of songs to be scored, so that a report can say how many are missing."""
        write_whole({self._songs: [os.fsencode(f"{name}\n") for name in names]})

    def read_songs(self) -> list[str]:
        """Songs that are to be scored; none where no list was written."""
        if not self._songs.is_file():
            return []
        return os.fsdecode(self._songs.read_bytes()).split("\n")[:-1]

    def write(self, scores: Mapping[str, TrackScores]) -> None:
        """Write the scores of a song; bounds first, so that no estimates lack theirs."""
        files = {method: self.path(method, found.track) for method, found in scores.items()}
        if bounds := {files[method]: scores[method] for method in scores if method != ESTIMATES}:
            self.bounds.mkdir(parents=True, exist_ok=True)
            # Not `.lock`: the folder can be another evaluation's output, which holds that.
            with FileLock(self.bounds / ".bounds.lock"):  # others that share them wait
                write_scores(bounds)
        write_scores({files[method]: scores[method] for method in scores if method == ESTIMATES})


def write_scores(files: Mapping[Path, TrackScores]) -> None:
    """Write scores, each file whole or not at all.

    Raises:
        OSError: the disk is full, or a folder cannot be written to.
    """
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole({path: [_to_json(scores).encode()] for path, scores in files.items()})


def _to_json(scores: TrackScores) -> str:
    ours = {
        "settings": scores.settings,
        "files": scores.files,
        "seconds": scores.seconds,
        "whole": _whole(scores.whole, _strict),
        "notes": scores.notes,
    }
    targets = [
        {"name": stem, "frames": _frames(ratios, scores)} for stem, ratios in scores.frames.items()
    ]
    window = {"window": scores.window, "hop": scores.hop}
    return json.dumps({OURS: window | ours, "targets": targets}, indent=1) + "\n"


def _strict(value: float) -> float | str | None:
    """A number as strict JSON can hold it: null for NaN, and a text for an infinite one."""
    if math.isnan(value):
        return None
    return str(value) if math.isinf(value) else value


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def _whole(ratios: dict[str, dict], convert: Callable) -> dict[str, dict]:
    return {
        stem: {name: convert(value) for name, value in named.items()}
        for stem, named in ratios.items()
    }


def _frames(ratios: dict[str, list[float]], scores: TrackScores) -> list[dict]:
    """A dict per frame; one that is a whole song is as long as the song."""
    return [
        {
            "time": number * scores.hop if number else 0.0,
            "duration": min(scores.window, scores.seconds),
            "metrics": dict(zip(RATIOS, values, strict=True)),
        }
        for number, values in enumerate(zip(*(ratios[name] for name in RATIOS), strict=True))
    ]


def read_scores(path: Path) -> TrackScores:
    """Read what `write_scores` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: tfswa-lab did not write it, or it is broken.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        ours = dict(content[OURS])
        frames = {
            target["name"]: {
                name: [frame["metrics"][name] for frame in target["frames"]] for name in RATIOS
            }
            for target in content["targets"]
        }
        ours |= {"notes": tuple(ours["notes"]), "whole": _whole(ours["whole"], _number)}
        return TrackScores(path.stem, frames, **ours)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a file of scores that tfswa-lab wrote ({error!r}); choose another "
            "folder, or overwrite it"
        ) from error


def difference(there: dict, wanted: dict) -> str:
    """The first value of settings or digests that differs, in words; empty if none does.

    >>> difference({"hop": 1.0, "seconds": 3}, {"hop": 0.5, "seconds": 3})
    'hop was 1.0 and is 0.5 now'
    """
    for key in there | wanted:
        old, new = there.get(key, "absent"), wanted.get(key, "absent")
        if old != new:
            if key == "estimator" and isinstance(old, dict) and isinstance(new, dict):
                return f"the estimator's {difference(old, new)}"
            return f"{key} was {shortened(old)} and is {shortened(new)} now"
    return ""


def shortened(value: object) -> str:
    """A value as text; only the beginning of a digest."""
    text = str(value)
    return f"{text[:8]}…" if len(text) == 64 else text
