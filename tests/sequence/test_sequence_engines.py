"""Each engine by itself, its operators, and tracing."""

import pytest
import torch
from enumeration import enumerate_paths, random_problem
from torch.utils._python_dispatch import TorchDispatchMode

from tfswa_lab.memory import trace
from tfswa_lab.sequence import compiled_engine, inference, log_engine, tensor_engine
from tfswa_lab.sequence.inputs import Problem, checked

ENGINES = [compiled_engine, tensor_engine, log_engine]
NAMES = ["compiled", "tensor", "log"]
# At T = 1000, K = 5, B = 32.
MOST_OPERATORS = 450


class Operators(TorchDispatchMode):
    """Counts operators that compute; views, which only describe memory anew, are free."""

    def __enter__(self):
        self.number = 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aliases = any(result.alias_info for result in function._schema.returns)
        writes = any(
            argument.alias_info and argument.alias_info.is_write
            for argument in function._schema.arguments
        )
        if (not aliases or writes) and "view" not in str(function):  # _unsafe_view is one as well
            self.number += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("engine", ENGINES, ids=NAMES)
@pytest.mark.parametrize("varies", [False, True])
def test_equals_all_paths(engine, varies):
    """Also the tensor engine by itself, with zeros: `torch.compile` calls it so."""
    for seed in range(12):
        problem, _ = checked(*random_problem(seed, varies=varies))
        likelihood = engine.log_likelihood(problem)
        forwards = engine.filtered(problem)[1]
        smoothed = engine.smoothed(problem)
        states, scores = engine.viterbi(problem)
        for row, length in enumerate(problem.lengths.tolist()):
            transmat = problem.transmat[row, : length - 1] if varies else problem.transmat
            right = enumerate_paths(
                problem.log_emissions[row, :length], problem.startprob, transmat
            )
            if right is None:
                assert float(likelihood[row]) == float(scores[row]) == -torch.inf
                continue
            close = {"rtol": 0, "atol": 1e-10}
            torch.testing.assert_close(likelihood[row], right.log_likelihood, **close)
            torch.testing.assert_close(smoothed.log_likelihood[row], right.log_likelihood, **close)
            torch.testing.assert_close(smoothed.states[row, :length], right.states, **close)
            torch.testing.assert_close(forwards[row, :length], right.filtered, **close)
            counts = smoothed.transitions[row].sum(0) if varies else smoothed.transitions[row]
            torch.testing.assert_close(counts, right.transitions, **close)
            assert float(scores[row]) == pytest.approx(float(right.scores[0]), abs=1e-10)
            assert right.paths.index(tuple(states[row, :length].tolist())) < sum(
                score > right.scores[0] - 1e-9 for score in right.scores
            )
            assert bool((states[row, length:] == -1).all())
            assert bool((smoothed.states[row, length:] == 0).all())


@pytest.mark.parametrize("states", [2, 5, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_engines_agree_over_many_blocks(states, dtype):
    torch.manual_seed(states)
    emissions = 3 * torch.randn(3, 400, states, dtype=dtype)
    transmat = torch.randn(states, states, dtype=dtype).softmax(-1)
    problem, _ = checked(emissions, transmat[0], transmat, torch.tensor([400, 399, 37]))
    right = log_engine.smoothed(problem)
    path, score = log_engine.viterbi(problem)
    for engine in (compiled_engine, tensor_engine):
        found = engine.smoothed(problem)
        tolerance = 3e-5 if dtype == torch.float32 else 1e-11
        torch.testing.assert_close(
            found.log_likelihood, right.log_likelihood, rtol=tolerance / 100, atol=0
        )
        for name in ("states", "transitions"):
            ours, theirs = getattr(found, name).double(), getattr(right, name)
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        found_path, found_score = engine.viterbi(problem)
        assert torch.equal(found_path, path)
        torch.testing.assert_close(found_score, score, rtol=1e-9, atol=0)


@pytest.mark.parametrize("engine", [compiled_engine, tensor_engine], ids=NAMES[:2])
def test_float32_keeps_its_digits_in_a_long_sequence(engine):
    """The posteriors depend on sums over all later frames, which must not be rounded to float32."""
    generator = torch.Generator().manual_seed(0)
    emissions = 3 * torch.randn(1, 20_000, 5, generator=generator)
    move = torch.randn(5, 5, generator=generator).softmax(-1)
    problem, _ = checked(emissions, move[0], move, None)
    exact = problem._replace(
        log_emissions=emissions.double(), startprob=move[0].double(), transmat=move.double()
    )
    right, found = compiled_engine.smoothed(exact), engine.smoothed(problem)
    torch.testing.assert_close(found.states.double(), right.states, rtol=0, atol=2e-6)
    torch.testing.assert_close(found.log_likelihood, right.log_likelihood, rtol=1e-7, atol=0)
    forwards = engine.filtered(problem)[1].double()
    torch.testing.assert_close(forwards, compiled_engine.filtered(exact)[1], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("engine", "frames"), [(tensor_engine, 100_000), (log_engine, 300)])
def test_independent_frames(engine, frames):
    """All rows of the transitions equal the start: a closed form, also for one frame."""
    start = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    emissions = torch.randn(2, frames, 3, generator=generator, dtype=torch.float64) - 3
    problem, _ = checked(emissions, start, start.expand(3, 3), torch.tensor([frames, 1]))
    joint = emissions + start.log()
    padding = torch.zeros(2, frames, dtype=torch.bool)
    padding[1, 1:] = True
    total = joint.logsumexp(-1).masked_fill(padding, 0)
    best = joint.amax(-1).masked_fill(padding, 0)
    smoothed = engine.smoothed(problem)
    torch.testing.assert_close(smoothed.log_likelihood, total.sum(-1), rtol=1e-12, atol=0)
    right = joint.softmax(-1).masked_fill(padding[..., None], 0)
    torch.testing.assert_close(smoothed.states, right, rtol=0, atol=1e-11)
    assert bool((smoothed.transitions[1] == 0).all())
    states, score = engine.viterbi(problem)
    torch.testing.assert_close(score, best.sum(-1), rtol=1e-12, atol=0)
    assert torch.equal(states, joint.argmax(-1).masked_fill(padding, -1))


@pytest.mark.parametrize("every", [None, 2])
def test_log_engine_has_two_derivatives_at_hard_zeros(every):
    generator = torch.Generator().manual_seed(1)
    emissions = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    emissions[0, 2, 1], emissions[1, 3:] = -torch.inf, torch.nan
    move = torch.tensor([[0.6, 0.4, 0], [0.2, 0.3, 0.5], [0, 0.1, 0.9]], dtype=torch.float64)
    lengths = torch.tensor([5, 3])

    def score(values, transmat):
        seen = torch.where(emissions.isfinite(), values, emissions)
        problem = Problem(seen, move[0], torch.where(move > 0, transmat, 0), lengths)
        return log_engine.log_likelihood(problem, every)

    values = emissions.nan_to_num(0, 0, 0).requires_grad_()
    inputs = (values, move.clone().requires_grad_())
    assert torch.autograd.gradcheck(score, inputs)
    assert torch.autograd.gradgradcheck(score, inputs)
    leaf = emissions.clone().requires_grad_()  # -inf and NaN themselves have a gradient of 0
    problem = Problem(leaf, move[0], move, lengths)
    log_engine.log_likelihood(problem, every).sum().backward()
    right = log_engine.smoothed(problem.detached()).states
    torch.testing.assert_close(leaf.grad, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", ["log_likelihood", "filtered", "smoothed", "viterbi"])
def test_blocks_need_few_operators(function):
    emissions, move = torch.randn(32, 1000, 5), torch.rand(5, 5).softmax(-1)
    problem, _ = checked(emissions, move[0], move, None)
    with Operators() as operators:
        getattr(tensor_engine, function)(problem)
    assert operators.number <= MOST_OPERATORS


def test_a_loop_needs_many_operators():
    """So that the count above means something."""
    problem, _ = checked(torch.randn(2, 100, 2), torch.ones(2) / 2, torch.ones(2, 2) / 2, None)
    with Operators() as operators:
        log_engine.log_likelihood(problem)
    assert operators.number > 4 * 100


def score(emissions, startprob, transmat):
    return inference.log_likelihood(emissions, startprob, transmat, method="tensor")


def decode(emissions, startprob, transmat):
    return inference.viterbi(emissions, startprob, transmat, method="tensor").states


@pytest.mark.parametrize("function", [score, decode])
def test_it_can_be_compiled_and_exported(function):
    move = torch.rand(3, 3).softmax(-1)
    arguments = (torch.randn(2, 20, 3), move[0], move)
    expected = function(*arguments)
    # aot_eager traces all operators; making machine code of them takes half a minute.
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), expected)

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return function(*inputs)

    free = (({0: torch.export.Dim("sequences")}, None, None),)
    program = torch.export.export(Module(), arguments, dynamic_shapes=free)
    more = (torch.randn(5, 20, 3), *arguments[1:])
    torch.testing.assert_close(program.module()(*more), function(*more))


def test_gradients_go_through_a_compiled_score():
    move = torch.rand(3, 3).softmax(-1)
    emissions = torch.randn(2, 20, 3, requires_grad=True)
    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    compiled(emissions, move[0], move).sum().backward()
    right = inference.posteriors(emissions, move[0], move).states
    torch.testing.assert_close(emissions.grad, right, rtol=0, atol=1e-5)


def test_checkpoints_lower_the_peak():
    """One checkpoint around everything does not: the backward pass computes all of it again."""
    emissions = torch.randn(2, 100, 24, dtype=torch.float64, requires_grad=True)
    move = torch.rand(24, 24).softmax(-1)
    peaks = {}
    for every in (None, 1000, 10):

        def step(every=every):
            problem, _ = checked(emissions, move[0], move, None)
            log_engine.log_likelihood(problem, every).sum().backward()
            emissions.grad = None

        step()
        with trace() as run:
            step()
        peaks[every] = max(run.timeline().allocated())
    assert peaks[1000] > 0.95 * peaks[None]
    assert peaks[10] < peaks[None] / 3
