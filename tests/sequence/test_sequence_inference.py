"""The public functions against all paths, for random models, and against physics."""

import pytest
import torch
from enumeration import enumerate_paths, random_problem

from tfswa_lab.sequence import compiled_engine
from tfswa_lab.sequence.inference import (
    filter,
    log_likelihood,
    posteriors,
    sample_paths,
    viterbi,
)

METHODS = ("auto", "tensor", "log")


def rows(problem):
    """Each sequence without its padding."""
    emissions, startprob, transmat, lengths = problem
    for row, length in enumerate(lengths.tolist()):
        steps = transmat if transmat.ndim == 2 else transmat[row, : length - 1]
        yield row, length, enumerate_paths(emissions[row, :length], startprob, steps)


def possible(problem):
    """The problem without the sequences that no path explains."""
    emissions, startprob, transmat, lengths = problem
    keep = [row for row, _, right in rows(problem) if right is not None]
    transmat = transmat if transmat.ndim == 2 else transmat[keep]
    return emissions[keep], startprob, transmat, lengths[keep]


@pytest.mark.parametrize("method", [*METHODS, "side by side"])
@pytest.mark.parametrize("varies", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_all_paths(method, varies, dtype, monkeypatch):
    if method == "side by side":  # as many sequences are computed; few go one by one
        monkeypatch.setattr(compiled_engine, "_are_few", lambda problem: False)
        method = "compiled"
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    for seed in range(12):
        problem = random_problem(seed, dtype, varies, spread=1.0 if seed % 2 else 30.0)
        found = log_likelihood(*problem, method=method)
        for row, _, right in rows(problem):
            expected = -torch.inf if right is None else float(right.log_likelihood)
            assert float(found[row]) == pytest.approx(expected, rel=tolerance, abs=tolerance)
        problem = possible(problem)
        if not len(problem[0]):
            continue
        smoothed = posteriors(*problem, method=method)
        forwards = filter(*problem, method=method)
        path = viterbi(*problem, method=method)
        for row, length, right in rows(problem):
            close = {"rtol": 0, "atol": tolerance}
            torch.testing.assert_close(
                smoothed.states[row, :length].double(), right.states, **close
            )
            torch.testing.assert_close(
                smoothed.transitions[row].double(), right.transitions, **close
            )
            torch.testing.assert_close(
                forwards.states[row, :length].double(), right.filtered, **close
            )
            assert bool((smoothed.states[row, :length][right.states == 0] == 0).all())
            assert bool((smoothed.transitions[row][right.transitions == 0] == 0).all())
            assert bool((smoothed.states[row, length:] == 0).all())
            assert bool((forwards.states[row, length:] == 0).all())
            assert bool((path.states[row, length:] == -1).all())
            score = float(right.scores[0])
            assert float(path.log_probability[row]) == pytest.approx(score, rel=tolerance)
            place = right.paths.index(tuple(path.states[row, :length].tolist()))
            assert float(right.scores[place]) == pytest.approx(score, rel=tolerance)


@pytest.mark.parametrize("varies", [False, True])
def test_best_paths_are_the_best_and_different(varies):
    for seed in range(8):
        problem = possible(random_problem(seed, varies=varies))
        if not len(problem[0]):
            continue
        found = viterbi(*problem, k=12)
        for row, length, right in rows(problem):
            number = min(12, len(right.paths))
            torch.testing.assert_close(
                found.log_probability[row, :number], right.scores[:number].double()
            )
            assert bool((found.log_probability[row, number:] == -torch.inf).all())
            paths = [tuple(path[:length].tolist()) for path in found.states[row, :number]]
            assert len(set(paths)) == number
            assert bool((found.states[row, number:] == -1).all())


def test_sampled_paths_have_the_right_frequencies():
    problem = possible(random_problem(5))
    paths = sample_paths(*problem, num_samples=20_000, generator=torch.Generator().manual_seed(0))
    for row, length, right in rows(problem):
        drawn = [tuple(path[:length].tolist()) for path in paths[row]]
        for path, probability in zip(right.paths[:5], right.probabilities[:5], strict=False):
            deviation = (probability * (1 - probability) / 20_000) ** 0.5
            share = drawn.count(path) / 20_000
            assert abs(share - float(probability)) < 5 * float(deviation) + 1e-9
        assert set(drawn) <= set(right.paths)


@pytest.mark.parametrize("method", METHODS)
def test_gradients(method):
    emissions, startprob, transmat, lengths = (
        tensor if tensor.dtype == torch.int64 else tensor.clone()
        for tensor in random_problem(3, batch=2)
    )
    emissions = emissions.nan_to_num(0.0, neginf=-3.0).requires_grad_()
    start = (startprob + 0.1).log().requires_grad_()
    steps = (transmat + 0.1).log().requires_grad_()

    def score(emissions, start, steps):
        return log_likelihood(
            emissions, start.softmax(-1), steps.softmax(-1), lengths, method=method
        )

    assert torch.autograd.gradcheck(score, (emissions, start, steps))


@pytest.mark.parametrize("method", METHODS)
def test_hard_zeros_have_gradients_without_nan(method):
    logits = torch.tensor([[0.3, 0.1], [-torch.inf, 0.0]], requires_grad=True)
    start = torch.tensor([0.0, -torch.inf], requires_grad=True)
    emissions = torch.randn(3, 6, 2) * 50
    log_likelihood(emissions, start.softmax(-1), logits.softmax(-1), method=method).sum().backward()
    for tensor in (logits, start):
        assert bool(tensor.grad.isfinite().all())
    assert float(logits.grad[1, 0]) == 0


def test_a_sequence_without_a_path_has_no_gradient():
    emissions = torch.zeros(2, 3, 2)
    emissions[1, 2] = -torch.inf
    emissions.requires_grad_()
    move = torch.full((2, 2), 0.5)
    found = log_likelihood(emissions, move[0], move)
    with pytest.raises(ValueError, match=r"sequence 1 .* frame 2"):
        found.sum().backward()
    log_likelihood(emissions, move[0], move)[0].backward()
    assert bool(emissions.grad.isfinite().all())


def test_checkpoints_change_nothing_and_allow_second_derivatives():
    emissions = torch.randn(2, 30, 3, dtype=torch.float64, requires_grad=True)
    move = (torch.randn(3, 3).double()).softmax(-1)
    plain = log_likelihood(emissions, move[0], move, method="log")
    (expected,) = torch.autograd.grad(plain.sum(), emissions)
    pieces = log_likelihood(emissions, move[0], move, method="log", checkpoint_every=6)
    (found,) = torch.autograd.grad(pieces.sum(), emissions, create_graph=True)
    torch.testing.assert_close(found, expected)
    assert bool(torch.autograd.grad(found.square().sum(), emissions)[0].isfinite().all())
    with pytest.raises(ValueError, match="method='log'"):
        log_likelihood(emissions, move[0], move, checkpoint_every=6)


def test_the_batch_does_not_matter():
    torch.manual_seed(0)
    emissions = torch.randn(40, 60, 4)
    move = torch.rand(4, 4).softmax(-1)
    whole = posteriors(emissions, move[0], move)
    alone = posteriors(emissions[7], move[0], move)
    torch.testing.assert_close(whole.states[7], alone.states, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole.log_likelihood[7], alone.log_likelihood)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_rounded_to_zero_that_matters(method, dtype):
    """One state is far below the other, and the only one that can go on."""
    emissions = torch.zeros(20, 2, dtype=dtype)
    emissions[:10, 0] = -900.0  # far more than either precision spans
    emissions[10:, 1] = -torch.inf
    stay = torch.eye(2, dtype=dtype)
    start = torch.tensor([0.5, 0.5], dtype=dtype)
    found = log_likelihood(emissions, start, stay, method=method)
    assert float(found) == pytest.approx(-9000 - 0.6931, rel=1e-6)
    states = posteriors(emissions, start, stay, method=method).states
    assert bool((states[:, 0] == 1).all())


def test_fallback_is_for_the_sequences_that_need_it():
    """In one of them, the start is far below the state that the first frame shouts for."""
    torch.manual_seed(0)
    emissions = torch.randn(3, 50, 3)
    emissions[1, 0] = torch.tensor([-300.0, 0.0, 0.0])
    move = torch.full((3, 3), 1 / 3)
    start = torch.tensor([1.0, 0.0, 0.0])
    found = log_likelihood(emissions, start, move)
    exact = emissions[:, 0, 0] + (emissions[:, 1:].logsumexp(-1) - torch.tensor(3.0).log()).sum(-1)
    torch.testing.assert_close(found, exact)


def test_half_precision_is_computed_in_float32():
    emissions = torch.randn(2, 100, 3)
    move = torch.full((3, 3), 1 / 3)
    found = log_likelihood(emissions.bfloat16(), move[0], move)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, log_likelihood(emissions.bfloat16().float(), move[0], move))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_emissions": torch.zeros(3)}, "log_emissions has shape"),
        ({"log_emissions": torch.zeros(2, 4, 3, dtype=torch.int64)}, "expected a float"),
        ({"startprob": torch.tensor([0.5, 0.5, 0.5])}, r"startprob sums to 1\.5"),
        ({"startprob": torch.tensor([1.5, -0.5, 0.0])}, r"startprob\[1\] is -0\.5"),
        ({"transmat": torch.zeros(2, 2)}, r"transmat has shape \(2, 2\)"),
        ({"lengths": torch.tensor([4.0, 4.0])}, "lengths has shape"),
        ({"method": "fast"}, "method is 'fast'"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {
        "log_emissions": torch.zeros(2, 4, 3),
        "startprob": torch.full((3,), 1 / 3),
        "transmat": torch.full((3, 3), 1 / 3),
    }
    with pytest.raises(ValueError, match=message):
        log_likelihood(**given | change)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_emission_that_cannot_be_is_named(value):
    emissions = torch.zeros(2, 4, 3)
    emissions[1, 2, 0] = value
    move = torch.full((3, 3), 1 / 3)
    with pytest.raises(ValueError, match="sequence 1, frame 2, state 0"):
        log_likelihood(emissions, move[0], move)
