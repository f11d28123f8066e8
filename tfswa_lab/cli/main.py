"""The command line, `tfswa-lab`: `separate`, `train`, `evaluate` and `memory`.

Notebook: 03_tfswa_unet
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tfswa_lab.cli.errors import one_line_errors
from tfswa_lab.cli.evaluate import evaluate
from tfswa_lab.cli.memory import memory
from tfswa_lab.cli.train import train

LESS_MEMORY = "lower --segment-seconds, or close other programs that use memory"

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def main() -> None:
    """Music source separation with time-frequency attention."""


@app.command()
def separate(
    song: Annotated[Path, typer.Argument(help="A WAV, FLAC, Ogg or MP3 file.")],
    model: Annotated[Path, typer.Option(help="A folder written by save_separator.")],
    out: Annotated[Path, typer.Option(help="Where the stems go, one WAV each.")],
    segment_seconds: Annotated[
        float, typer.Option(min=0.5, max=600.0, help="What the model sees at once.")
    ] = 6.0,
    overlap: Annotated[float, typer.Option(min=0.0, max=0.5, help="Share of a segment.")] = 0.25,
    shifts: Annotated[
        int, typer.Option(min=0, help="Number of estimates to average, each with shifted segments.")
    ] = 1,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Segments at once; halved where memory is short.")
    ] = 1,
    as_float: Annotated[
        bool, typer.Option("--float", help="Stems of 32-bit floats, never scaled.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
) -> None:
    """Separate a song of any length and sample rate into one file per stem."""
    # Imported here: `tfswa-lab --help` should not wait for torch.
    from tqdm import tqdm

    from tfswa_lab.device import pick_device
    from tfswa_lab.inference.files import separate_file
    from tfswa_lab.inference.separate import Segmentation
    from tfswa_lab.models.storage import load_separator

    with one_line_errors(lambda: LESS_MEMORY, bad_input=2):
        separator = load_separator(model).to(pick_device(device))
        segmentation = Segmentation(segment_seconds, overlap, shifts, batch_size)
        files, gain = separate_file(separator, song, out, segmentation, tqdm, as_float)
    if gain < 1:
        typer.echo(f"an estimate would clip: all stems are scaled by {gain:.3f}", err=True)
    for file in files:
        typer.echo(file)


app.command()(train)
app.command()(evaluate)
app.add_typer(memory, name="memory")

if __name__ == "__main__":
    app()
