"""Models on disk (safetensors, with their description as JSON inside) and from and to hmmlearn.

Notebook: 11_hmm
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tfswa_lab.sequence.hmm import HMM, CategoricalHMM, GaussianHMM, MixtureGaussianHMM
from tfswa_lab.sequence.hsmm_models import GaussianHSMM

if TYPE_CHECKING:
    from hmmlearn.base import _AbstractHMM

MODELS = {
    cls.__name__: cls for cls in (GaussianHMM, MixtureGaussianHMM, CategoricalHMM, GaussianHSMM)
}


def save(model: HMM, path: str | Path) -> Path:
    """Write a model into one file, completely or not at all.

    Raises:
        ValueError: its class is not one that `load` knows.
        OSError: the folder cannot be written to.
    """
    if type(model) not in MODELS.values():
        raise ValueError(f"cannot save a {type(model).__name__}, only {', '.join(MODELS)}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    description = {"class": type(model).__name__, "sizes": model.sizes}
    part = path.with_name(f".{path.name}.part")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    try:
        save_file(tensors, part, metadata={"tfswa_lab.sequence": json.dumps(description)})
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path


def load(path: str | Path) -> HMM:
    """Read a model that `save` has written.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such model, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            description = json.loads((file.metadata() or {})["tfswa_lab.sequence"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model = MODELS[description["class"]](**description["sizes"])
        model.to(tensors["startprob_logits"].dtype).load_state_dict(tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no model of this room, or damaged: {error}") from error
    return model


def from_hmmlearn(model: _AbstractHMM) -> HMM:
    """Our model with the parameters of an hmmlearn one, in float64.

    Raises:
        ValueError: a kind of model, or of covariance, that we do not have.
    """
    kind = type(model).__name__
    if kind == "GaussianHMM":
        ours = GaussianHMM(*model.means_.shape, covariance_type=model.covariance_type).double()
        covariances = torch.as_tensor(model._covars_)
        spherical = model.covariance_type == "spherical"
        # After a fit, hmmlearn repeats a spherical variance for each feature.
        first = covariances.reshape(len(covariances), -1)[:, 0]
        ours.covariances = first if spherical else covariances
        ours.means = model.means_
    elif kind == "GMMHMM" and model.covariance_type == "diag":
        ours = MixtureGaussianHMM(*model.means_.shape).double()
        ours.means, ours.covariances, ours.weights = model.means_, model.covars_, model.weights_
    elif kind == "CategoricalHMM":
        ours = CategoricalHMM(*model.emissionprob_.shape).double()
        ours.emissionprob = model.emissionprob_
    else:
        raise ValueError(
            f"cannot take over a {kind} with covariance {getattr(model, 'covariance_type', '–')}: "
            "only GaussianHMM, GMMHMM with diagonal covariance, and CategoricalHMM"
        )
    ours.startprob, ours.transmat = model.startprob_, model.transmat_
    return ours


@torch.no_grad()
def to_hmmlearn(model: HMM) -> _AbstractHMM:
    """An hmmlearn model with our parameters. It needs the package hmmlearn.

    Raises:
        ValueError: a model that hmmlearn does not have.
    """
    from hmmlearn import hmm

    k = model.num_states
    if isinstance(model, GaussianHMM):
        theirs = hmm.GaussianHMM(k, covariance_type=model.emissions.covariance_type)
        theirs.n_features = model.means.shape[1]
        theirs.means_ = model.means.double().numpy()
        theirs.covars_ = model.covariances.double().numpy()
    elif isinstance(model, MixtureGaussianHMM):
        theirs = hmm.GMMHMM(k, n_mix=model.weights.shape[1], covariance_type="diag")
        theirs.n_features = model.means.shape[2]
        theirs.means_ = model.means.double().numpy()
        theirs.covars_ = model.covariances.double().numpy()
        theirs.weights_ = model.weights.double().numpy()
    elif isinstance(model, CategoricalHMM):
        theirs = hmm.CategoricalHMM(k)
        theirs.n_features = model.emissionprob.shape[1]
        theirs.emissionprob_ = model.emissionprob.double().numpy()
    else:
        raise ValueError(f"hmmlearn has no {type(model).__name__}")
    theirs.startprob_ = model.startprob.double().numpy()
    theirs.transmat_ = model.transmat.double().numpy()
    return theirs
