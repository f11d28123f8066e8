"""Sequences side by side give what each gives alone, and what is not safe goes alone."""

import pytest
import torch

from tfswa_lab.sequence import hsmm


def a_batch(spread=1.0, sequences=37, frames=150, states=3, longest=7, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    emissions = spread * torch.randn(sequences, frames, states, generator=generator).double()
    move = rand(states, states).fill_diagonal_(0)
    laws = rand(states, longest)
    laws[:, 0] = 0
    lengths = 2 + (rand(sequences) * (frames - 1)).long()
    for row, length in enumerate(lengths.tolist()):
        emissions[row, length:] = torch.nan if row % 2 else torch.inf
    start = torch.tensor([1.0] + [0.0] * (states - 1)).double()
    model = (start, move / move.sum(1, keepdim=True), laws / laws.sum(1, keepdim=True))
    return emissions, model, lengths


def alone(emissions, model, lengths, **options):
    rows = (emissions[row, :length] for row, length in enumerate(lengths.tolist()))
    return torch.stack([hsmm.log_likelihood(row, *model, **options) for row in rows])


@pytest.mark.parametrize("censored", [False, True])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 900.0])
@pytest.mark.parametrize("longest", [2, 4, 7, 200])
def test_a_batch_is_its_sequences(censored, spread, longest):
    emissions, model, lengths = a_batch(spread, longest=longest)
    options = {"right_censored": censored}
    found = hsmm.log_likelihood(emissions, *model, lengths, **options)
    right = alone(emissions, model, lengths, **options)
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)


def test_impossible_states_and_frames():
    emissions, model, lengths = a_batch(sequences=20)
    emissions[::2][torch.rand(10, 150, 3, generator=torch.Generator()) < 0.05] = -torch.inf
    emissions[3, 0] = -torch.inf
    for row, length in enumerate(lengths.tolist()):
        emissions[row, length:] = torch.nan
    found = hsmm.log_likelihood(emissions, *model, lengths, right_censored=True)
    right = alone(emissions, model, lengths, right_censored=True)
    assert float(found[3]) == -torch.inf
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)


def test_only_unsafe_sequences_go_alone():
    emissions, model, lengths = a_batch(sequences=8)
    emissions[5, :2] *= 900
    problem, laws, _ = hsmm._checked(emissions, *model, lengths, True, None)
    found = hsmm._together(problem.log_emissions, lengths, hsmm._tables(problem, laws))
    assert found.isnan().nonzero()[:, 0].tolist() == [5]


def test_laws_are_checked_where_survival_is_given():
    given = (torch.zeros(4, 2), torch.tensor([0.5, 0.5]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    laws = torch.ones(2, 2) / 2
    for wrong in (torch.nan, -0.2, 7.0):
        bad = laws.clone()
        bad[1, 0] = wrong
        with pytest.raises(ValueError, match=r"durations\[1, 0\] is"):
            hsmm.log_likelihood(*given, bad, survival=hsmm.survival_of(laws))
    with pytest.raises(ValueError, match=r"startprob must be \(k\)"):
        hsmm.log_likelihood(given[0][None], given[1][None], given[2], laws)
