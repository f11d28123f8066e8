"""Explicit durations against all segmentations, and against hidden Markov models."""

import pytest
import torch
from enumeration import enumerate_paths

from tfswa_lab.sequence import hsmm, inference


def segmentations(emissions, startprob, transmat, durations, survival=None):
    """All segmentations of one sequence: log weights and lists of (state, duration)."""
    emissions, start = emissions.double(), startprob.double().log()
    steps, laws = transmat.double().log(), durations.double().log()
    last = laws if survival is None else survival.double().log()
    frames, states = emissions.shape
    found = []

    def extend(t, weight, segments):
        for state in range(states):
            entered = start[state] if not segments else steps[segments[-1][0], state]
            for duration in range(1, min(durations.shape[1], frames - t) + 1):
                law = (last if t + duration == frames else laws)[state, duration - 1]
                seen = emissions[t : t + duration, state].sum()
                total = weight + entered + law + seen
                if total == -torch.inf:
                    continue
                whole = [*segments, (state, duration)]
                if t + duration == frames:
                    found.append((float(total), whole))
                else:
                    extend(t + duration, total, whole)

    extend(0, torch.tensor(0.0, dtype=torch.float64), [])
    return sorted(found, key=lambda pair: -pair[0])


def random_problem(seed, spread=1.0):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    states, longest, frames = int(2 + 2 * rand(1)), int(1 + 4 * rand(1)), int(1 + 6 * rand(1))
    transmat = rand(states, states) * (rand(states, states) > 1 / 3)
    if seed % 3:
        transmat.fill_diagonal_(0.0)
    transmat = torch.where(transmat.sum(1, keepdim=True) > 0, transmat, 1.0)
    durations = rand(states, longest) * (rand(states, longest) > 1 / 3)
    durations[:, -1] += 0.1
    emissions = spread * torch.randn(3, frames, states, generator=generator).double()
    emissions[rand(3, frames, states) < 0.1] = -torch.inf
    lengths = (1 + rand(3) * frames).long()
    for row, length in enumerate(lengths.tolist()):
        emissions[row, length:] = torch.nan
    start = rand(states)
    return (
        emissions,
        start / start.sum(),
        transmat / transmat.sum(1, keepdim=True),
        durations / durations.sum(1, keepdim=True),
        lengths,
    )


@pytest.mark.parametrize("censored", [False, True])
@pytest.mark.parametrize("spread", [1.0, 900.0])
def test_equals_all_segmentations(censored, spread):
    possible = 0
    for seed in range(40):
        emissions, startprob, transmat, durations, lengths = random_problem(seed, spread)
        options = {"right_censored": censored}
        found = hsmm.log_likelihood(emissions, startprob, transmat, durations, lengths, **options)
        survival = hsmm.survival_of(durations)
        for row, length in enumerate(lengths.tolist()):
            one = (emissions[row, :length], startprob, transmat, durations)
            right = segmentations(*one, survival if censored else None)
            if not right:
                assert float(found[row]) == -torch.inf
                with pytest.raises(ValueError, match=r"sequence 0 .* durations of"):
                    hsmm.posteriors(*one, **options)
                continue
            possible += 1
            scores = torch.tensor([score for score, _ in right], dtype=torch.float64)
            total = scores.logsumexp(0)
            assert float(found[row]) == pytest.approx(float(total), rel=1e-11, abs=1e-11)
            expected = expectations(right, (scores - total).exp(), one, survival, censored)
            smoothed = hsmm.posteriors(*one, **options)
            for ours, theirs in zip(smoothed[:3], expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
                assert bool((ours[theirs == 0] == 0).all())
            best = hsmm.viterbi(*one, **options)
            assert float(best.log_probability) == pytest.approx(right[0][0], rel=1e-11, abs=1e-11)
            cut = [tuple(segment) for segment in best.segments[0].tolist()]
            assert {tuple(s): w for w, s in right}[tuple(cut)] == pytest.approx(right[0][0])
            path = [state for state, duration in cut for _ in range(duration)]
            assert best.states.tolist() == path
    assert possible > 40


def expectations(right, probabilities, one, survival, censored):
    frames, states = one[0].shape
    durations = one[3]
    posterior = torch.zeros(frames, states, dtype=torch.float64)
    transitions = torch.zeros(states, states, dtype=torch.float64)
    counts = torch.zeros_like(durations)
    for (_, segments), probability in zip(right, probabilities, strict=True):
        t = 0
        for place, (state, duration) in enumerate(segments):
            posterior[t : t + duration, state] += probability
            t += duration
            if place:
                transitions[segments[place - 1][0], state] += probability
            if censored and t == frames:
                rest = durations[state, duration - 1 :] / survival[state, duration - 1]
                counts[state, duration - 1 :] += probability * rest
            else:
                counts[state, duration - 1] += probability
    return posterior, transitions, counts


def test_padding_and_batches_do_not_matter():
    emissions, startprob, transmat, durations, lengths = random_problem(4)
    emissions = emissions.clamp(min=-5)
    options = {"right_censored": True}
    whole = hsmm.posteriors(emissions, startprob, transmat, durations, lengths, **options)
    path = hsmm.viterbi(emissions, startprob, transmat, durations, lengths, **options)
    for row, length in enumerate(lengths.tolist()):
        alone = hsmm.posteriors(emissions[row, :length], startprob, transmat, durations, **options)
        torch.testing.assert_close(whole.states[row, :length], alone.states)
        assert bool((whole.states[row, length:] == 0).all())
        assert bool((path.states[row, length:] == -1).all())


def test_sampled_paths_have_the_right_frequencies():
    torch.manual_seed(0)
    emissions = torch.randn(5, 2).double()
    move = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()
    durations = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.0, 0.4]]).double()
    start = torch.tensor([0.7, 0.3]).double()
    for censored in (False, True):
        survival = hsmm.survival_of(durations)
        right = segmentations(emissions, start, move, durations, survival if censored else None)
        scores = torch.tensor([score for score, _ in right]).double().softmax(0)
        drawn = hsmm.sample_paths(
            emissions, start, move, durations, num_samples=4000, right_censored=censored,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        drawn = [tuple(path) for path in drawn.tolist()]
        for (_, segments), probability in zip(right[:4], scores[:4].tolist(), strict=True):
            path = tuple(state for state, duration in segments for _ in range(duration))
            share = drawn.count(path) / 4000
            assert abs(share - probability) < 5 * (probability * (1 - probability) / 4000) ** 0.5


@pytest.mark.parametrize("censored", [False, True])
def test_gradients(censored):
    emissions, startprob, transmat, durations, lengths = random_problem(7)
    logs = [tensor.clamp(min=0.05).log() for tensor in (startprob, transmat, durations)]
    emissions = emissions.nan_to_num(0.0, neginf=-2.0)

    def score(emissions, start, steps, laws):
        probabilities = [tensor.softmax(-1) for tensor in (start, steps, laws)]
        return hsmm.log_likelihood(emissions, *probabilities, lengths, right_censored=censored)

    inputs = [tensor.clone().requires_grad_() for tensor in (emissions, *logs)]
    assert torch.autograd.gradcheck(score, inputs)


def test_geometric_durations_are_a_hidden_markov_model():
    torch.manual_seed(0)
    move = torch.rand(3, 3).double() + torch.eye(3)
    move /= move.sum(1, keepdim=True)
    stay, start = move.diagonal(), move[0]
    leave = move.clone().fill_diagonal_(0)
    leave /= leave.sum(1, keepdim=True)
    emissions = 3 * torch.randn(200, 3).double()
    ages = torch.arange(200)
    survival = stay[:, None] ** ages
    durations = survival * (1 - stay[:, None])
    options = {"right_censored": True, "survival": survival}
    found = hsmm.posteriors(emissions, start, leave, durations, **options)
    right = inference.posteriors(emissions, start, move)
    torch.testing.assert_close(found.log_likelihood, right.log_likelihood)
    torch.testing.assert_close(found.states, right.states, rtol=0, atol=1e-9)


def test_durations_of_one_frame_are_a_hidden_markov_model_without_stays():
    torch.manual_seed(0)
    move = torch.rand(3, 3).double().fill_diagonal_(0)
    move /= move.sum(1, keepdim=True)
    emissions = torch.randn(6, 3).double()
    found = hsmm.posteriors(emissions, move[0], move, torch.ones(3, 1).double())
    right = enumerate_paths(emissions, move[0], move)
    torch.testing.assert_close(found.states, right.states)


def test_a_long_sequence_with_a_wide_range():
    """A plain loop in log space is the reference; 300 nats between states, minimum durations."""
    torch.manual_seed(0)
    emissions = 300 * torch.randn(300, 3).double()
    move = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.5, 0.5, 0.0]]).double()
    durations = torch.rand(3, 12).double()
    durations[:, :4] = 0
    durations /= durations.sum(1, keepdim=True)
    before = torch.cat([torch.zeros(1, 3).double(), emissions.cumsum(0)])
    enter, starts = torch.tensor([1.0, 0.0, 0.0]).double().log(), []
    for t in range(300):
        starts.append(enter - before[t])
        window = torch.stack(starts[-12:][::-1], 1)
        end = (window + durations[:, : window.shape[1]].log()).logsumexp(1) + before[t + 1]
        enter = (end[:, None] + move.log()).logsumexp(0)
    found = hsmm.log_likelihood(emissions, torch.tensor([1.0, 0.0, 0.0]), move, durations)
    assert float(found) == pytest.approx(float(end.logsumexp(0)), rel=1e-11)
    smoothed = hsmm.posteriors(emissions, torch.tensor([1.0, 0.0, 0.0]), move, durations)
    torch.testing.assert_close(smoothed.states.sum(1), torch.ones(300).double(), rtol=0, atol=1e-8)
    frames = smoothed.durations.sum(0) @ torch.arange(1, 13).double()
    assert float(frames) == pytest.approx(300, abs=1e-6)


def test_bad_input_is_named():
    move = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    given = (torch.zeros(4, 2), torch.tensor([0.5, 0.5]), move)
    with pytest.raises(ValueError, match=r"durations row 1 sums to 0\.5"):
        hsmm.log_likelihood(*given, torch.tensor([[1.0, 0.0], [0.5, 0.0]]))
    with pytest.raises(ValueError, match=r"durations have shape \(3, 2\)"):
        hsmm.log_likelihood(*given, torch.ones(3, 2) / 2)
    with pytest.raises(ValueError, match="survival has shape"):
        hsmm.log_likelihood(*given, torch.ones(2, 2) / 2, survival=torch.ones(2, 3))
