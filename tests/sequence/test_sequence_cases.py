"""Cases from public bug reports, with answers from enumeration; they are not part of the project.

`../shared/cases` beside the checkout, or TFSWA_LAB_CASES, holds them.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tfswa_lab.sequence import hsmm
from tfswa_lab.sequence.em import EM
from tfswa_lab.sequence.hmm import CategoricalHMM, GaussianHMM, MixtureGaussianHMM
from tfswa_lab.sequence.inference import log_likelihood, posteriors, viterbi

BESIDE = Path(__file__).resolve().parents[3] / "shared" / "cases" / "performance"
FOLDER = Path(os.environ.get("TFSWA_LAB_CASES", BESIDE)).parent
METHODS = ("auto", "compiled", "tensor", "log")

pytestmark = pytest.mark.skipif(
    not (FOLDER / "sequence.json").exists(), reason="the cases are not there"
)


def case(name):
    """Inputs, answers and tolerance of a case, as attributes."""
    with np.load(FOLDER / "sequence" / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(np.array(file[key])) for key in file.files}
    given = {key[3:]: value for key, value in arrays.items() if key.startswith("in.")}
    right = {key[4:]: value for key, value in arrays.items() if key.startswith("out.")}
    described = json.loads((FOLDER / "sequence.json").read_text())
    (tolerance,) = [entry["tol"] for entry in described if entry["id"] == name]
    return SimpleNamespace(**given), SimpleNamespace(**right), tolerance


def close(tensor, right, tolerance):
    torch.testing.assert_close(
        tensor.detach(), right.to(tensor.dtype), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name",
    [
        "hmm_left_to_right",
        "hmm_startprob_zeros",
        "hmm_one_frame",
        "hmm_ragged_nan",
        "hmm_dynamic_range",
        "hmm_mpm_is_not_a_path",
        "neural_time_varying",
    ],
)
def test_inference(name, method):
    given, right, tolerance = case(name)
    lengths = getattr(given, "lengths", None)
    emissions = given.log_emissions.clone().requires_grad_()
    arguments = (emissions, given.startprob, given.transmat, lengths)
    likelihood = log_likelihood(*arguments, method=method) if hasattr(right, "loglik") else None
    found = posteriors(*arguments, method=method)
    path = viterbi(*arguments, method=method)
    close(found.states, right.posteriors, tolerance)
    assert bool((found.states[right.posteriors == 0] == 0).all())
    best = right.paths if found.states.ndim == 3 else right.paths[0]
    assert torch.equal(path.states, best)
    if hasattr(right, "scores"):
        close(path.log_probability, right.scores[0], tolerance)
    if likelihood is not None:
        close(likelihood, right.loglik, tolerance)
        likelihood.sum().backward()
        close(emissions.grad, right.posteriors, tolerance)
    if hasattr(right, "xi_sum"):
        close(found.transitions, right.xi_sum, tolerance)
        assert bool((found.transitions[right.xi_sum == 0] == 0).all())


@pytest.mark.parametrize("method", METHODS)
def test_dynamic_range_in_float32(method):
    given, right, _ = case("hmm_dynamic_range")
    arguments = (given.log_emissions.float(), given.startprob.float(), given.transmat.float())
    close(log_likelihood(*arguments, method=method), right.loglik, 1e-6)
    close(posteriors(*arguments, method=method).states, right.posteriors, 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_sequence_without_a_path(method):
    given, _, _ = case("hmm_impossible")
    possible = torch.zeros(3, 2)
    emissions = torch.stack([possible, given.log_emissions.float()])
    arguments = (emissions, given.startprob, given.transmat)
    found = log_likelihood(*arguments, method=method)
    assert float(found[1]) == -torch.inf
    assert float(found[0]) == pytest.approx(0.0, abs=1e-6)
    for function in (posteriors, viterbi):
        with pytest.raises(ValueError, match=r"sequence 1 .*frame 1"):
            function(*arguments, method=method)


@pytest.mark.parametrize("name", ["hmm_kbest", "hmm_kbest_ties", "hmm_left_to_right"])
def test_best_paths(name):
    given, right, tolerance = case(name)
    arguments = (given.log_emissions, given.startprob, given.transmat)
    for number in getattr(given, "k", torch.tensor(3)).flatten().tolist():
        found = viterbi(*arguments, k=number)
        exist = min(number, len(right.scores))
        close(found.log_probability[:exist], right.scores[:exist], tolerance)
        assert bool((found.log_probability[exist:] == -torch.inf).all())
        assert bool((found.states[exist:] == -1).all())
        assert len({tuple(path) for path in found.states[:exist].tolist()}) == exist
        if hasattr(right, "paths"):
            assert torch.equal(found.states[:exist], right.paths)


def test_lengths_that_cannot_be():
    given, _, _ = case("hmm_bad_lengths")
    arguments = (given.log_emissions, given.startprob, given.transmat)
    with pytest.raises(ValueError, match="sequence 1 has length 0, expected 1 to 4"):
        log_likelihood(*arguments, given.lengths_zero)
    with pytest.raises(ValueError, match="sequence 1 has length 9, expected 1 to 4"):
        log_likelihood(*arguments, given.lengths_long)


def test_rows_must_sum_to_one():
    given, _, _ = case("hmm_row_sum")
    with pytest.raises(ValueError, match=r"transmat row 1 sums to 1\.1"):
        GaussianHMM(3, 1).transmat = given.transmat
    GaussianHMM(70, 1).transmat = given.good_row


@pytest.mark.parametrize("method", METHODS)
def test_a_long_sequence(method):
    given, right, _ = case("hmm_long_closed_form")
    t = torch.arange(int(given.T), dtype=torch.float64)
    rows = [-3 - 2 * (0.01 * t).sin(), -5 + 3 * (0.003 * t).cos(), torch.full_like(t, -400.0)]
    emissions = torch.stack(rows, 1)
    if method == "log":  # a loop in Python; the pieces add up, for the frames are independent
        pieces = emissions.view(100, 1000, 3)
        found = log_likelihood(pieces, given.startprob, given.transmat, method=method).sum()
        close(found, right.loglik, 1e-12)
        return
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-7)):
        arguments = (emissions.to(dtype), given.startprob.to(dtype), given.transmat.to(dtype))
        found = log_likelihood(*arguments, method=method)
        assert float(found) == pytest.approx(float(right.loglik), rel=tolerance)
        last = posteriors(*arguments, method=method).states[-1]
        close(last, right.last_posterior, max(tolerance, 1e-9) if dtype.itemsize == 8 else 1e-5)


def gaussian(given):
    model = GaussianHMM(len(given.startprob), given.means.shape[1]).double()
    model.startprob, model.transmat = given.startprob, given.transmat
    model.means, model.covariances = given.means, given.variances
    return model


def test_missing_frames():
    given, right, tolerance = case("hmm_missing_frames")
    model = gaussian(given)
    score = model.score(given.x)
    score.backward()
    close(score, right.loglik, tolerance)
    close(model.means.grad, right.grad_means, tolerance)
    close(model.posteriors(given.x).states, right.posteriors, tolerance)
    assert torch.equal(model.viterbi(given.x).states, right.paths[0])
    model.fit(given.x, settings=EM(iterations=1, variance_floor=1e-9, initialise=False))
    close(model.startprob, right.em_startprob, tolerance)
    close(model.transmat, right.em_transmat, tolerance)
    close(model.means, right.em_means, tolerance)
    close(model.covariances, right.em_variances, tolerance)


@pytest.mark.parametrize(
    "name", ["em_unvisited_state", "em_last_frame_only", "em_constant_feature"]
)
def test_em(name):
    given, right, tolerance = case(name)
    model = gaussian(given)
    sequences = [getattr(given, f"seq{i}") for i in range(2) if hasattr(given, f"seq{i}")]
    steps = len(getattr(right, "loglik_each_step", [0]))
    settings = EM(
        iterations=steps, variance_floor=float(given.floor), initialise=False, tolerance=-1
    )
    history = model.fit(sequences, settings=settings)
    if hasattr(right, "loglik_each_step"):
        close(torch.tensor(history.log_likelihoods[:steps]), right.loglik_each_step, tolerance)
    else:
        close(torch.tensor(history.log_likelihoods[0]), right.loglik_before, tolerance)
    for name in ("startprob", "transmat", "means"):
        close(getattr(model, name), getattr(right, name), tolerance)
    close(model.covariances, right.variances, tolerance)
    model.fit(sequences, settings=settings)
    assert all(bool(parameter.isfinite().any()) for parameter in model.parameters())
    assert not any(bool(parameter.isnan().any()) for parameter in model.parameters())


def test_a_constant_feature_with_full_covariance():
    given, _, _ = case("em_constant_feature")
    model = GaussianHMM(2, 2, covariance_type="full").double()
    model.means = given.means
    model.fit(given.seq0, settings=EM(variance_floor=0.01, initialise=False))
    assert float(torch.linalg.eigvalsh(model.covariances.detach()).min()) >= 0.01 * (1 - 1e-9)


def test_one_frame_leaves_the_transitions():
    given, right, _ = case("hmm_one_frame")
    model = GaussianHMM(3, 1).double()
    model.transmat = given.transmat
    model.fit(torch.zeros(1, 1), settings=EM(iterations=1, initialise=False))
    close(model.transmat, right.transmat_after_em, 1e-12)


def test_a_component_of_weight_zero():
    given, right, tolerance = case("mixture_zero_weight")
    model = MixtureGaussianHMM(2, 2, 2).double()
    for name in ("startprob", "transmat", "means", "weights"):
        setattr(model, name, getattr(given, name))
    model.covariances = given.variances
    close(model.log_emissions(given.x), right.log_emissions, tolerance)
    score = model.score(given.x)
    score.backward()
    close(score, right.loglik, tolerance)
    close(model.posteriors(given.x).states, right.posteriors, tolerance)
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
    model.fit(given.x, settings=EM(iterations=3, initialise=False))
    assert not any(bool(parameter.isnan().any()) for parameter in model.parameters())
    assert float(model.weights[0, 1]) == 0


def test_symbols_that_were_never_seen():
    given, _, _ = case("categorical_unseen")
    model = CategoricalHMM(2, 3).double()
    for name, value in (("startprob", given.startprob), ("transmat", given.transmat)):
        setattr(model, name, value)
    model.emissionprob = given.emissions
    assert float(model.score(given.x_unseen)) == -torch.inf
    with pytest.raises(ValueError, match=r"symbol 7 .* 3 symbols"):
        model.score(given.x_bad)
    with pytest.raises(ValueError, match=r"symbol -1 .* 3 symbols"):
        model.score(given.x_negative)


def test_features_far_from_zero():
    given, right, tolerance = case("gemm_emissions_offset")
    model = GaussianHMM(2, 8)
    model.means, model.covariances = given.means, given.variances
    found = model.log_emissions(given.x)
    assert float((found - right.log_emissions).abs().max()) < tolerance


@pytest.mark.parametrize(
    "name",
    ["hsmm_plain", "hsmm_censored", "hsmm_longer_than_sequence", "hsmm_min_duration"],
)
def test_explicit_durations(name):
    given, right, tolerance = case(name)
    arguments = (given.log_emissions, given.startprob, given.transmat, given.duration_pmf)
    options = {"right_censored": bool(given.right_censored)}
    close(hsmm.log_likelihood(*arguments, **options), right.loglik, tolerance)
    close(hsmm.posteriors(*arguments, **options).states, right.posteriors, tolerance)
    best = hsmm.viterbi(*arguments, **options)
    assert torch.equal(best.states, right.paths[0])
    assert torch.equal(best.segments[0], right.segments)
    close(best.log_probability, right.score, tolerance)


def test_durations_that_do_not_fit():
    given, right, tolerance = case("hsmm_infeasible")
    arguments = (given.log_emissions, given.startprob, given.transmat, given.duration_pmf)
    assert float(hsmm.log_likelihood(*arguments)) == -torch.inf
    for function in (hsmm.posteriors, hsmm.viterbi, hsmm.sample_paths):
        with pytest.raises(ValueError, match=r"4 frames fits durations of 3 to 3 frames"):
            function(*arguments)
    found = hsmm.log_likelihood(*arguments, right_censored=True)
    close(found, right.loglik_censored, tolerance)
    states = hsmm.posteriors(*arguments, right_censored=True).states
    close(states, right.posteriors_censored, tolerance)
    path = hsmm.viterbi(*arguments, right_censored=True).states
    assert torch.equal(path, right.paths_censored[0])


def test_geometric_durations():
    given, right, tolerance = case("hsmm_geometric")
    arguments = (given.log_emissions, given.startprob, given.transmat, given.duration_pmf)
    options = {"right_censored": True, "survival": given.survival}
    close(hsmm.log_likelihood(*arguments, **options), right.loglik, tolerance)
    close(hsmm.posteriors(*arguments, **options).states, right.posteriors, tolerance)
