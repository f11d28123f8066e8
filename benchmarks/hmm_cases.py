"""What hmmlearn, pomegranate and dynamax answer on cases from public bug reports, beside ours.

    python benchmarks/hmm.py --only cases [--peers FOLDER]

The cases (`../shared/cases` beside the checkout, or what TFSWA_LAB_CASES names) are not part of the
project; their answers come from the enumeration of all paths in float64. Each system works in the
precisions or implementations that it has, and is asked in the way that its documentation shows;
pomegranate, which needs end probabilities, gets 1 for each. A case that a system has no words for
is `cannot`. hmmlearn, pomegranate and dynamax know no explicit durations, so those cases are
not here. Axis letters: `b` sequences, `t` frames, `k` states, `d` features.
"""

# ruff: noqa: D102, D103 - the methods of all systems are the same, and said once
from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from tfswa_lab.sequence import inference
from tfswa_lab.sequence.em import EM
from tfswa_lab.sequence.hmm import CategoricalHMM, GaussianHMM, MixtureGaussianHMM

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "cases" / "performance"
FOLDER = Path(os.environ.get("TFSWA_LAB_CASES", BESIDE)).parent
TOLERANCE = {"float32": 1e-4, "float64": 0.0}  # at least; relative and absolute
LITTLE = 1e-4  # of dynamax's priors; with none, a probability of 0 is NaN
PRIORS = 0.02  # share of a number by which its EM may differ, because it needs priors
FIELDS = ("loglik", "posteriors", "path")


class CannotSay(Exception):
    """A system has no words for this."""


def case(name: str) -> tuple[SimpleNamespace, SimpleNamespace, float]:
    """Inputs and answers of a case, as attributes, and its tolerance."""
    with np.load(FOLDER / "sequence" / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    given = {key[3:]: value for key, value in arrays.items() if key.startswith("in.")}
    right = {key[4:]: value for key, value in arrays.items() if key.startswith("out.")}
    described = json.loads((FOLDER / "sequence.json").read_text())
    (tolerance,) = [entry["tol"] for entry in described if entry["id"] == name]
    return SimpleNamespace(**given), SimpleNamespace(**right), tolerance


# Systems ---------------------------------------------------------------------------------------
# `infer` takes log emissions, `gaussian`, `mixture` and `categorical` features and parameters;
# all return functions for loglik, posteriors and path. `em` returns new parameters.


class Ours:
    """This package."""

    variants = ("float64", "float32")

    def __init__(self, variant: str):
        self.dtype = getattr(torch, variant)

    def infer(self, emissions, start, move, lengths=None) -> dict[str, Callable]:
        lengths = None if lengths is None else torch.from_numpy(lengths)
        logs, start, move = (torch.from_numpy(a).to(self.dtype) for a in (emissions, start, move))
        given = (logs, start, move, lengths)
        return {
            "loglik": lambda: inference.log_likelihood(*given),
            "posteriors": lambda: inference.posteriors(*given).states,
            "path": lambda: inference.viterbi(*given).states,
        }

    def best_paths(self, emissions, start, move, number):
        logs, start, move = (torch.from_numpy(a).to(self.dtype) for a in (emissions, start, move))
        return inference.viterbi(logs, start, move, k=number).log_probability

    def accepts(self, start, move):
        GaussianHMM(len(move), 1).transmat = torch.from_numpy(move)

    def gaussian(self, x, p):
        return self._asked(self._gaussian(p), torch.from_numpy(x).to(self.dtype))

    def gaussian_emissions(self, x, p):
        return self._gaussian(p).log_emissions(torch.from_numpy(x).to(self.dtype)).detach()

    def mixture(self, x, p):
        model = self._with(MixtureGaussianHMM(*p.means.shape), p, "means", "weights")
        model.covariances = torch.from_numpy(p.variances)
        return self._asked(model, torch.from_numpy(x).to(self.dtype))

    def categorical(self, x, p):
        model = self._with(CategoricalHMM(*p.emissions.shape), p)
        model.emissionprob = torch.from_numpy(p.emissions)
        return self._asked(model, torch.from_numpy(x))

    def em(self, sequences, p, steps):
        model = self._gaussian(p)
        sequences = [torch.from_numpy(x).to(self.dtype) for x in sequences]
        options = {"tolerance": -np.inf, "variance_floor": float(p.floor), "initialise": False}
        settings = EM(iterations=steps, **options)
        model.fit(sequences, settings=settings)
        return model.startprob, model.transmat, model.means, model.covariances

    def _gaussian(self, p):
        model = self._with(GaussianHMM(*p.means.shape), p, "means")
        model.covariances = torch.from_numpy(p.variances)
        return model

    def _with(self, model, p, *names):
        model = model.to(self.dtype)
        for name in ("startprob", "transmat", *names):
            setattr(model, name, torch.from_numpy(getattr(p, name)))
        return model

    def _asked(self, model, x):
        return {
            "loglik": lambda: model.score(x),
            "posteriors": lambda: model.posteriors(x).states,
            "path": lambda: model.viterbi(x).states,
        }


class Hmmlearn:
    """hmmlearn; log emissions are given by a model of one's own, as its documentation says."""

    variants = ("log", "scaling")

    def __init__(self, variant: str):
        self.variant = variant

    def infer(self, emissions, start, move, lengths=None):
        from hmmlearn.base import BaseHMM

        if move.ndim > 2:
            raise CannotSay
        table = emissions.reshape(-1, emissions.shape[-1])

        class Given(BaseHMM):  # a frame is its number, because infinite frames are refused
            def _compute_log_likelihood(self, frames):
                return table[frames[:, 0].astype(int)]

            def _compute_likelihood(self, frames):
                return np.exp(self._compute_log_likelihood(frames))

        model = self._with(Given(len(start), implementation=self.variant), start, move)
        frames = np.arange(len(table)).reshape(*emissions.shape[:-1])
        if lengths is None:
            return self._asked(model, frames.reshape(-1, 1))
        rows = [row[:length] for row, length in zip(frames, lengths, strict=True)]
        return self._asked(model, np.concatenate(rows)[:, None], lengths, frames.shape)

    def accepts(self, start, move):
        from hmmlearn.hmm import GaussianHMM as Peer

        model = self._with(Peer(len(move), "diag"), np.full(len(move), 1 / len(move)), move)
        model.means_, model.covars_ = np.zeros((len(move), 1)), np.ones((len(move), 1))
        model.score(np.zeros((2, 1)))

    def gaussian(self, x, p):
        return self._asked(self._gaussian(p), x)

    def gaussian_emissions(self, x, p):
        return self._gaussian(p)._compute_log_likelihood(x)

    def mixture(self, x, p):
        from hmmlearn.hmm import GMMHMM

        model = GMMHMM(*p.weights.shape, covariance_type="diag", implementation=self.variant)
        model = self._with(model, p.startprob, p.transmat)
        model.n_features, model.means_, model.covars_ = x.shape[-1], p.means, p.variances
        model.weights_ = p.weights
        return self._asked(model, x)

    def categorical(self, x, p):
        from hmmlearn.hmm import CategoricalHMM as Peer

        model = Peer(len(p.startprob), implementation=self.variant)
        model = self._with(model, p.startprob, p.transmat)
        model.n_features, model.emissionprob_ = p.emissions.shape[1], p.emissions
        return self._asked(model, x[:, None])

    def em(self, sequences, p, steps):
        model = self._gaussian(p)
        model.set_params(n_iter=steps, tol=-np.inf, init_params="", min_covar=float(p.floor))
        model.fit(np.concatenate(sequences), [len(x) for x in sequences])
        covariances = np.stack([np.diag(matrix) for matrix in model.covars_])
        return model.startprob_, model.transmat_, model.means_, covariances

    def _gaussian(self, p):
        from hmmlearn.hmm import GaussianHMM as Peer

        model = Peer(len(p.means), "diag", covars_prior=0, implementation=self.variant)
        model = self._with(model, p.startprob, p.transmat)
        model.n_features, model.means_, model.covars_ = p.means.shape[1], p.means, p.variances
        return model

    def _with(self, model, start, move):
        model.startprob_, model.transmat_, model.n_features = start, move, 1
        return model

    def _asked(self, model, x, lengths=None, shape=None):
        def padded(rows, filling):
            if lengths is None:
                return rows
            out = np.full((*shape, *rows.shape[1:]), filling, rows.dtype)
            out[np.arange(shape[1]) < np.asarray(lengths)[:, None]] = rows
            return out

        def score():
            if lengths is None:
                return model.score(x)
            parts = np.split(x, np.cumsum(lengths)[:-1])
            return np.array([model.score(part) for part in parts])

        return {
            "loglik": score,
            "posteriors": lambda: padded(model.predict_proba(x, lengths), 0),
            "path": lambda: padded(model.predict(x, lengths), -1),
        }


class Pomegranate:
    """pomegranate."""

    variants = ("float64", "float32")

    def __init__(self, variant: str):
        self.dtype = getattr(torch, variant)

    def infer(self, emissions, start, move, lengths=None):
        from pomegranate.distributions import Normal

        if move.ndim > 2 or lengths is not None:
            raise CannotSay
        one = torch.ones(1, dtype=self.dtype)
        model = self._model([Normal(0 * one, one, "diag") for _ in start], start, move)
        logs = torch.from_numpy(emissions).to(self.dtype)[None]
        return self._asked(model, emissions=logs)

    def accepts(self, start, move):
        from pomegranate.distributions import Normal

        laws = [Normal([0.0], [1.0], "diag") for _ in move]
        model = self._model(laws, np.full(len(move), 1 / len(move)), move)
        model.log_probability(torch.zeros(1, 2, 1, dtype=self.dtype))

    def gaussian(self, x, p):
        rows = self._rows(x)
        return self._asked(self._gaussian(p), X=rows)

    def gaussian_emissions(self, x, p):
        rows = self._rows(x)
        return self._gaussian(p)._emission_matrix(rows)[0]

    def mixture(self, x, p):
        from pomegranate.distributions import Normal
        from pomegranate.gmm import GeneralMixtureModel

        laws = [
            GeneralMixtureModel(
                [
                    Normal(self._tensor(m), self._tensor(v), "diag")
                    for m, v in zip(means, variances, strict=True)
                ],
                priors=self._tensor(weights),
            )
            for means, variances, weights in zip(p.means, p.variances, p.weights, strict=True)
        ]
        return self._asked(self._model(laws, p.startprob, p.transmat), X=self._rows(x))

    def categorical(self, x, p):
        from pomegranate.distributions import Categorical

        laws = [Categorical(self._tensor(row[None])) for row in p.emissions]
        model = self._model(laws, p.startprob, p.transmat)
        return self._asked(model, X=torch.from_numpy(x)[None, :, None])

    def em(self, sequences, p, steps):
        model = self._gaussian(p)
        for _ in range(steps):
            for x in sequences:
                model.summarize(self._rows(x))
            model.from_summaries()
        laws = model.distributions
        moments = (torch.stack([getattr(law, name) for law in laws]) for name in ("means", "covs"))
        steps = model.edges.exp()  # its rows leave room for an end, which we do not have
        return model.starts.exp(), steps / steps.sum(1, keepdim=True), *moments

    def _gaussian(self, p):
        from pomegranate.distributions import Normal

        pairs = zip(p.means, p.variances, strict=True)
        floor = float(getattr(p, "floor", 0)) or None
        laws = [Normal(self._tensor(m), self._tensor(v), "diag", min_cov=floor) for m, v in pairs]
        return self._model(laws, p.startprob, p.transmat)

    def _model(self, laws, start, move):
        from pomegranate.hmm import DenseHMM

        ends = torch.ones(len(laws), dtype=self.dtype)
        return DenseHMM(laws, self._tensor(move), self._tensor(start), ends).to(self.dtype)

    def _tensor(self, array):
        return torch.tensor(array, dtype=self.dtype)  # a copy: it writes into what it is given

    def _rows(self, x):
        rows = self._tensor(x)[None]
        missing = rows.isnan()
        return torch.masked.MaskedTensor(rows, ~missing) if bool(missing.any()) else rows

    def _asked(self, model, **rows):
        def score():
            return (model.forward(**rows)[:, -1] + model.ends).logsumexp(-1)[0]

        return {
            "loglik": score,
            "posteriors": lambda: model.forward_backward(**rows)[1][0].exp(),
            "path": lambda: model.viterbi(**rows)[0],
        }


class Dynamax:
    """dynamax; float32 is what jax does by default."""

    variants = ("float64", "float32")

    def __init__(self, variant: str):
        import jax
        import jax.numpy as jnp

        jax.config.update("jax_enable_x64", variant == "float64")
        self.array = lambda x: jnp.asarray(x, variant)

    def infer(self, emissions, start, move, lengths=None):
        from dynamax.hidden_markov_model import hmm_filter, hmm_posterior_mode, hmm_smoother

        if lengths is not None and move.ndim == 2:
            raise CannotSay
        if lengths is not None:  # without padding, one sequence at a time
            given = [
                (start, steps[: length - 1], log[:length])
                for log, steps, length in zip(emissions, move, lengths, strict=True)
            ]
        else:
            given = [(start, move, emissions)]
        given = [tuple(map(self.array, one)) for one in given]

        def each(function, filling):
            found = [np.asarray(function(*one)) for one in given]
            if lengths is None:
                return found[0]
            if not found[0].ndim:
                return np.array(found)
            longest = emissions.shape[1]
            return np.stack(
                [
                    np.pad(
                        one,
                        [(0, longest - len(one))] + [(0, 0)] * (one.ndim - 1),
                        constant_values=filling,
                    )
                    for one in found
                ]
            )

        return {
            "loglik": lambda: each(lambda *one: hmm_filter(*one).marginal_loglik, 0),
            "posteriors": lambda: each(lambda *one: hmm_smoother(*one).smoothed_probs, 0),
            "path": lambda: each(hmm_posterior_mode, -1),
        }

    def accepts(self, start, move):
        k = len(move)
        start, ones = np.full(k, 1 / k), np.ones((k, 1))
        p = SimpleNamespace(startprob=start, transmat=move, means=0 * ones, variances=ones)
        self.gaussian(np.zeros((2, 1)), p)["loglik"]()

    def gaussian(self, x, p):
        return self._asked(*self._gaussian(p)[:2], x)

    def gaussian_emissions(self, x, p):
        model, parameters, _ = self._gaussian(p)
        return model._inference_args(parameters, self.array(x), None)[2]

    def mixture(self, x, p):
        from dynamax.hidden_markov_model import DiagonalGaussianMixtureHMM as Peer

        model = Peer(*p.means.shape)
        parameters, _ = model.initialize(
            **self._chain(p),
            emission_weights=self.array(p.weights),
            emission_means=self.array(p.means),
            emission_scale_diags=self.array(p.variances**0.5),
        )
        return self._asked(model, parameters, x)

    def categorical(self, x, p):
        import jax.numpy as jnp
        from dynamax.hidden_markov_model import CategoricalHMM as Peer

        model = Peer(len(p.startprob), 1, p.emissions.shape[1])
        probabilities = self.array(p.emissions[:, None])
        parameters, _ = model.initialize(**self._chain(p), emission_probs=probabilities)
        return self._asked(model, parameters, jnp.asarray(x[:, None]))

    def em(self, sequences, p, steps):
        import jax

        model, parameters, properties = self._gaussian(p)
        state = model.initialize_m_step_state(parameters, properties)
        for _ in range(steps):
            found = [model.e_step(parameters, self.array(x))[0] for x in sequences]
            together = jax.tree.map(lambda *parts: np.stack(parts), *found)
            parameters, state = model.m_step(parameters, properties, together, state)
        emissions = parameters.emissions
        start, move = parameters.initial.probs, parameters.transitions.transition_matrix
        return start, move, emissions.means, np.asarray(emissions.scale_diags) ** 2

    def _gaussian(self, p):
        from dynamax.hidden_markov_model import DiagonalGaussianHMM as Peer

        names = ("mean_concentration", "concentration", "scale")
        priors = {f"emission_prior_{name}": LITTLE for name in names}
        names = ("initial_probs", "transition_matrix")
        priors |= {f"{name}_concentration": 1 + LITTLE for name in names}
        model = Peer(*p.means.shape, **priors)
        parameters, properties = model.initialize(
            **self._chain(p),
            emission_means=self.array(p.means),
            emission_scale_diags=self.array(p.variances**0.5),
        )
        return model, parameters, properties

    def _chain(self, p):
        return {
            "initial_probs": self.array(p.startprob),
            "transition_matrix": self.array(p.transmat),
        }

    def _asked(self, model, parameters, x):
        x = self.array(x) if x.dtype.kind == "f" else x
        return {
            "loglik": lambda: model.marginal_log_prob(parameters, x),
            "posteriors": lambda: model.smoother(parameters, x).smoothed_probs,
            "path": lambda: model.most_likely_states(parameters, x),
        }


SYSTEMS = {  # the package, and how it is asked
    "ours": ("torch", Ours),
    "hmmlearn": ("hmmlearn", Hmmlearn),
    "pomegranate": ("pomegranate", Pomegranate),
    "dynamax": ("dynamax", Dynamax),
}


# Questions -------------------------------------------------------------------------------------
# Each takes a system, and what is given and right; returns what is wrong, or nothing.


def inference_of(system, given, right, tolerance) -> list[str]:
    lengths = (given.lengths,) if hasattr(given, "lengths") else ()
    asked = system.infer(given.log_emissions, given.startprob, given.transmat, *lengths)
    return compared(asked, right, tolerance)


def impossible(system, given, right, tolerance) -> list[str]:
    asked = system.infer(given.log_emissions, given.startprob, given.transmat)
    return compared(asked, right, tolerance, ("loglik",)) + [
        f"{name} without an error" for name in ("posteriors", "path") if not refuses(asked[name])
    ]


def long_sequence(system, given, right, tolerance) -> list[str]:
    t = np.arange(int(given.T), dtype=float)
    rows = [-3 - 2 * np.sin(0.01 * t), -5 + 3 * np.cos(0.003 * t), np.full_like(t, -400.0)]
    asked = system.infer(np.stack(rows, 1), given.startprob, given.transmat)
    return compared(asked, right, min(tolerance, 1e-5), ("loglik",))


def refused_lengths(system, given, right, tolerance) -> list[str]:
    def ask(lengths):
        asked = system.infer(given.log_emissions, given.startprob, given.transmat, lengths)
        return asked["posteriors"]()

    accepted = [n for n in ("zero", "long") if not refuses(ask, getattr(given, f"lengths_{n}"))]
    return [f"a length of {'0' if name == 'zero' else '9 of 4'} accepted" for name in accepted]


def refused_rows(system, given, right, tolerance) -> list[str]:
    wrong = [] if refuses(system.accepts, given.startprob, given.transmat) else ["1.1 accepted"]
    return wrong + ["70 × 1/70 refused"] * refuses(system.accepts, None, given.good_row)


def best_paths(system, given, right, tolerance) -> list[str]:
    if not hasattr(system, "best_paths"):
        raise CannotSay
    chain = (given.log_emissions, given.startprob, given.transmat)
    found = system.best_paths(*chain, len(right.scores))
    return differs("scores", found, right.scores, tolerance)


def missing_frames(system, given, right, tolerance) -> list[str]:
    return compared(system.gaussian(given.x, given), right, tolerance)


def gaussian_emissions(system, given, right, tolerance) -> list[str]:
    k = len(given.means)
    chain = {"startprob": np.full(k, 1 / k), "transmat": np.full((k, k), 1 / k)}
    found = system.gaussian_emissions(given.x, SimpleNamespace(**vars(given), **chain))
    return differs("log emissions", found, right.log_emissions, 0.005, relative=0)


def mixture(system, given, right, tolerance) -> list[str]:
    return compared(system.mixture(given.x, given), right, tolerance, ("loglik", "posteriors"))


def symbols(system, given, right, tolerance) -> list[str]:
    right = SimpleNamespace(loglik=right.loglik_unseen)
    asked = system.categorical(given.x_unseen, given)
    wrong = compared(asked, right, tolerance, ("loglik",))
    for symbol, x in ((7, given.x_bad), (-1, given.x_negative)):
        if not refuses(lambda x=x: system.categorical(x, given)["loglik"]()):
            wrong.append(f"symbol {symbol} accepted")
    return wrong


def em_steps(system, given, right, tolerance) -> list[str]:
    sequences = [getattr(given, name) for name in ("seq0", "seq1") if hasattr(given, name)]
    steps = len(getattr(right, "loglik_each_step", [0]))
    relative = None
    if isinstance(system, Dynamax):
        tolerance, relative = max(tolerance, 10 * LITTLE), PRIORS
    names = ("startprob", "transmat", "means", "variances")
    found = dict(zip(names, system.em(sequences, given, steps), strict=True))
    wrong = []
    for name in names:
        wrong += differs(name, found[name], getattr(right, name), tolerance, relative)
    return wrong


QUESTIONS = {
    "hmm_left_to_right": inference_of,
    "hmm_startprob_zeros": inference_of,
    "hmm_impossible": impossible,
    "hmm_one_frame": inference_of,
    "hmm_ragged_nan": inference_of,
    "hmm_bad_lengths": refused_lengths,
    "hmm_row_sum": refused_rows,
    "hmm_long_closed_form": long_sequence,
    "hmm_dynamic_range": inference_of,
    "hmm_mpm_is_not_a_path": inference_of,
    "hmm_kbest_ties": best_paths,
    "hmm_kbest": best_paths,
    "neural_time_varying": inference_of,
    "hmm_missing_frames": missing_frames,
    "em_unvisited_state": em_steps,
    "em_last_frame_only": em_steps,
    "em_constant_feature": em_steps,
    "mixture_zero_weight": mixture,
    "categorical_unseen": symbols,
    "gemm_emissions_offset": gaussian_emissions,
}


# Answers ---------------------------------------------------------------------------------------


def compared(asked, right, tolerance, fields=FIELDS) -> list[str]:
    """What is wrong in the fields that have a right answer; an error is wrong."""
    wrong = []
    for name in fields:
        answer = best_path(right) if name == "path" else getattr(right, name, None)
        if answer is None:
            continue
        try:
            wrong += differs(name, asked[name](), answer, tolerance)
        except CannotSay:
            raise
        except Exception as error:  # of another package: the row says it
            wrong.append(f"{name}: {said(error)}")
    return wrong


def best_path(right: SimpleNamespace) -> np.ndarray | None:
    """The one best path, or that of each sequence."""
    if not hasattr(right, "paths"):
        return None
    return right.paths if right.posteriors.ndim == 3 else right.paths[0]


def differs(name, found, right, tolerance, relative=None) -> list[str]:
    """What is wrong with an array, in a few words."""
    found = found.detach().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
    found, right = found.astype(float), np.asarray(right, float)
    if found.shape != right.shape:
        return (
            [f"{name} of shape {found.shape}"]
            if found.size != right.size
            else differs(name, found.reshape(right.shape), right, tolerance, relative)
        )
    relative = tolerance if relative is None else relative
    same = np.isclose(found, right, rtol=relative, atol=tolerance, equal_nan=True)
    if same.all():
        return []
    if np.isnan(found).any():
        return [f"{name} NaN"]
    if found.ndim == 0:
        return [f"{name} {found:.7g} ({right:.7g})"]
    place = np.unravel_index(np.argmax(~same), same.shape)
    where = ", ".join(map(str, place))
    return [f"{name}[{where}] {found[place]:.4g} ({right[place]:.4g})"]


def refuses(function: Callable, *arguments) -> bool:
    """Whether a call ends in an error; having no words for it is no refusal."""
    try:
        function(*arguments)
    except CannotSay:
        raise
    except Exception:  # of another package: any will do
        return True
    return False


def said(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:50]}"


def answer_of(system: type, name: str) -> str:
    """`right`, `cannot`, or what is wrong; where variants differ, each."""
    given, right, tolerance = case(name)
    answers = {}
    for variant in system.variants:
        least = TOLERANCE.get(variant, 0.0)
        try:
            wrong = QUESTIONS[name](system(variant), given, right, max(tolerance, least))
            answers[variant] = "; ".join(wrong) or "right"
        except CannotSay:
            answers[variant] = "cannot"
        except Exception as error:  # of another package: the row says it
            answers[variant] = said(error)
    if len(set(answers.values())) == 1:
        return next(iter(answers.values()))
    return " · ".join(f"{variant}: {answer}" for variant, answer in answers.items())


def cases(missing: set[str]) -> dict[str, dict[str, str]]:
    """The answers of all systems that are there, by case."""
    if not (FOLDER / "sequence.json").exists():
        print("the cases are not there: set TFSWA_LAB_CASES")
        return {}
    systems = {name: make for name, (package, make) in SYSTEMS.items() if package not in missing}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return {
            name: {label: answer_of(system, name) for label, system in systems.items()}
            for name in QUESTIONS
        }
