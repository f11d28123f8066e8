"""Checks of lesson 11: right answers pass, and each usual mistake gets its own hint."""

import math

import numpy as np
import pytest

from tfswa_lab.teaching.checks.lesson_11 import (
    all_paths,
    check_minimum,
    check_stay,
    check_viterbi,
    models,
    owner_probability,
)

# Exercise 1 --------------------------------------------------------------------------------------


def test_the_right_probability_of_staying_passes():
    assert check_stay(lambda mean, hop: 1 - hop / mean)
    assert check_stay(lambda mean, hop: np.float64((mean - hop) / mean))


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda mean, hop: 0, "expected 0.995, got 0"),
        (lambda mean, hop: None, "expected a number, got None"),
        (lambda mean, hop: hop / mean, "the probability of leaving"),
        (lambda mean, hop: math.exp(-hop / mean), "frames are steps"),
        (lambda mean, hop: 1 - 1 / max(mean, 1.001), "frames, not seconds"),
        (lambda mean, hop: mean / hop, "which probability has it?"),
    ],
)
def test_usual_mistakes_with_staying_are_named(answer, hint, capsys):
    assert not check_stay(answer)
    assert hint in capsys.readouterr().out


# Exercise 2 --------------------------------------------------------------------------------------


def viterbi(log_emissions, startprob, transmat):
    with np.errstate(divide="ignore"):
        steps, score = np.log(transmat), np.log(startprob) + log_emissions[0]
    came_from = []
    for frame in log_emissions[1:]:
        table = score[:, None] + steps
        came_from.append(table.argmax(0))
        score = table.max(0) + frame
    path = [int(score.argmax())]
    for best in reversed(came_from):
        path.append(int(best[path[-1]]))
    return path[::-1]


def greedy(log_emissions, startprob, transmat):
    path = [int((startprob * np.exp(log_emissions[0])).argmax())]
    for frame in log_emissions[1:]:
        path.append(int((transmat[path[-1]] * np.exp(frame)).argmax()))
    return path


def most_probable_states(log_emissions, startprob, transmat):
    emitted = np.exp(log_emissions)
    alpha, beta = np.zeros_like(emitted), np.ones_like(emitted)
    alpha[0] = startprob * emitted[0]
    for t in range(1, len(emitted)):
        alpha[t] = (alpha[t - 1] @ transmat) * emitted[t]
    for t in range(len(emitted) - 2, -1, -1):
        beta[t] = transmat @ (emitted[t + 1] * beta[t + 1])
    return (alpha * beta).argmax(1)


def forbidden(log_emissions, startprob, transmat):
    path = viterbi(log_emissions, startprob, transmat)
    rows, columns = np.nonzero(transmat == 0)
    return [rows[0], columns[0], *path[2:]] if len(rows) else path


def test_the_best_path_passes():
    assert check_viterbi(viterbi)
    assert check_viterbi(lambda *given: np.array(viterbi(*given)))


def test_the_models_tell_the_mistakes_apart():
    """The best path is clearly the best, so that rounding decides nothing; some steps are 0."""
    for model in models():
        first, second = sorted(all_paths(model).values())[::-1][:2]
        assert second < 0.999 * first
    assert any((model.transmat == 0).any() for model in models())


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda logs, start, move: None, "expected a list of 4 states, got None"),
        (lambda logs, start, move: viterbi(logs, start, move)[:-1], "one for each frame, got 3"),
        (lambda logs, start, move: [7] * len(logs), "states are 0 to 1"),
        (lambda logs, start, move: logs.argmax(1), "the transitions are not used"),
        (
            lambda logs, start, move: viterbi(logs, np.ones_like(start) / len(start), move),
            "start probabilities are missing",
        ),
        (lambda logs, start, move: viterbi(logs, start, move.T), "exchanged"),
        (greedy, "a better path may begin worse"),
        (most_probable_states, "and not a path"),
        (lambda *given: viterbi(*given)[::-1], "reverse order"),
        (lambda logs, start, move: [0] * len(logs), "times the probability of the best one"),
        (forbidden, "a step that is forbidden"),
    ],
)
def test_usual_mistakes_with_the_path_are_named(answer, hint, capsys):
    assert not check_viterbi(answer)
    assert hint in capsys.readouterr().out


# Exercise 3 --------------------------------------------------------------------------------------


def minimum(startprob, transmat, frames):
    k = len(startprob)
    first, last = frames * np.arange(k), frames * np.arange(k) + frames - 1
    start, move = np.zeros(k * frames), np.eye(k * frames, k=1)
    start[first] = startprob
    move[last] = 0
    for i in range(k):
        move[last[i], first] = transmat[i]
        move[last[i], first[i]] = 0 if frames > 1 else transmat[i, i]
        move[last[i], last[i]] = transmat[i, i]
    return start, move, np.arange(k).repeat(frames)


def by_column(startprob, transmat, frames):
    """The same with the copies in another order: copy c of state i is k · c + i."""
    order = np.arange(len(startprob) * frames).reshape(len(startprob), frames).T.ravel()
    start, move, owner = minimum(startprob, transmat, frames)
    return start[order], move[np.ix_(order, order)], owner[order]


def staying_anywhere(startprob, transmat, frames):
    start, move, owner = minimum(startprob, transmat, frames)
    return start, (move + np.eye(len(move))) / 2, owner


def starting_anywhere(startprob, transmat, frames):
    _, move, owner = minimum(startprob, transmat, frames)
    return np.repeat(startprob, frames) / frames, move, owner


def never_staying(startprob, transmat, frames):
    start, move, owner = minimum(startprob, transmat, frames)
    if frames > 1:
        np.fill_diagonal(move, 0)
        move /= move.sum(1, keepdims=True)
    return start, move, owner


def leaving_at_once(startprob, transmat, frames):
    start, _, owner = minimum(startprob, transmat, frames)
    return start, transmat[np.ix_(owner, owner)] / frames, owner


def entering_late(startprob, transmat, frames):
    """From last copy to last copy."""
    start, move, owner = minimum(startprob, transmat, frames)
    last = frames * np.arange(len(startprob)) + frames - 1
    move[last] = 0
    move[np.ix_(last, last)] = transmat
    return start, move, owner


def unnormalised(startprob, transmat, frames):
    start, move, owner = minimum(startprob, transmat, frames)
    return start, move * 0.9, owner


def test_a_minimum_duration_passes():
    assert check_minimum(minimum)
    assert check_minimum(by_column)


def test_without_a_minimum_paths_have_their_probability():
    start, move = np.array([0.7, 0.3]), np.array([[0.6, 0.4], [0.25, 0.75]])
    assert owner_probability((0, 1, 1), start, move, 1) == pytest.approx(0.7 * 0.4 * 0.75)
    assert owner_probability((0, 1, 0), start, move, 2) == 0


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda *given: None, "return three arrays"),
        (lambda start, move, frames: (start, move, np.arange(2)), "expected shapes (4,)"),
        (lambda *given: (*minimum(*given)[:2], np.zeros(2 * given[2], int)), "each of 2 states"),
        (unnormalised, "row 0 of the transitions is no distribution"),
        (staying_anywhere, "expected"),
        (starting_anywhere, "start at the first copy"),
        (never_staying, "may the last copy stay"),
        (leaving_at_once, "step on for sure"),
        (entering_late, "a run of 1 frame(s) is too short"),
    ],
)
def test_usual_mistakes_with_the_minimum_are_named(answer, hint, capsys):
    assert not check_minimum(answer)
    assert hint in capsys.readouterr().out
