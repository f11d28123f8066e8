"""From songs and estimates to a report: songs in parallel, and no song twice.

A song whose files are there (`scores` says where) is finished. Each appears whole or not at all, so
an evaluation that was killed goes on where it stopped. With `overwrite`, it removes the old
scores first. After a kill, run again without `overwrite` to go on, or with it to start anew.

If the main process is killed, the others finish their songs, lose the scores, and end within six
minutes.

Notebook: 08_evaluation
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor
from inspect import signature
from pathlib import Path
from types import ModuleType

from joblib import Parallel, delayed, effective_n_jobs

from tfswa_lab.data.tracks import Track, find_tracks
from tfswa_lab.durable import locked
from tfswa_lab.evaluation.estimates import Estimator
from tfswa_lab.evaluation.report import Report, read_report
from tfswa_lab.evaluation.scores import ESTIMATES, Folders, TrackScores, difference, read_scores
from tfswa_lab.evaluation.scoring import Evaluation, Scoring, score_track

Progress = Callable[[list[str]], Iterable[str]]
Job = tuple[Track, list[str]]  # a song, and which of `estimates` and the bounds are left to score


def evaluate(
    estimator: Estimator,
    data_root: str | Path,
    output_dir: str | Path,
    how: Evaluation = Evaluation(),
    progress: Progress = iter,
) -> Report:
    """Score the estimates of all songs of a split, between a floor and two ceilings.

    Songs are scored side by side through joblib, also in a `joblib.parallel_config` of yours: its
    "dask" backend reaches other machines. One song needs up to 3 GiB for every 3 minutes.

    Args:
        estimator: `ModelEstimates(folder)`, `FolderEstimates(folder)`, or of your own.
        data_root: a MUSDB18-shaped folder.
        output_dir: made if absent. Songs that are finished there are not scored again.
        how: split, frames, bounds, processes and device.
        progress: wraps the list of songs that are left to score, e.g. `tqdm`.

    Raises:
        OSError: a file is missing, another process writes there, or one of ours was killed.
        ValueError: what is there is broken, does not fit or was scored otherwise.
    """
    scoring = Scoring(estimator, how)
    folders = Folders.of(output_dir, how.bounds_dir, how.split)
    tracks = find_tracks(data_root, how.split, scoring.sources)
    names = [track.name for track in tracks]
    folders.output.mkdir(parents=True, exist_ok=True)
    with locked(folders.output, "evaluating"):
        jobs = pending_jobs(scoring, tracks, folders)
        folders.write_songs(names)
        _score_all(scoring, jobs, folders, progress)
    return read_report(folders, names, how.bounds)


def pending_jobs(scoring: Scoring, tracks: Sequence[Track], folders: Folders) -> list[Job]:
    """Songs that are not finished, after a check of the headers of their estimates.

    An evaluation that overwrites removes its old scores here, and bounds that are broken or differ.

    Raises:
        FileNotFoundError: an estimate is missing.
        ValueError: an estimate does not fit its song; a file is broken, or was scored otherwise
            and is not to be overwritten; or there are scores of other songs.
    """
    _refuse_others(tracks, folders)
    jobs = [(track, _missing(scoring, track, folders)) for track in tracks]
    jobs = [(track, methods) for track, methods in jobs if methods]
    for track, methods in jobs:
        if ESTIMATES in methods:
            scoring.estimator.files(track)  # says what is missing or wrong, before hours of work
    if scoring.how.overwrite:  # remove all now: after a kill, every file left is valid
        for track, methods in jobs:
            for method in methods:
                folders.path(method, track.name).unlink(missing_ok=True)
    return jobs


def _refuse_others(tracks: Sequence[Track], folders: Folders) -> None:
    """Refuse scores of songs that are not in the split: museval would aggregate them too."""
    names = {track.name for track in tracks}
    odd = [path for path in folders.scored() if path.stem not in names]
    if odd:
        raise ValueError(
            f"{odd[0]} is of none of the {len(names)} songs to evaluate: {odd[0].parent} was made "
            "from other data; choose another output folder"
        )


def _missing(scoring: Scoring, track: Track, folders: Folders) -> list[str]:
    """Those of `estimates` and the bounds that are left to score of a song."""
    bounds, overwrite = scoring.how.bounds, scoring.how.overwrite
    there = {}
    for method in bounds if overwrite else (ESTIMATES, *bounds):
        if scores := _scores(folders.path(method, track.name), overwrite):
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


def _scores(path: Path, overwrite: bool) -> TrackScores | None:
    """The scores that are there, unless they are broken and to be overwritten."""
    if not path.is_file():
        return None
    try:
        return read_scores(path)
    except ValueError:
        if not overwrite:
            raise
        return None


def _score_all(scoring: Scoring, jobs: list[Job], folders: Folders, progress: Progress) -> None:
    """Score songs side by side, and write each as soon as it is finished."""
    processes = min(effective_n_jobs(scoring.how.jobs), max(1, len(jobs)))
    # Send a song only to a free process, so that no queue remains if this process is killed.
    sending = {"batch_size": 1, "pre_dispatch": "n_jobs"}
    parallel = Parallel(processes, return_as="generator_unordered", **sending)
    threads = None if processes == 1 else 1
    finished = parallel(delayed(score_track)(scoring, *job, threads) for job in jobs)
    names = [track.name for track, _ in jobs]
    try:
        for _, scores in zip(progress(names), finished, strict=True):
            folders.write(scores)  # here: only who holds the lock may write
    except BrokenExecutor as error:
        raise ChildProcessError(
            f"one of {processes} processes was killed, most likely for lack of memory: a song "
            "needs up to 3 GiB for every 3 minutes; finished songs are kept: evaluate again with "
            "fewer jobs"
        ) from error


class _Callable(ModuleType):
    __call__ = staticmethod(evaluate)
    __signature__ = signature(evaluate)  # without it, the first parameter would be taken for `self`


sys.modules[__name__].__class__ = _Callable  # `evaluation.evaluate` is this file or its function
