"""Separators on disk: the weights as safetensors, the description as JSON beside them.

Nothing is unpickled, so a foreign file can be wrong but cannot run code. (A program that
`performance.export` has written is loaded as well, and is code.)

Notebook: 03_tfswa_unet
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from tfswa_lab import weights
from tfswa_lab.durable import write_whole
from tfswa_lab.models.exported import (
    ExportedNetwork,
    ExportedSeparator,
    Program,
    is_exported,
    open_program,
)
from tfswa_lab.models.mask_resunet import MaskResUNet
from tfswa_lab.models.separator import Separator
from tfswa_lab.models.tf_locoformer import TFLocoformer
from tfswa_lab.models.tfswa_resunet import TFSWAResUNet
from tfswa_lab.models.tfswa_unet import TFSWAUNet
from tfswa_lab.stft import (
    LevelNormalizer,
    RMSNormalizer,
    RunningSpectrogramNormalizer,
    SpectrogramNormalizer,
    STFTProcessor,
)

WEIGHTS = "separator.safetensors"
DESCRIPTION = "separator.json"
SHIPPED = Path(weights.__file__).parent
MODELS = {cls.__name__: cls for cls in (TFSWAUNet, TFSWAResUNet, MaskResUNet, TFLocoformer)}
NORMALIZERS = {
    cls.__name__: cls
    for cls in (
        SpectrogramNormalizer,
        LevelNormalizer,
        RMSNormalizer,
        RunningSpectrogramNormalizer,
    )
}


def save_separator(separator: Separator, folder: str | Path) -> Path:
    """Write a separator into `folder`; each file appears completely or not at all.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
        ValueError: its model or normalizer is of a class that `load_separator` does not know.
    """
    check_savable(separator)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in separator.state_dict().items()}
    description = json.dumps(describe(separator), indent=2) + "\n"
    write_whole({folder / WEIGHTS: [save(weights)], folder / DESCRIPTION: [description.encode()]})
    return folder


def check_savable(separator: Separator) -> None:
    """Refuse a separator whose parts `load_separator` could not build again.

    Raises:
        ValueError: its model or normalizer is of an unknown class.
    """
    for part, known in ((separator.model, MODELS), (separator.normalizer, NORMALIZERS)):
        if type(part) not in known.values():
            raise ValueError(f"cannot save a {type(part).__name__}, only {', '.join(known)}")


def describe(separator: Separator) -> dict:
    """Everything but the weights that `load_separator` needs, in JSON's types."""
    return {
        "model": type(separator.model).__name__,
        "sizes": separator.model.sizes,
        "n_fft": separator.stft.n_fft,
        "hop_length": separator.stft.hop_length,
        "stems": separator.stems,
        "mask": separator.mask,
        "mixture_consistency": separator.mixture_consistency,
        "sample_rate": separator.sample_rate,
        "audio_channels": separator.audio_channels,
        "bins": separator.bins,
        "normalizer": type(separator.normalizer).__name__,
        "normalizer_settings": separator.normalizer.settings,
    }


def load_separator(model: str | Path) -> Separator:
    """Read what `save_separator` wrote, on the CPU and in evaluation mode.

    Args:
        model: its folder, that of a run of `tfswa-lab train`, or a name of `list_models`; or a file
            of `tfswa-lab export`, whose network always runs on the CPU.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken or foreign, weights and sizes do not fit, or onnxruntime is
            missing for an ONNX file.
    """
    folder = find_model(model)
    if is_exported(folder) and not folder.is_dir():
        return from_program(open_program(folder)).eval()
    separator = _from_description(folder / DESCRIPTION)
    _load_weights(separator, folder / WEIGHTS)
    return separator.eval()


def find_model(model: str | Path) -> Path:
    """The folder or exported file of a model, for what `load_separator` takes.

    Raises:
        FileNotFoundError: there is none.
    """
    given = Path(model).expanduser()
    if is_exported(given) and not given.is_dir():
        return given  # `open_program` says whether it is there
    for folder in (given, given / "best", list_models().get(str(model), given)):
        if (folder / DESCRIPTION).is_file() and (folder / WEIGHTS).is_file():
            return folder
    missing = WEIGHTS if (given / DESCRIPTION).is_file() else DESCRIPTION
    raise FileNotFoundError(
        f"{given / missing} is missing; a model is a folder written by save_separator, with "
        f"{DESCRIPTION} and {WEIGHTS} in it, the folder of a run, a file of tfswa-lab export, or "
        f"one of: {', '.join(list_models())}"
    )


def list_models() -> dict[str, Path]:
    """Names of the models that come with the package, and their folders.

    >>> list(list_models())
    ['band']
    """
    return {path.parent.name: path.parent for path in sorted(SHIPPED.glob(f"*/{DESCRIPTION}"))}


def _from_description(path: Path) -> Separator:
    try:
        d = json.loads(path.read_text("utf-8"))
        return Separator(MODELS[d["model"]](**d["sizes"]), **_around_network(d))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not describe a separator ({error!r}); save the model again"
        ) from error


def _around_network(d: dict) -> dict:
    """The arguments of a `Separator` but for its network, from `describe`.

    Raises:
        KeyError, TypeError, ValueError: it is no description.
    """
    if not (isinstance(d["sample_rate"], int) and d["sample_rate"] > 0):
        raise ValueError(f"sample_rate={d['sample_rate']!r} is not a number of Hz")
    names = ("stems", "mask", "mixture_consistency", "sample_rate", "audio_channels", "bins")
    return {name: d[name] for name in names} | {
        "stft": STFTProcessor(d["n_fft"], d["hop_length"]),
        "normalizer": NORMALIZERS[d["normalizer"]](**d.get("normalizer_settings", {})),
    }  # earlier descriptions have no settings


def from_program(program: Program) -> Separator:
    """A separator around an exported program, whose metadata are those of `describe` and more."""
    network, d = ExportedNetwork(program), program.metadata
    try:
        kind = ExportedSeparator if d["with_stft"] else Separator
        separator = kind(network, **_around_network(d))
        state = {name: torch.tensor(values) for name, values in d["normalizer_state"].items()}
        separator.normalizer.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{program.path} holds no separator ({error!r}); export one") from error
    return separator


def _load_weights(module: nn.Module, path: Path) -> None:
    try:
        module.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{path} does not hold the weights that {DESCRIPTION} describes ({error}); "
            "copy both files of one model again"
        ) from error
