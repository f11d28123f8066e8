"""`tfswa-lab export`: a model as an ONNX file, a program of `torch.export`, or a TorchScript file.

Notebook: 10_staged_pipelines
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from tfswa_lab.cli.errors import ended_by_signals, one_line_errors, say
from tfswa_lab.cli.options import panel, takes

FILE, WEIGHTS, CHECK = map(panel, ("File", "Weights", "Check"))
LESS_MEMORY = "close other programs that use memory"


@dataclass(frozen=True)
class ExportOptions:
    """What can be typed; None stands for "not given"."""

    model: Annotated[str, typer.Argument(help="A name, or the folder of a model or a run.")]
    out: Annotated[
        Path | None, FILE("--out", "-o", help="File; default MODEL.onnx, .pt2 or .ts.")
    ] = None
    format: Annotated[
        str | None,
        FILE(help="onnx, pt2 or torchscript; default: by the ending of --out, else onnx."),
    ] = None
    with_stft: Annotated[
        bool, FILE("--with-stft", help="From waveform to stems, with the STFT as convolutions.")
    ] = False
    overwrite: Annotated[bool, FILE("--overwrite", help="Replace an existing file.")] = False
    precision: Annotated[str, WEIGHTS(help="fp32, fp16 or int8; default fp32.")] = "fp32"
    per_tensor: Annotated[
        bool, WEIGHTS("--per-tensor", help="int8: one scale per matrix, not per output channel.")
    ] = False
    accept_loss: Annotated[
        bool, CHECK("--accept-loss", help="Keep a file that loses more than 0.5 dB of SDR.")
    ] = False
    data_root: Annotated[
        Path | None, CHECK(help="Songs for the SDR, MUSDB18-shaped; default: the band.")
    ] = None

    def chosen_format(self) -> str:
        """The format that is named, or that the file's ending means."""
        from tfswa_lab.models.exported import FORMATS

        by_ending = {ending: name for name, ending in FORMATS.items()}
        suffix = self.out.suffix if self.out else ""
        return self.format or by_ending.get(suffix, "onnx")

    def path(self) -> Path:
        """The file, named after the model where no name was given."""
        from tfswa_lab.models.exported import FORMATS

        if self.out:
            return self.out
        ending = FORMATS.get(self.chosen_format(), "")
        return Path(f"{Path(self.model).expanduser().resolve().name}{ending}")


@takes(ExportOptions)
def export(options: ExportOptions) -> None:
    """Write a model as a program that runs without this package.

    The file is checked against the model at many sizes first, and its loss measured on songs if
    the precision is not fp32. `tfswa-lab separate SONG --model FILE` runs it.
    """
    # Imported here: `tfswa-lab --help` should not wait for torch.
    from tfswa_lab.models.storage import load_separator
    from tfswa_lab.performance.export import export as written

    with one_line_errors(lambda: LESS_MEMORY), ended_by_signals():
        report = written(
            load_separator(options.model),
            options.path(),
            options.chosen_format(),
            options.precision,
            options.with_stft,
            options.accept_loss,
            options.data_root,
            per_channel=not options.per_tensor,
            overwrite=options.overwrite,
        )
    say(report, err=False)
