"""Where the scores of an evaluation lie, and what they are together.

    OUTPUT/SPLIT/TRACK.json                 scores of the estimates
    OUTPUT/SPLIT.songs.txt                  names of all songs that are to be scored
    OUTPUT/bounds/BOUND/SPLIT/TRACK.json    of the floor (mixture) and the ceilings (irm, mwf)

Notebook: 08_evaluation
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from tfswa_lab.data.tracks import Track
from tfswa_lab.durable import write_whole
from tfswa_lab.evaluation.report import Report
from tfswa_lab.evaluation.scores import (
    TrackScores,
    difference,
    read_scores,
    scores_path,
    write_scores,
)
from tfswa_lab.evaluation.scoring import ESTIMATES, Scoring


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
        """With the bounds in `output_dir/bounds` if nobody says otherwise."""
        return cls(Path(output_dir), Path(bounds_dir or Path(output_dir, "bounds")), split)

    def path(self, method: str, track: str) -> Path:
        """The file of the scores of a song."""
        folder = self.output if method == ESTIMATES else self.bounds / method
        return scores_path(folder, self.split, track)

    def scored(self) -> list[Path]:
        """The files that are there of the estimates."""
        return sorted((self.output / self.split).glob("[!.]*.json"))

    @property
    def _songs(self) -> Path:
        # Not in the folder of the split: museval takes any JSON file there for a song.
        return self.output / f"{self.split}.songs.txt"

    def write_songs(self, names: Iterable[str]) -> None:
        """Write down what is to be scored, so that a report can say what is missing."""
        write_whole({self._songs: [f"{name}\n".encode() for name in names]})

    def read_songs(self) -> list[str]:
        """What is to be scored; none where nobody wrote it down."""
        return self._songs.read_text("utf-8").split("\n")[:-1] if self._songs.is_file() else []

    def write(self, scores: Mapping[str, TrackScores]) -> None:
        """Write the scores of a song; bounds first, so that estimates are never without."""
        files = {method: self.path(method, found.track) for method, found in scores.items()}
        if bounds := {files[method]: scores[method] for method in scores if method != ESTIMATES}:
            self.bounds.mkdir(parents=True, exist_ok=True)
            # Not `.lock`: the folder can be another evaluation's output, which holds that.
            with FileLock(self.bounds / ".bounds.lock"):  # others that share them wait
                write_scores(bounds)
        write_scores({files[method]: scores[method] for method in scores if method == ESTIMATES})

    def remove(self, files: Iterable[tuple[str, str]]) -> None:
        """Remove scores, each by its method and song."""
        for method, track in files:
            self.path(method, track).unlink(missing_ok=True)

    def report(
        self, tracks: Iterable[str], bounds: Iterable[str], gaps: tuple[str, ...] = ()
    ) -> Report:
        """Read the scores of these songs.

        Raises:
            FileNotFoundError: they are not all there.
            ValueError: a file is broken, or of other settings, stems or files than another.
        """
        scores = {
            method: [read_scores(self.path(method, name)) for name in sorted(tracks)]
            for method in (ESTIMATES, *bounds)
        }
        self._check_alike(scores)
        return Report(scores, gaps)

    def _check_alike(self, scores: dict[str, list[TrackScores]]) -> None:
        first, *others = scores[ESTIMATES]
        for song in others:
            if differs := difference(first.settings, song.settings):
                raise ValueError(
                    f"{self.path(ESTIMATES, song.track)} was scored otherwise than "
                    f"{first.track}: {differs}; evaluate again, and overwrite"
                )
        for method in scores.keys() - {ESTIMATES}:
            for own, other in zip(scores[ESTIMATES], scores[method], strict=True):
                if not own.comparable(other):
                    raise ValueError(
                        f"{self.path(method, own.track)} is of other frames, stems or audio than "
                        "the estimates; evaluate them again, with another bounds_dir"
                    )


Job = tuple[Track, list[str]]  # a song; of `estimates` and the bounds, what is left to score


def unfinished(
    scoring: Scoring,
    tracks: Sequence[Track],
    folders: Folders,
    bounds: Sequence[str],
    overwrite: bool,
) -> list[Job]:
    """Songs that are not finished, after a look at the headers of their estimates.

    Args:
        scoring: how songs are scored.
        tracks: all of them.
        folders: where scores lie.
        bounds: which of them are wanted.
        overwrite: remove what is there of the estimates, and bounds that are broken or differ.

    Raises:
        FileNotFoundError: an estimate is missing.
        ValueError: an estimate does not fit its song; a file is broken, or was scored otherwise
            and is not to be overwritten; or there are scores of other songs.
    """
    _refuse_others(tracks, folders)
    jobs = [(track, _missing(scoring, track, folders, bounds, overwrite)) for track in tracks]
    jobs = [(track, methods) for track, methods in jobs if methods]
    for track, methods in jobs:
        if ESTIMATES in methods:
            scoring.estimator.files(track)  # says what is missing or wrong, before hours of work
    if overwrite:  # all at once: killed, what is there then are the songs that are finished
        folders.remove((method, track.name) for track, methods in jobs for method in methods)
    return jobs


def _refuse_others(tracks: Sequence[Track], folders: Folders) -> None:
    """museval would aggregate all that lies there, so it must be the songs of this split."""
    names = {track.name for track in tracks}
    odd = [path for path in folders.scored() if path.stem not in names]
    if odd:
        raise ValueError(
            f"{odd[0]} is of none of the {len(names)} songs to evaluate: {odd[0].parent} was made "
            "from other data; choose another output folder"
        )


def _missing(
    scoring: Scoring, track: Track, folders: Folders, bounds: Sequence[str], overwrite: bool
) -> list[str]:
    """What is left to score of a song: `estimates`, names of bounds, or nothing."""
    there = {}
    for method in bounds if overwrite else (ESTIMATES, *bounds):
        if scores := _scores(folders, method, track, overwrite):
            there[method] = scores
    digests = scoring.digests(track, tuple(there)) if there else {}
    left = [method for method in (ESTIMATES, *bounds) if method not in there]
    for method, scores in there.items():
        differs = difference(scores.settings, scoring.settings(method)) or difference(
            scores.files, digests[method]
        )
        if differs and not overwrite:
            raise ValueError(
                f"{folders.path(method, track.name)} was scored otherwise: {differs}; choose "
                f"another {'output' if method == ESTIMATES else 'bounds'} folder, or overwrite it"
            )
        left += [method] if differs else []
    return left


def _scores(folders: Folders, method: str, track: Track, overwrite: bool) -> TrackScores | None:
    """What is there, unless it is broken and to be overwritten."""
    path = folders.path(method, track.name)
    if not path.is_file():
        return None
    try:
        return read_scores(path)
    except ValueError:
        if not overwrite:
            raise
        return None
