"""Laws of durations, and models with them, against scipy and what EM must keep."""

import numpy as np
import pytest
import torch
from scipy import stats

from tfswa_lab.sequence.durations import (
    LAWS,
    CategoricalDurations,
    GammaDurations,
    NegativeBinomialDurations,
    PoissonDurations,
)
from tfswa_lab.sequence.em import EM
from tfswa_lab.sequence.exchange import load, save
from tfswa_lab.sequence.hsmm_models import GaussianHSMM


def test_laws_are_those_of_scipy_on_their_range():
    over = np.arange(18)
    poisson = PoissonDurations(1, 20, 3).double()
    poisson.numbers.data[:] = np.log(4.0)
    binomial = NegativeBinomialDurations(1, 20, 3).double()
    binomial.numbers.data[:] = torch.tensor([np.log(3.0), np.log(0.7 / 0.3)])[:, None]
    gamma = GammaDurations(1, 20, 3).double()
    gamma.numbers.data[:] = torch.tensor([5.0, 0.5]).log()[:, None]
    expected = {
        poisson: stats.poisson.pmf(over, 4.0),
        binomial: stats.nbinom.pmf(over, 3.0, 0.3),
        gamma: stats.gamma.pdf(over + 3, 5.0, scale=2.0),
    }
    for law, weights in expected.items():
        found = law()[0]
        assert bool((found[:2] == 0).all())
        torch.testing.assert_close(found[2:], torch.from_numpy(weights / weights.sum()))


@pytest.mark.parametrize("name", sorted(LAWS))
def test_a_law_is_found_again(name):
    law, again = LAWS[name](2, 40, 2).double(), LAWS[name](2, 40, 2).double()
    with torch.no_grad():
        law.numbers += 0.3 * torch.randn(law.numbers.shape, generator=torch.Generator()).double()
    again.fit(1000 * law().detach())
    torch.testing.assert_close(again(), law(), rtol=0, atol=1e-4)
    kept = again.numbers[..., 1].clone()
    counts = torch.zeros(2, 40).double()
    counts[0, 9] = 5
    again.fit(counts)
    assert torch.equal(again.numbers[..., 1], kept)
    assert bool(again.numbers.isfinite().any())
    assert float(again()[0].sum()) == pytest.approx(1)


def test_impossible_laws_are_refused():
    with pytest.raises(ValueError, match="from 5 to 3 frames"):
        GammaDurations(2, 3, 5)
    law = CategoricalDurations(2, 6, 3)
    with pytest.raises(ValueError, match="counts below min_duration, 3"):
        law.fit(torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"counts have shape \(2, 5\)"):
        law.fit(torch.ones(2, 5))
    for wrong in (-1.0, torch.nan, torch.inf):
        counts = torch.zeros(2, 6)
        counts[1, 4] = wrong
        with pytest.raises(ValueError, match=r"counts\[1, 4\] is .*expected a number from 0"):
            law.fit(counts)
    for sizes in ((0, 6), (2, 5.5), (2, 6, True)):
        with pytest.raises(ValueError, match="expected a whole number of 1 or more"):
            CategoricalDurations(*sizes)


def a_model(durations="categorical"):
    model = GaussianHSMM(2, 1, durations, max_duration=12, min_duration=2).double()
    model.means = torch.tensor([[0.0], [3.0]])
    return model


@pytest.mark.parametrize("name", sorted(LAWS))
def test_em_never_loses_and_learns_durations(name):
    true = a_model("poisson")
    true.durations.numbers.data[:] = torch.tensor([1.0, 6.0]).log()
    x, _ = true.sample(6, 150, torch.Generator().manual_seed(0))
    model = a_model(name)
    settings = EM(iterations=12, tolerance=-1e9, initialise=False)
    history = model.fit(x, settings=settings)
    assert float(torch.tensor(history.log_likelihoods).diff().min()) > -1e-8
    torch.testing.assert_close(model.durations.mean(), true.durations.mean(), rtol=0, atol=0.8)
    assert bool((model.transmat.diagonal() == 0).all())


def test_labels_give_durations(tmp_path):
    model = a_model()
    states = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 0, 0, 0, 1]])
    x = 3.0 * states[..., None] + torch.randn(2, 8, 1).double() / 10
    model.fit_labelled(x, states)
    # Runs that end inside: 3, 2 and 3 frames of state 0, 2 and 4 of state 1.
    expected = torch.zeros(2, 12).double()
    expected[0, 1], expected[0, 2] = 1 / 3, 2 / 3
    expected[1, [1, 3]] = 0.5
    torch.testing.assert_close(model.durations(), expected)
    assert torch.equal(model.viterbi(x).states, states)
    with pytest.raises(ValueError, match="run of state 0 lasts 1 frames"):
        model.fit_labelled(x, torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]] * 2))
    again = load(save(model, tmp_path / "model.safetensors"))
    torch.testing.assert_close(again.score(x), model.score(x))


def test_gradients_reach_the_durations():
    model = a_model("gamma")
    x = torch.randn(2, 30, 1).double()
    model.score(x).sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
    before = model.durations.numbers.detach().clone()
    step, slope = 1e-5, model.durations.numbers.grad[0, 0]
    with torch.no_grad():
        scores = []
        for sign in (1, -1):
            model.durations.numbers.copy_(before)
            model.durations.numbers[0, 0] += sign * step
            scores.append(float(model.score(x).sum()))
    assert (scores[0] - scores[1]) / (2 * step) == pytest.approx(float(slope), rel=1e-5)


def test_a_cut_run_may_be_short_but_not_longer_than_possible():
    x, states = torch.zeros(1, 20, 1), torch.tensor([[0] * 3 + [1] * 4 + [0] * 13])
    with pytest.raises(ValueError, match="a run of state 0 lasts 13 frames"):
        a_model().fit_labelled(x, states)
    a_model().fit_labelled(x[:, :8], states[:, :8])
    with pytest.raises(ValueError, match="a run of state 0 lasts 1 frames"):
        a_model().fit_labelled(x[:, :3], torch.tensor([[0, 1, 1]]))
