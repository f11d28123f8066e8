"""The scores of a song as a file: museval's JSON, and under a key of our own what museval lacks.

    FOLDER/SPLIT/TRACK.json

`museval.EvalStore().add_eval_dir(FOLDER)` reads those of the test split. A frame without a value
is NaN, as museval writes it, though strict JSON has no such number; our own key is strict.

Axis letters: `n` stems, `m` frames.

Notebook: 08_evaluation
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tfswa_lab.durable import write_whole
from tfswa_lab.evaluation.bsseval import BSSEval, median_of

RATIOS = ("SDR", "ISR", "SIR", "SAR")
OURS = "tfswa_lab"  # the key
DECIMALS = 5  # museval's

Ratios = dict[str, dict[str, float]]  # stem → name of a ratio → dB


@dataclass(frozen=True)
class TrackScores:
    """What is known about one set of estimates of one song.

    Args:
        track: name of the song.
        frames: stem → SDR, ISR, SIR, SAR → dB of each frame; NaN for none.
        whole: stem → uSDR, SI-SDR → dB of the whole song.
        window: length of a frame in seconds.
        hop: from one frame to the next, in seconds.
        settings: all that the numbers depend on, but for the files.
        files: SHA-256 of each file.
        notes: why a number is missing, and what was done to the estimates.
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
            stem: {name: median_of(values) for name, values in ratios.items()}
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


def frames_by_stem(result: BSSEval, stems: tuple[str, ...]) -> dict[str, dict[str, list[float]]]:
    """Ratios as museval stores them: rounded, and NaN where they are infinite."""
    ratios = (result.sdr, result.isr, result.sir, result.sar)  # (n, m) each
    return {
        stem: {name: _rounded(ratio[i]) for name, ratio in zip(RATIOS, ratios, strict=True)}
        for i, stem in enumerate(stems)
    }


def _rounded(values: Tensor) -> list[float]:
    return [round(x, DECIMALS) if math.isfinite(x) else math.nan for x in values.tolist()]


def scores_path(folder: Path, split: str, track: str) -> Path:
    """Where the scores of a song lie."""
    return folder / split / f"{track}.json"


def write_scores(files: Mapping[Path, TrackScores]) -> None:
    """Write some, each file whole or not at all.

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
        ValueError: it is not ours, or broken.
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
    """The first value of settings or digests that differs, in words; none if none does.

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
    """A value as text, of a digest the beginning."""
    text = str(value)
    return f"{text[:8]}…" if len(text) == 64 else text
