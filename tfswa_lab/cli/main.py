"""The command line: `tfswa-lab separate SONG --model FOLDER --out FOLDER`, `train` and `evaluate`.

Notebook: 03_tfswa_unet
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from tfswa_lab.cli.errors import one_line_errors
from tfswa_lab.cli.options import list_of
from tfswa_lab.cli.train import train

SHORTER = "shorten the segments (--segment-seconds), or close what else uses the memory"

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
    overlap: Annotated[float, typer.Option(min=0.0, max=0.5, help="Of two segments.")] = 0.25,
    shifts: Annotated[
        int, typer.Option(min=0, help="Average so many estimates, whose segments differ.")
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

    with one_line_errors(SHORTER, bad_input=2):
        separator = load_separator(model).to(pick_device(device))
        segmentation = Segmentation(segment_seconds, overlap, shifts, batch_size)
        files, gain = separate_file(separator, song, out, segmentation, tqdm, as_float)
    if gain < 1:
        typer.echo(f"an estimate would clip: all stems are scaled by {gain:.3f}", err=True)
    for file in files:
        typer.echo(file)


app.command()(train)

SONGS, SCORES, MODEL, WORK = (
    partial(typer.Option, rich_help_panel=panel, show_default=False)
    for panel in ("Songs and estimates", "Scores", "Model", "Machine")
)


@app.command()
def evaluate(
    model: Annotated[Path | None, SONGS(help="A folder written by save_separator.")] = None,
    estimates: Annotated[Path | None, SONGS(help="Or of files, SPLIT/SONG/STEM.wav.")] = None,
    stems: Annotated[tuple | None, SONGS(help="Of the estimates.", **list_of(str))] = None,
    data_root: Annotated[Path | None, SONGS(help="Shaped as MUSDB18; the band if absent.")] = None,
    split: Annotated[str, SONGS(help="train, valid or test.")] = "test",
    output_dir: Annotated[
        Path | None, SCORES(help="evaluations/PARENT/NAME of the model or estimates if absent.")
    ] = None,
    overwrite: Annotated[bool, SCORES(help="Remove the scores there and begin anew.")] = False,
    window: Annotated[float | None, SCORES(help="Seconds of a frame; 1 if absent.")] = None,
    hop: Annotated[float | None, SCORES(help="From frame to frame; 1 if absent.")] = None,
    seconds: Annotated[float | None, SCORES(help="Only the beginning of songs.")] = None,
    bounds: Annotated[bool, SCORES(help="Score floor and ceilings as well.")] = True,
    bounds_dir: Annotated[Path | None, SCORES(help="Theirs; several models can share it.")] = None,
    segment_seconds: Annotated[float | None, MODEL(help="It sees at once; 6 if absent.")] = None,
    overlap: Annotated[float | None, MODEL(help="Of segments; 0.25 if absent.")] = None,
    shifts: Annotated[int | None, MODEL(help="Average so many estimates; 1 if absent.")] = None,
    batch_size: Annotated[int | None, MODEL(help="Segments at once; 1 if absent.")] = None,
    jobs: Annotated[int | None, WORK(help="Songs side by side; 3 GiB each.")] = None,
    device: Annotated[str, WORK(help="cpu, cuda, or auto.")] = "auto",
) -> None:
    """Score a model, or estimates in files; with no option at all, what ships with the package.

    Run again after a kill, it goes on where it stopped; leave out --overwrite then. museval's
    EvalStore reads the scores.
    """
    run_evaluate({name: value for name, value in locals().items() if value is not None})


def run_evaluate(options: dict) -> None:
    """Score, with `evaluate`'s own defaults for what was not given, and draw the scores."""
    from tfswa_lab.cli.evaluate import OF_MODEL, Source, run_evaluation
    from tfswa_lab.evaluation.oracles import BOUNDS
    from tfswa_lab.teaching.score_plot import write_picture

    options["bounds"] = tuple(BOUNDS) if options["bounds"] else ()
    of_model = {name: options.pop(name) for name in OF_MODEL if name in options}
    files = {name: options.pop(name, None) for name in ("model", "estimates", "stems")}
    with one_line_errors(f"{SHORTER}, or score fewer songs at once (--jobs)"):
        report, text = run_evaluation(Source(**files, of_model=of_model), **options)
        picture = text.with_suffix(".png")
        write_picture(report, picture)
    typer.echo(f"the tables: {text}\na picture:  {picture}")


if __name__ == "__main__":
    app()
