"""Checks of lesson 11: a probability of staying, the best path, a minimum duration.

Answers are compared with what follows from adding up, or comparing, all paths.

Axis letters: `t` frames, `k` states.

Notebook: 11_hmm
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby, pairwise, product
from typing import NamedTuple

import numpy as np

from tfswa_lab.teaching.checks import mismatch_or_mistake, verdict

Path = tuple[int, ...]


class Model(NamedTuple):
    """One sequence and its tables: `log_emissions` `(t, k)`, `startprob` `(k)`, `transmat`."""

    log_emissions: np.ndarray
    startprob: np.ndarray
    transmat: np.ndarray


# Exercise 1 --------------------------------------------------------------------------------------

PHRASES = ((2.0, 0.01), (0.5, 0.02), (3.0, 0.032))  # mean duration and hop, in seconds


def check_stay(stay: Callable[[float, float], object]) -> bool:
    """Exercise 1: `stay(mean_seconds, hop_seconds)`, the probability of staying."""
    for mean, hop in PHRASES:
        mistakes = {
            "that is the probability of leaving": hop / mean,
            "that is a rate in continuous time; frames are steps": math.exp(-hop / mean),
            "the mean counts frames, not seconds": 1 - 1 / max(mean, 1.001),
            "that is the mean in frames; which probability has it?": mean / hop,
        }
        hint = mismatch_or_mistake(stay(mean, hop), 1 - hop / mean, mistakes, tolerance=1e-7)
        if hint:
            return verdict("stay", f"mean {mean} s, hop {hop} s: {hint}")
    return verdict("stay", None)


# Exercise 2 --------------------------------------------------------------------------------------


def check_viterbi(viterbi: Callable[[np.ndarray, np.ndarray, np.ndarray], object]) -> bool:
    """Exercise 2: `viterbi(log_emissions, startprob, transmat)`, the most probable path."""
    answers: list[tuple[Model, Path]] = []
    for model in models():
        path = _as_path(viterbi(*(table.copy() for table in model)), *model.log_emissions.shape)
        if isinstance(path, str):
            return verdict("viterbi", path)
        answers.append((model, path))
    return verdict("viterbi", _path_hint(answers))


def models(seed: int = 11) -> Iterator[Model]:
    """Small random models; some of their transitions are forbidden, and no path ties."""
    random = np.random.default_rng(seed)
    for t, k, zeros in ((4, 2, 0.0), (5, 3, 0.0), (6, 3, 0.4), (6, 3, 0.4), (1, 2, 0.0)):
        allowed = (random.random((k, k)) >= zeros) | np.eye(k, dtype=bool)
        transmat = random.dirichlet(np.full(k, 0.5), k) * allowed
        transmat /= transmat.sum(1, keepdims=True)
        yield Model(random.normal(0, 1.5, (t, k)), random.dirichlet(np.ones(k)), transmat)


def path_probability(model: Model, path: Sequence[int]) -> float:
    """The probability of one path together with its frames."""
    emitted = math.exp(sum(model.log_emissions[range(len(path)), path]))
    steps = model.transmat[path[:-1], path[1:]]
    return float(model.startprob[path[0]] * np.prod(steps) * emitted)


def all_paths(model: Model) -> dict[Path, float]:
    """Each path with its probability."""
    t, k = model.log_emissions.shape
    return {path: path_probability(model, path) for path in product(range(k), repeat=t)}


def _path_hint(answers: list[tuple[Model, Path]]) -> str | None:
    """The first wrong path, with the mistake that explains all answers, if there is one."""
    wrong = [(model, path) for model, path in answers if path != _best(model)]
    if not wrong:
        return None
    (t, k), right = wrong[0][0].log_emissions.shape, _best(wrong[0][0])
    explained = (
        name
        for name, mistake in MISTAKES.items()
        if all(path == mistake(model) for model, path in answers)
    )
    why = next(explained, None) or _loss(*wrong[0])
    return f"{t} frames, {k} states: expected {list(right)}, got {list(wrong[0][1])}: {why}"


def _loss(model: Model, path: Path) -> str:
    share = path_probability(model, path) / path_probability(model, _best(model))
    if share == 0:
        return "your path takes a step that is forbidden"
    return f"your path has {share:.3f} times the probability of the best one"


def _as_path(answer: object, t: int, k: int) -> Path | str:
    try:
        path = tuple(int(state) for state in answer)
    except (TypeError, ValueError):
        return f"expected a list of {t} states, got {answer!r}"
    if len(path) != t:
        return f"expected {t} states, one for each frame, got {len(path)}"
    if not all(0 <= state < k for state in path):
        return f"states are 0 to {k - 1}, got {list(path)}"
    return path


def _best(model: Model) -> Path:
    paths = all_paths(model)
    return max(paths, key=paths.get)


def _framewise(model: Model) -> Path:
    return tuple(model.log_emissions.argmax(1).tolist())


def _without_start(model: Model) -> Path:
    k = len(model.startprob)
    return _best(model._replace(startprob=np.full(k, 1 / k)))


def _transposed(model: Model) -> Path:
    return _best(model._replace(transmat=model.transmat.T))


def _greedy(model: Model) -> Path:
    path = [int((model.startprob * np.exp(model.log_emissions[0])).argmax())]
    for frame in model.log_emissions[1:]:
        path.append(int((model.transmat[path[-1]] * np.exp(frame)).argmax()))
    return tuple(path)


def _most_probable_states(model: Model) -> Path:
    t, k = model.log_emissions.shape
    table = np.zeros((t, k))
    for path, probability in all_paths(model).items():
        table[range(t), path] += probability
    return tuple(table.argmax(1).tolist())


def _backwards(model: Model) -> Path:
    return _best(model)[::-1]


MISTAKES: dict[str, Callable[[Model], Path]] = {
    "these are the best states of each frame alone; the transitions are not used": _framewise,
    "the start probabilities are missing": _without_start,
    "row and column of the transitions are exchanged": _transposed,
    "you took the best step at each frame; a better path may begin worse": _greedy,
    "these are the most probable states of each frame, and not a path": _most_probable_states,
    "the path is in reverse order": _backwards,
}


# Exercise 3 --------------------------------------------------------------------------------------

START = np.array([0.7, 0.3])
MOVE = np.array([[0.6, 0.4], [0.25, 0.75]])
THREE = np.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.6, 0.0, 0.4]])
CHAINS = (
    (START, MOVE, 1, 5),
    (START, MOVE, 2, 6),
    (START, MOVE, 3, 7),
    (np.array([0.2, 0.5, 0.3]), THREE, 2, 5),
)


def check_minimum(minimum: Callable[[np.ndarray, np.ndarray, int], object]) -> bool:
    """Exercise 3: `minimum(startprob, transmat, frames)`, an HMM with a minimum duration."""
    hints = (_minimum_hint(minimum, *chain_) for chain_ in CHAINS)
    return verdict("minimum", next(filter(None, hints), None))


def _minimum_hint(
    minimum: Callable, start: np.ndarray, move: np.ndarray, frames: int, length: int
) -> str | None:
    case = f"{len(start)} states, at least {frames} frames"
    answer = minimum(start.copy(), move.copy(), frames)
    hint = _shape_hint(answer, len(start), frames)
    if hint:
        return f"{case}: {hint}"
    start_of, move_of, owner = (np.asarray(part) for part in answer)
    for path in product(range(len(start)), repeat=length):
        right = owner_probability(path, start, move, frames)
        found = _through_copies(path, start_of, move_of, owner)
        if abs(found - right) > 1e-9:
            why = _why(path, found, right, frames)
            return f"{case}: states {list(path)} have probability {found:.4g}, {why}"
    return None


def _shape_hint(answer: object, k: int, frames: int) -> str | None:
    """What is wrong with the three arrays, before any path is looked at."""
    size = k * frames
    if not isinstance(answer, tuple | list) or len(answer) != 3:
        return f"return three arrays: start, transitions and owner; got {answer!r}"
    parts = [np.asarray(part) for part in answer]
    shapes = [part.shape for part in parts]
    if shapes != [(size,), (size, size), (size,)]:
        return f"expected shapes {(size,)}, {(size, size)} and {(size,)}, got {shapes}"
    start, move, owner = parts
    if sorted(owner.tolist()) != sorted(list(range(k)) * frames):
        return f"each of {k} states has {frames} copies; owner is {owner.tolist()}"
    sums = [float(start.sum()), *map(float, move.sum(1))]
    if max(abs(total - 1) for total in sums) > 1e-9 or min(start.min(), move.min()) < 0:
        where = "the start" if abs(sums[0] - 1) > 1e-9 else _bad_row(move)
        return f"{where} is no distribution: its sum should be 1, without negative entries"
    return None


def _bad_row(move: np.ndarray) -> str:
    wrong = np.flatnonzero((abs(move.sum(1) - 1) > 1e-9) | (move.min(1) < 0))
    return f"row {wrong[0]} of the transitions" if len(wrong) else "the start"


def owner_probability(path: Path, start: np.ndarray, move: np.ndarray, frames: int) -> float:
    """The probability of a path of old states, if each run lasts at least `frames`.

    >>> owner_probability((0, 0, 1), START, MOVE, frames=2)  # 0.7 · 1 · 0.4
    0.28
    """
    probability, run = float(start[path[0]]), 1
    for before, after in pairwise(path):
        if run < frames:
            probability *= float(before == after)
        else:
            probability *= float(move[before, after])
        run = run + 1 if before == after else 1
    return round(probability, 12)


def _through_copies(path: Path, start: np.ndarray, move: np.ndarray, owner: np.ndarray) -> float:
    """The probability of a path of old states, summed over the copies that it may go through."""
    alpha = start * (owner == path[0])
    for state in path[1:]:
        alpha = (alpha @ move) * (owner == state)
    return float(alpha.sum())


def _why(path: Path, found: float, right: float, frames: int) -> str:
    runs = [len(list(group)) for _, group in groupby(path)]
    if found > 0 and right == 0:
        return f"but a run of {min(_inner(runs))} frame(s) is too short: it should have 0"
    if found == 0:
        return f"expected {right:.4g}: may the last copy stay, and leave to every *first* copy?"
    if runs[0] == len(path):
        return f"expected {right:.4g}: does one start at the first copy, and step on for sure?"
    return f"expected {right:.4g}"


def _inner(runs: list[int]) -> Iterable[int]:
    """All runs but the last, which the end may cut."""
    return chain(runs[:-1]) if len(runs) > 1 else runs
