"""Networks as emissions, and batches of unequal lengths."""

import pytest
import torch
from enumeration import enumerate_paths
from torch import nn
from torch.utils.data import DataLoader

from tfswa_lab.sequence.inference import log_likelihood
from tfswa_lab.sequence.neural import NeuralHMM, scaled_likelihoods
from tfswa_lab.sequence.padding import BucketSampler, collate_padded, pad_sequences


class Transitions(nn.Module):
    """A context of `(b, t - 1, 2)` as logits of transitions."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 9)

    def forward(self, context):
        return self.layer(context).unflatten(-1, (3, 3))


def a_batch():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    context = torch.randn(3, 4, 2, dtype=torch.float64)
    return x, torch.tensor([5, 1, 3]), context


def test_a_posterior_of_given_states_is_that_of_all_paths():
    x, lengths, context = a_batch()
    model = NeuralHMM(nn.Linear(4, 3), 3, Transitions()).double()
    states = torch.tensor([[0, 2, 1, 1, 0], [2, -1, -1, -1, -1], [1, 1, 2, -1, 7]])
    found = model.log_posterior(x, states, lengths, context)
    emissions, transmat = model.network(x), model.transmat(context)
    for row, length in enumerate(lengths.tolist()):
        right = enumerate_paths(
            emissions[row, :length].detach(),
            model.startprob.detach(),
            transmat[row, : length - 1].detach(),
        )
        place = right.paths.index(tuple(states[row, :length].tolist()))
        expected = float(right.probabilities[place].log())
        assert float(found[row]) == pytest.approx(expected, abs=1e-9)
    with pytest.raises(ValueError, match="state 7 in sequence 0, frame 1"):
        model.log_posterior(x, torch.where(states == 2, 7, states), lengths, context)


def test_padding_gives_no_gradient_and_no_nan():
    x, lengths, context = a_batch()
    x[1, 1:] = torch.nan
    context[1] = torch.nan
    model = NeuralHMM(nn.Linear(4, 3), 3, Transitions()).double()
    model.score(x.nan_to_num(), lengths, context.nan_to_num()).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    states = torch.zeros(3, 5, dtype=torch.int64)
    model.log_posterior(x.nan_to_num(), states, lengths, context.nan_to_num()).sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
    emissions = model.network(x).detach()
    move = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    emissions.requires_grad_()
    log_likelihood(emissions, move[0], move, lengths).sum().backward()
    assert bool((emissions.grad[1, 1:] == 0).all())
    assert all(bool(gradient.isfinite().all()) for gradient in expected)


def test_training_by_the_exact_likelihood_learns_the_states():
    torch.manual_seed(0)
    states = (torch.arange(60) // 10 % 2).expand(4, 60)
    x = torch.randn(4, 60, 4) + 2 * states[..., None]
    model = NeuralHMM(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = -model.log_posterior(x, states).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 10
    assert float((model.viterbi(x).states == states).double().mean()) > 0.98


def test_a_classifier_is_divided_by_its_priors():
    """Bayes: p(z | x) / p(z) is p(x | z) / p(x), and p(x) is the same for all paths."""
    emissions = torch.randn(7, 3, dtype=torch.float64)
    priors = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    classified = (emissions + priors.log()).log_softmax(-1)
    found = scaled_likelihoods(classified, priors)
    torch.testing.assert_close(found.log_softmax(-1), emissions.log_softmax(-1))
    model = NeuralHMM(nn.Identity(), 3, priors=priors).double()
    torch.testing.assert_close(model.log_emissions(classified), found)
    with pytest.raises(ValueError, match="prior of state 1 is 0"):
        scaled_likelihoods(classified, torch.tensor([0.5, 0.0, 0.5]))


def test_a_context_is_used_or_refused():
    x, lengths, context = a_batch()
    with pytest.raises(ValueError, match="none is given"):
        NeuralHMM(nn.Linear(4, 3), 3, Transitions()).double().score(x, lengths)
    with pytest.raises(ValueError, match="no network for transitions"):
        NeuralHMM(nn.Linear(4, 3), 3).double().score(x, lengths, context)
    with pytest.raises(ValueError, match=r"network gives \(3, 5, 2\)"):
        NeuralHMM(nn.Linear(4, 2), 3).double().score(x, lengths)


def test_a_loader_pads_and_buckets():
    sequences = [torch.full((length, 2), float(length)) for length in (5, 1, 4, 2)]
    items = [(sequence, torch.arange(len(sequence)), len(sequence)) for sequence in sequences]
    sampler = BucketSampler([5, 1, 4, 2], 2, torch.Generator().manual_seed(0))
    seen = []
    for x, lengths, states, number in DataLoader(
        items, batch_sampler=sampler, collate_fn=collate_padded
    ):
        assert x.shape[1] == int(lengths.max()) == states.shape[1]
        assert torch.equal((states >= 0).sum(1), lengths)
        assert torch.equal(number, lengths)
        seen += lengths.tolist()
    assert sorted(seen) == [1, 2, 4, 5]
    assert sorted(map(sorted, sampler.batches)) == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "no sequences"),
        ([torch.zeros(3, 2), torch.zeros(0, 2)], "sequence 1 has no frames"),
        ([torch.zeros(3, 2), torch.zeros(3, 4)], "frames of sequence 1"),
    ],
)
def test_sequences_that_cannot_be_padded(sequences, message):
    with pytest.raises(ValueError, match=message):
        pad_sequences(sequences)
