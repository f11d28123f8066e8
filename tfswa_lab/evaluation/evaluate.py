"""From songs and estimates to a report: in parallel, and nothing twice.

A song whose files are there (`score_folders` says where) is finished. Each appears whole or not at
all, so an evaluation that was killed goes on where it stopped. One that overwrites removes first
what is in its way: killed, it goes on without `overwrite`, and with it begins anew.

Processes whose parent is killed finish the song in hand, which nobody writes down, and end by
themselves within six minutes.

Notebook: 08_evaluation
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path

import torch
from joblib import Parallel, delayed, effective_n_jobs

from tfswa_lab.data.musdb import SPLITS, check_choice
from tfswa_lab.data.tracks import find_tracks
from tfswa_lab.durable import locked
from tfswa_lab.evaluation.oracles import BOUNDS
from tfswa_lab.evaluation.report import NAMES, Report
from tfswa_lab.evaluation.score_folders import Folders, Job, unfinished
from tfswa_lab.evaluation.scoring import Estimator, Scoring, score_track

Progress = Callable[[list[str]], Iterable[str]]


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
    progress: Progress = iter,
) -> Report:
    """Score the estimates of all songs of a split, between a floor and two ceilings.

    Songs are scored side by side through joblib, also in a `joblib.parallel_config` of yours: its
    "dask" backend reaches other machines. One song needs up to 3 GiB for every 3 minutes.

    Args:
        estimator: `ModelEstimates(folder)`, `FolderEstimates(folder)`, or of your own.
        data_root: a MUSDB18-shaped folder.
        output_dir: made if absent. Songs that are finished there are not scored again.
        split: `train`, `valid` or `test`.
        bounds: of "mixture", "irm" and "mwf"; these take most of the time.
        bounds_dir: of their scores, `output_dir/bounds` if None; several models can share one.
        jobs: processes, with a thread each; None for one with as many threads as torch uses now.
        overwrite: score all songs again, and bounds that are broken or differ.
        progress: wraps the list of songs that are left to score, e.g. `tqdm`.

    `window`, `hop`, `seconds` and `device` are those of `Scoring`.

    Raises:
        OSError: a file is missing, another process writes there, or one of ours was killed.
        ValueError: what is there is broken, does not fit or was scored otherwise; or an argument
            is out of range.
    """
    _check(split, bounds, jobs)
    scoring = Scoring(estimator, window, hop, seconds, device)
    folders = Folders.of(output_dir, bounds_dir, split)
    tracks = find_tracks(data_root, split, scoring.sources)
    folders.output.mkdir(parents=True, exist_ok=True)
    with locked(folders.output, "evaluating"):
        left = unfinished(scoring, tracks, folders, bounds, overwrite)
        folders.write_songs(track.name for track in tracks)
        _score_all(scoring, left, folders, jobs, progress)
    return folders.report([track.name for track in tracks], bounds)


def _check(split: str, bounds: Sequence[str], jobs: int | None) -> None:
    check_choice("split", split, SPLITS)
    for name in bounds:
        check_choice("bound", name, tuple(BOUNDS))
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs={jobs} must be 1 or more processes")


def _score_all(
    scoring: Scoring, left: list[Job], folders: Folders, jobs: int | None, progress: Progress
) -> None:
    """Score songs side by side, and write each as soon as it is finished."""
    jobs = min(effective_n_jobs(jobs), max(1, len(left)))
    # A song is sent when a process is free: none must wait where nobody may be left to write it.
    sending = {"batch_size": 1, "pre_dispatch": "n_jobs"}
    parallel = Parallel(jobs, return_as="generator_unordered", **sending)
    threads = None if jobs == 1 else 1
    finished = parallel(delayed(score_track)(scoring, *job, threads) for job in left)
    names = [track.name for track, _ in left]
    try:
        for _, scores in zip(progress(names), finished, strict=True):
            folders.write(scores)  # here: only who holds the lock may write
    except BrokenExecutor as error:
        raise ChildProcessError(
            f"one of {jobs} processes was killed, most likely for lack of memory: a song needs up "
            "to 3 GiB for every 3 minutes; finished songs are kept: evaluate again with fewer jobs"
        ) from error


def load_report(
    output_dir: str | Path, split: str = "test", bounds_dir: str | Path | None = None
) -> Report:
    """Read what `evaluate` wrote, with the bounds that are there for all songs.

    Of an evaluation that was killed it has the songs that are finished, and its notes say so.

    Raises:
        FileNotFoundError: there are no scores.
        ValueError: a file is not of ours, or broken, or of other settings than another.
    """
    folders = Folders.of(output_dir, bounds_dir, split)
    names = [path.stem for path in folders.scored()]
    if not names:
        raise FileNotFoundError(
            f"{folders.output / split} holds no scores; evaluate something first"
        )
    gaps = ()
    if set(wanted := folders.read_songs()) - set(names):
        gaps = (f"{len(names)} of {len(wanted)} songs are scored: evaluate again for the rest",)
    there = []
    for bound in BOUNDS:
        count = sum(folders.path(bound, name).is_file() for name in names)
        if count == len(names):
            there.append(bound)
        elif count:
            gaps += (f"{NAMES[bound]}: left out, scored for {count} of {len(names)} songs",)
    return folders.report(names, there, gaps)
