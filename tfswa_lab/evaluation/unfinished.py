"""What an evaluation has left to do, and what must not be mixed with it.

Notebook: 08_evaluation
"""

from __future__ import annotations

from collections.abc import Sequence

from tfswa_lab.data.tracks import Track
from tfswa_lab.evaluation.score_folders import Folders
from tfswa_lab.evaluation.scoring import ESTIMATES, Scoring
from tfswa_lab.evaluation.store import TrackScores, difference, read_scores

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

    Notebook: 08_evaluation
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
