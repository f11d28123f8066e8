"""Exported programs as networks: a file from `performance.export` runs, and no network is built.

An exported file is a program. Run it only if you trust who made it: unlike the weights of a
separator's folder, it can hold more than numbers.

Axis letters: `b` batch, `n` stems, `c` channels, `s` samples, `t` frames, `f` frequency bins.

Notebook: 10_staged_pipelines
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tfswa_lab.models.separator import Separator

FORMATS = {"onnx": ".onnx", "pt2": ".pt2", "torchscript": ".ts"}  # and the ends of their names
METADATA = "tfswa_lab.json"  # the name of the description inside a file


@dataclass(frozen=True)
class Program:
    """A file that was read.

    Args:
        path: of the file.
        metadata: what `performance.export` wrote into it; empty for a foreign file.
        run: from a float32 tensor on the CPU to another.
        fixed: axes of the input, among batch and frames or samples, that the file says cannot
            change; none for TorchScript, which says nothing of axes.
    """

    path: Path
    metadata: dict[str, Any]
    run: Callable[[Tensor], Tensor]
    fixed: tuple[int, ...]

    def __reduce__(self) -> tuple:
        """Other processes, and copies, read the file again: a session cannot be copied."""
        return open_program, (self.path,)


def is_exported(path: str | Path) -> bool:
    """Whether a name ends as those of exported programs do.

    >>> is_exported("model.onnx"), is_exported("runs/tiny")
    (True, False)
    """
    return Path(path).suffix in FORMATS.values()


def open_program(path: str | Path) -> Program:
    """Read an exported program, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the name has another ending, the file is broken, or onnxruntime is missing.
    """
    path = Path(path)
    if not is_exported(path):
        endings = ", ".join(FORMATS.values())
        raise ValueError(f"{path} is no exported program; their names end in {endings}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; write one with tfswa-lab export")
    reader = {".onnx": _open_onnx, ".pt2": _open_pt2, ".ts": _open_torchscript}[path.suffix]
    if path.suffix == ".onnx":
        needed("onnxruntime")
    try:
        return reader(path)
    except Exception as error:  # each reader has errors of its own
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{path} is broken, or no such program ({reason}); export it again"
        ) from error


def needed(name: str) -> ModuleType:
    """Import a package that only exported programs need.

    Raises:
        ValueError: it is missing; says how it is installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ValueError(f"ONNX files need {package}: pip install {package}") from error


def _open_onnx(path: Path) -> Program:
    onnxruntime = needed("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised; they need not be printed as well
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (given,), metadata = session.get_inputs(), session.get_modelmeta().custom_metadata_map

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])

    fixed = tuple(axis for axis in (0, 2) if isinstance(given.shape[axis], int))
    return Program(path, json.loads(metadata.get(METADATA, "{}")), run, fixed)


def _open_pt2(path: Path) -> Program:
    files = {METADATA: ""}
    program = torch.export.load(path, extra_files=files)
    (name,) = program.graph_signature.user_inputs
    (node,) = (node for node in program.graph.nodes if node.name == name)
    fixed = tuple(axis for axis in (0, 2) if isinstance(node.meta["val"].shape[axis], int))
    return Program(path, json.loads(files[METADATA] or "{}"), program.module(), fixed)


def _open_torchscript(path: Path) -> Program:
    files = {METADATA: ""}
    program = torch.jit.load(path, map_location="cpu", _extra_files=files)
    return Program(path, json.loads(files[METADATA] or "{}"), program, ())


class ExportedNetwork(nn.Module):
    """A program in the place of a separator's network; it always runs on the CPU.

    Args:
        program: of a network without its STFT, `(b, c, t, f)` to `(b, o, t, f)`.

    Raises:
        ValueError: the file does not say what it is.
    """

    def __init__(self, program: Program):
        super().__init__()
        self.sizes = described(program)["sizes"]
        self.separator_heads = (program.metadata["mask"],) if "mask" in program.metadata else ()
        self.program = program
        digest = sha256(program.path.read_bytes()).digest()
        self.register_buffer("digest", torch.tensor(list(digest), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """Run the program on a copy on the CPU; the output is on the device of `x`."""
        with torch.inference_mode(False), torch.no_grad():
            heard = x.detach().to("cpu", torch.float32).contiguous().clone()
            return self.program.run(heard).to(x)


class ExportedSeparator(Separator):
    """A program from waveforms to waveforms, as a separator."""

    def forward(self, mixture: Tensor) -> Tensor:
        """Mixture `(b, c, s)` to estimates `(b, n, c, s)`."""
        return self.model(mixture)

    def spectrograms(self, spectrogram: Tensor) -> Tensor:
        """Refuse: they stay inside the program.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{self.model.program.path} gives waveforms only; export without --with-stft"
        )

    masks = spectrograms


def described(program: Program) -> dict[str, Any]:
    """The metadata of a program.

    Raises:
        ValueError: it has none.
    """
    if not program.metadata:
        raise ValueError(
            f"{program.path} does not say its stems, rate and STFT; write it with tfswa-lab export"
        )
    return program.metadata
