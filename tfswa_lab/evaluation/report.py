"""From songs and estimates to a report: in parallel, and nothing twice.

    OUTPUT/SPLIT/TRACK.json                 scores of the estimates
    OUTPUT/bounds/BOUND/SPLIT/TRACK.json    of the floor (mixture) and the ceilings (irm, mwf)

A song whose files are there is finished. Each appears whole or not at all, so an evaluation that
was killed goes on where it stopped.

Notebook: 08_evaluation
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from joblib import Parallel, delayed, effective_n_jobs

from tfswa_lab.data.musdb import SPLITS, check_choice
from tfswa_lab.data.tracks import Track, find_tracks
from tfswa_lab.durable import held
from tfswa_lab.evaluation.oracles import BOUNDS
from tfswa_lab.evaluation.scoring import ESTIMATES, Estimator, Scoring, score_track
from tfswa_lab.evaluation.store import TrackScores, read_scores, scores_path, write_scores
from tfswa_lab.evaluation.summary import Report


def evaluate(
    estimator: Estimator,
    data_root: str | Path,
    output_dir: str | Path,
    split: str = "test",
    window: float = 1.0,
    hop: float = 1.0,
    seconds: float | None = None,
    bounds: Sequence[str] = tuple(BOUNDS),
    bounds_dir: str | Path | None = None,
    jobs: int | None = None,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: Callable[[list[str]], Iterable[str]] = iter,
) -> Report:
    """Score the estimates of all songs of a split, between a floor and two ceilings.

    Songs are scored side by side through joblib, also in a `joblib.parallel_config` of yours: its
    "dask" backend reaches other machines. One song needs up to 3 GiB for every 3 minutes.

    Args:
        estimator: `ModelEstimates(folder)`, `FolderEstimates(folder)`, or of your own.
        data_root: a MUSDB18-shaped folder.
        output_dir: made if absent. Songs that are finished there are not scored again.
        split: `train`, `valid` or `test`.
        window: length of a frame in seconds.
        hop: from one frame to the next, in seconds.
        seconds: score the beginning of each song only; None for all of it.
        bounds: of "mixture", "irm" and "mwf"; these take most of the time.
        bounds_dir: where their scores are, `output_dir/bounds` if None. Evaluations of several
            models can share one, so that they are computed once.
        jobs: processes, with a thread each; None for one with as many threads as torch uses now.
        device: where ratios and oracles are computed.
        overwrite: score all songs again, whatever is in `output_dir`.
        progress: wraps the list of songs that are left to score, e.g. `tqdm`.

    Raises:
        FileNotFoundError: a song or an estimate is missing.
        FileExistsError: another process is writing there.
        ValueError: a file is broken or does not fit, or what lies in `output_dir` was scored
            otherwise, or is of other songs.

    Notebook: 08_evaluation
    """
    check_choice("split", split, SPLITS)
    for name in bounds:
        check_choice("bound", name, tuple(BOUNDS))
    scoring = Scoring(estimator, window, hop, seconds, device)
    tracks = find_tracks(data_root, split, scoring.sources)
    output_dir = Path(output_dir)
    folders = Folders(output_dir, Path(bounds_dir or output_dir / "bounds"), split)
    output_dir.mkdir(parents=True, exist_ok=True)
    with held(output_dir, "evaluating"):
        _refuse_others(output_dir / split, tracks)
        left = [(t, _missing(scoring, t, folders, bounds, overwrite)) for t in tracks]
        left = [(track, methods) for track, methods in left if methods]
        for track, methods in left:
            if ESTIMATES in methods:
                estimator.files(track)  # says what is missing or wrong, before hours of work
        _score_all(scoring, left, folders, jobs, progress)
    return folders.report([track.name for track in tracks], bounds)


@dataclass(frozen=True)
class Folders:
    """Where the scores lie.

    Args:
        output: of the estimates.
        bounds: of floor and ceilings.
        split: `train`, `valid` or `test`.

    Notebook: 08_evaluation
    """

    output: Path
    bounds: Path
    split: str

    def path(self, method: str, track: str) -> Path:
        """The file of the scores of a song."""
        folder = self.output if method == ESTIMATES else self.bounds / method
        return scores_path(folder, self.split, track)

    def report(self, tracks: Iterable[str], bounds: Iterable[str]) -> Report:
        """Read all of these.

        Raises:
            ValueError: a bound is of other frames, stems or files than the estimates.
        """
        scores = {
            method: [read_scores(self.path(method, name)) for name in sorted(tracks)]
            for method in (ESTIMATES, *bounds)
        }
        for method in bounds:
            for own, other in zip(scores[ESTIMATES], scores[method], strict=True):
                if not own.comparable(other):
                    raise ValueError(
                        f"{self.path(method, own.track)} is of other frames, stems or audio than "
                        "the estimates; evaluate them again, with another bounds_dir"
                    )
        return Report(scores)


def load_report(
    output_dir: str | Path, split: str = "test", bounds_dir: str | Path | None = None
) -> Report:
    """Read what `evaluate` wrote, with the bounds that are there for all songs.

    Raises:
        FileNotFoundError: there are no scores.
        ValueError: a file is not of ours, or broken.

    Notebook: 08_evaluation
    """
    output_dir = Path(output_dir)
    folders = Folders(output_dir, Path(bounds_dir or output_dir / "bounds"), split)
    names = [path.stem for path in _scores_in(output_dir / split)]
    if not names:
        raise FileNotFoundError(f"{output_dir / split} holds no scores; evaluate something first")
    there = [
        bound for bound in BOUNDS if all(folders.path(bound, name).is_file() for name in names)
    ]
    return folders.report(names, there)


def _scores_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!.]*.json"))


def _refuse_others(folder: Path, tracks: list[Track]) -> None:
    """museval would aggregate all that lies there, so it must be the songs of this split."""
    names = {track.name for track in tracks}
    odd = [path for path in _scores_in(folder) if path.stem not in names]
    if odd:
        raise ValueError(
            f"{odd[0]} is of none of the {len(names)} songs to evaluate: {folder} was made from "
            "other data; choose another output folder"
        )


def _missing(
    scoring: Scoring, track: Track, folders: Folders, bounds: Sequence[str], overwrite: bool
) -> list[str]:
    """What is left to score of a song: `estimates`, names of bounds, or nothing."""
    methods = (ESTIMATES, *bounds)
    paths = {method: folders.path(method, track.name) for method in methods}
    there = {
        method: read_scores(path)
        for method, path in paths.items()
        if path.is_file() and not (overwrite and method == ESTIMATES)
    }
    digests = scoring.digests(track, tuple(there)) if there else {}
    finished = [
        method
        for method, scores in there.items()
        if _agrees(scores, scoring.settings(method), digests[method], paths[method], overwrite)
    ]
    return [method for method in methods if method not in finished]


def _agrees(
    scores: TrackScores, settings: dict, digests: dict, path: Path, overwrite: bool
) -> bool:
    """Whether scores are of these settings and files; if not, they must be overwritten."""
    difference = _difference(scores.settings, settings) or _difference(scores.files, digests)
    if difference and not overwrite:
        raise ValueError(
            f"{path} was scored otherwise: {difference}; choose another "
            f"{'bounds' if 'bound' in settings else 'output'} folder, or overwrite it"
        )
    return not difference


def _difference(there: dict, wanted: dict) -> str:
    """The first value that differs, in words."""
    for key in there | wanted:
        old, new = there.get(key, "absent"), wanted.get(key, "absent")
        if old != new:
            return f"{key} was {_short(old)} and is {_short(new)} now"
    return ""


def _short(value: object) -> str:
    """A value, or the beginning of a digest."""
    text = str(value)
    return f"{text[:8]}…" if len(text) == 64 else text


def _score_all(
    scoring: Scoring,
    left: list[tuple[Track, list[str]]],
    folders: Folders,
    jobs: int | None,
    progress: Callable[[list[str]], Iterable[str]],
) -> None:
    """Score songs side by side, and write each as soon as it is finished."""
    jobs = min(effective_n_jobs(jobs), max(1, len(left)))
    parallel = Parallel(jobs, return_as="generator_unordered", batch_size=1)
    threads = None if jobs == 1 else 1
    finished = parallel(delayed(score_track)(scoring, *job, threads) for job in left)
    names = [track.name for track, _ in left]
    for _, scores in zip(progress(names), finished, strict=True):
        _write(scores, folders)


def _write(scores: dict[str, TrackScores], folders: Folders) -> None:
    """Here and not in the workers: only who holds the lock may write."""
    files = {method: folders.path(method, found.track) for method, found in scores.items()}
    bounds = {files[method]: scores[method] for method in scores if method != ESTIMATES}
    if bounds:
        folders.bounds.mkdir(parents=True, exist_ok=True)
        with FileLock(folders.bounds / ".lock"):  # another evaluation may share them
            write_scores(bounds)
    write_scores({files[method]: scores[method] for method in scores if method == ESTIMATES})
