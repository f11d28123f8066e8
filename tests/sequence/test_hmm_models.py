"""The models against hmmlearn, closed forms and what EM must keep."""

import numpy as np
import pytest
import torch
from hmmlearn import hmm as theirs

from tfswa_lab.sequence.em import EM
from tfswa_lab.sequence.exchange import from_hmmlearn, load, save, to_hmmlearn
from tfswa_lab.sequence.hmm import CategoricalHMM, GaussianHMM, MixtureGaussianHMM

LENGTHS = [40, 1, 25, 60]


@pytest.fixture(scope="module")
def sequences():
    """Four sequences from three noisy states."""
    random = np.random.default_rng(0)
    states = np.repeat(random.integers(0, 3, sum(LENGTHS) // 6 + 1), 6)[: sum(LENGTHS)]
    x = random.standard_normal((sum(LENGTHS), 2)) + 3 * np.stack([states, -states], 1)
    return list(torch.from_numpy(x).split(LENGTHS))


def a_model(covariance_type="diag", dtype=torch.float64):
    model = GaussianHMM(3, 2, covariance_type=covariance_type).to(dtype)
    model.means = torch.tensor([[0.5, 0.0], [2.0, -2.5], [5.0, -7.0]])
    model.startprob = torch.tensor([0.5, 0.3, 0.2])
    model.transmat = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]])
    return model


@pytest.mark.parametrize("covariance_type", ["diag", "spherical", "full", "tied"])
def test_equals_hmmlearn_step_by_step(sequences, covariance_type):
    ours = a_model(covariance_type)
    peer = to_hmmlearn(ours)
    peer.set_params(
        n_iter=1, init_params="", min_covar=0.0, covars_prior=0.0, covars_weight=0.0, means_weight=0
    )
    if covariance_type in ("full", "tied"):  # its default weight for a covariance is not 1 there
        peer.set_params(covars_weight=0.0, covars_prior=0.0)
    x = torch.cat(sequences).numpy()
    for _ in range(4):
        likelihood, states = peer.score_samples(x, LENGTHS)
        assert float(ours.score(sequences).sum()) == pytest.approx(likelihood, rel=1e-9)
        found = torch.cat(
            [row[:n] for row, n in zip(ours.posteriors(sequences).states, LENGTHS, strict=True)]
        )
        torch.testing.assert_close(found, torch.from_numpy(states), rtol=0, atol=1e-8)
        _, path = peer.decode(x, LENGTHS)
        decoded = ours.viterbi(sequences).states
        assert decoded[decoded >= 0].tolist() == path.tolist()
        peer.fit(x, LENGTHS)
        ours.fit(sequences, settings=EM(iterations=1, initialise=False, variance_floor=1e-9))
        again = from_hmmlearn(peer)
        for name in ("startprob", "transmat", "means", "covariances"):
            torch.testing.assert_close(
                getattr(ours, name), getattr(again, name), rtol=1e-6, atol=1e-6
            )


def test_symbols_equal_hmmlearn():
    random = np.random.default_rng(1)
    peer = theirs.CategoricalHMM(2, n_iter=1, init_params="")
    peer.startprob_ = np.array([0.6, 0.4])
    peer.transmat_ = np.array([[0.7, 0.3], [0.2, 0.8]])
    peer.emissionprob_ = np.array([[0.5, 0.4, 0.1], [0.1, 0.3, 0.6]])
    peer.n_features = 3
    x = random.integers(0, 3, 90)
    ours = from_hmmlearn(peer)
    pieces = list(torch.from_numpy(x).split([50, 40]))
    for _ in range(3):
        expected = peer.score(x[:, None], [50, 40])
        assert float(ours.score(pieces).sum()) == pytest.approx(expected, rel=1e-10)
        peer.fit(x[:, None], [50, 40])
        ours.fit(pieces, settings=EM(iterations=1, initialise=False))
        torch.testing.assert_close(ours.emissionprob, torch.from_numpy(peer.emissionprob_))
        torch.testing.assert_close(ours.transmat, torch.from_numpy(peer.transmat_))


def test_a_mixture_scores_as_hmmlearn(sequences):
    ours = MixtureGaussianHMM(2, 3, 2).double()
    ours.fit(sequences, settings=EM(iterations=2))
    expected = to_hmmlearn(ours).score(torch.cat(sequences).numpy(), LENGTHS)
    assert float(ours.score(sequences).sum()) == pytest.approx(expected, rel=1e-9)


def test_a_mixture_of_one_is_a_gaussian(sequences):
    one = MixtureGaussianHMM(3, 1, 2).double()
    plain = a_model()
    one.startprob, one.transmat = plain.startprob, plain.transmat
    one.means = plain.means[:, None]
    settings = EM(iterations=3, initialise=False)
    one.fit(sequences, settings=settings)
    plain.fit(sequences, settings=settings)
    torch.testing.assert_close(one.means[:, 0], plain.means)
    torch.testing.assert_close(one.covariances[:, 0], plain.covariances)
    torch.testing.assert_close(one.score(sequences), plain.score(sequences))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["diag", "spherical", "full", "tied", "mixture"])
def test_em_never_loses(sequences, kind, dtype):
    sequences = [sequence.to(dtype) for sequence in sequences]
    model = (
        MixtureGaussianHMM(3, 2, 2)
        if kind == "mixture"
        else GaussianHMM(3, 2, covariance_type=kind)
    )
    history = model.to(dtype).fit(
        sequences, settings=EM(iterations=30, tolerance=-1e9, variance_floor=0.5)
    )
    steps = torch.tensor(history.log_likelihoods).diff()
    assert float(steps.min()) > -1e-2 if dtype == torch.float32 else float(steps.min()) > -1e-8
    lowest = model.covariances.detach()
    if kind in ("full", "tied"):
        lowest = torch.linalg.eigvalsh(lowest)
    assert float(lowest.min()) >= 0.5 * (1 - 1e-5)


def test_em_is_invariant(sequences):
    """Order, batching and names of states do not matter."""
    settings = EM(iterations=5, initialise=False)
    model, shuffled, renamed = a_model(), a_model(), a_model()
    model.fit(sequences, settings=settings)
    shuffled.fit(sequences[::-1], settings=settings)
    names = [2, 0, 1]
    renamed.means = renamed.means[names]
    renamed.startprob = renamed.startprob[names]
    renamed.transmat = renamed.transmat[names][:, names]
    renamed.fit(sequences, settings=settings)
    torch.testing.assert_close(shuffled.means, model.means)
    torch.testing.assert_close(renamed.means, model.means[names])
    torch.testing.assert_close(renamed.transmat, model.transmat[names][:, names])


def test_priors_are_the_mode_of_a_dirichlet():
    """One frame in each of two states, known: counts plus prior minus one."""
    model = GaussianHMM(2, 1).double()
    model.means = torch.tensor([[0.0], [100.0]])
    x = torch.tensor([[0.0], [100.0], [100.0], [0.0]])
    settings = EM(iterations=1, initialise=False, update="st", startprob_prior=2.0, sticky=3.0)
    model.fit(x, settings=settings)
    torch.testing.assert_close(model.startprob.tolist(), [2 / 3, 1 / 3])
    # Steps 0→1, 1→1, 1→0; three more on the diagonal.
    torch.testing.assert_close(model.transmat.flatten().tolist(), [3 / 4, 1 / 4, 1 / 5, 4 / 5])


def test_frozen_parts_stay(sequences):
    model = a_model()
    model.fit(sequences, settings=EM(iterations=3, update="t", initialise=True))
    before = a_model()
    for name in ("startprob", "means", "covariances"):
        assert torch.equal(getattr(model, name), getattr(before, name))
    assert not torch.equal(model.transmat, before.transmat)


def test_restarts_keep_the_best(sequences):
    history = GaussianHMM(3, 2).fit(sequences, settings=EM(iterations=5, restarts=4), seed=3)
    assert len(history.of_restarts) == 4
    assert history.log_likelihoods[-1] == max(history.of_restarts)


def test_a_fit_that_fails_changes_nothing(sequences):
    model = a_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    broken = [*sequences, torch.full((3, 2), torch.inf, dtype=torch.float64)]
    with pytest.raises(ValueError, match="infinite in sequence 4, frame 0"):
        model.fit(broken, settings=EM(initialise=False))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_gradient_is_that_of_em(sequences):
    """At a maximum that EM found, the gradient is 0; beside it, the gradient leads back."""
    model = a_model()
    model.fit(sequences, settings=EM(iterations=400, tolerance=1e-10, initialise=False))
    model.score(sequences).sum().backward()
    assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-3
    best = float(model.score(sequences).sum())
    with torch.no_grad():
        model.means += 0.5
    history = model.fit_by_gradient(sequences, steps=60)
    assert history[0] < history[-1] <= best + 1e-6


def test_gradients_of_features_and_scales():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    x[0, 2, 1] = x[1, 3] = torch.nan
    given = torch.where(x.isnan(), 0, x).requires_grad_()
    lengths = torch.tensor([5, 4])
    for covariance_type in ("diag", "spherical", "full", "tied"):
        model = GaussianHMM(2, 3, covariance_type=covariance_type).double()

        def score(given, means, scale, model=model, gaps=covariance_type == "diag"):
            state = {"emissions.means": means, "emissions.log_scale": scale}
            x_with_gaps = torch.where(x.isnan(), x, given) if gaps else given
            return torch.func.functional_call(model, state, (x_with_gaps, lengths))

        model.forward = model.score
        inputs = (given, model.means.detach().requires_grad_())
        scale = model.emissions.log_scale.detach().requires_grad_()
        assert torch.autograd.gradcheck(score, (*inputs, scale))


def test_single_missing_features_are_marginalised():
    """A Gaussian of two features without the second one is a Gaussian of the first."""
    whole, first = a_model(), GaussianHMM(3, 1).double()
    whole.covariances = torch.tensor([[1.0, 2.0], [0.5, 1.0], [3.0, 0.1]])
    first.startprob, first.transmat = whole.startprob, whole.transmat
    first.means, first.covariances = whole.means[:, :1], whole.covariances[:, :1]
    x = torch.randn(2, 9, 2, dtype=torch.float64)
    x[..., 1] = torch.nan
    torch.testing.assert_close(whole.score(x), first.score(x[..., :1]))
    with pytest.raises(ValueError, match="single missing features"):
        a_model("full").score(x)


@pytest.mark.parametrize("covariance_type", ["diag", "full"])
def test_samples_are_fitted_again(covariance_type):
    model = a_model(covariance_type)
    x, states = model.sample(20, 300, torch.Generator().manual_seed(0))
    again = a_model(covariance_type)
    again.fit_labelled(x, states)
    torch.testing.assert_close(again.transmat, model.transmat, rtol=0, atol=0.05)
    torch.testing.assert_close(again.means, model.means, rtol=0, atol=0.1)
    torch.testing.assert_close(again.covariances, model.covariances, rtol=0, atol=0.1)
    share = (model.viterbi(x).states == states).double().mean()
    assert float(share) > 0.95


def test_labels_give_counts_and_moments():
    model = GaussianHMM(3, 1).double()
    x = torch.tensor([[[1.0], [3.0], [10.0], [torch.nan]], [[10.0], [0.0], [0.0], [0.0]]])
    states = torch.tensor([[0, 0, 1, 1], [1, -1, 9, 9]])
    model.fit_labelled(x, states, torch.tensor([4, 1]), pseudo_count=1.0)
    torch.testing.assert_close(model.startprob.tolist(), [0.4, 0.4, 0.2])
    torch.testing.assert_close(model.transmat[0].tolist(), [2 / 5, 2 / 5, 1 / 5])
    assert model.means[:2, 0].tolist() == [2.0, 10.0]
    torch.testing.assert_close(model.covariances[:, 0].tolist(), [1.0, 1e-3, 1.0])
    with pytest.raises(ValueError, match="state 3 in sequence 0, frame 2"):
        model.fit_labelled(x, torch.where(states == 0, 0, 3))


def test_criteria_count_free_parameters(sequences):
    for covariance_type in ("diag", "spherical", "full", "tied"):
        model = a_model(covariance_type)
        peer, x = to_hmmlearn(model), torch.cat(sequences).numpy()
        assert model.num_parameters == sum(peer._get_n_fit_scalars_per_param().values())
        assert model.aic(sequences) == pytest.approx(peer.aic(x, LENGTHS))
        assert model.bic(sequences) == pytest.approx(peer.bic(x, LENGTHS))


def test_files_keep_everything(tmp_path, sequences):
    for model in (a_model("full"), MixtureGaussianHMM(2, 3, 2), CategoricalHMM(2, 5).double()):
        again = load(save(model, tmp_path / "models" / "one.safetensors"))
        assert type(again) is type(model)
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value)
    (tmp_path / "bad.safetensors").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"bad\.safetensors is no model of this room"):
        load(tmp_path / "bad.safetensors")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing")


def test_other_spellings_are_answered_with_ours():
    with pytest.raises(TypeError, match=r"MixtureGaussianHMM has no argument 'obs_dim': use feat"):
        MixtureGaussianHMM(num_states=5, obs_dim=80)
    with pytest.raises(TypeError, match="use num_states"):
        GaussianHMM(n_components=3)
    with pytest.raises(ValueError, match="feature_dim is 0"):
        GaussianHMM(num_states=3)
    with pytest.raises(ValueError, match="expected floats of shape"):
        GaussianHMM(3, 2).score(torch.zeros(5, 4))
