"""The command line: `tfswa-lab separate SONG --model FOLDER --out FOLDER`, `train` and `evaluate`.

Notebook: 03_tfswa_unet
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

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
    import torch
    from tqdm import tqdm

    from tfswa_lab.device import pick_device
    from tfswa_lab.inference.files import separate_file
    from tfswa_lab.models.storage import load_separator

    try:
        separator = load_separator(model).to(pick_device(device))
        files, gain = separate_file(
            separator, song, out, segment_seconds, overlap, tqdm, batch_size, shifts, as_float
        )
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        raise typer.BadParameter(str(error)) from error
    if gain < 1:
        typer.echo(f"an estimate would clip: all stems are scaled by {gain:.3f}", err=True)
    for file in files:
        typer.echo(file)


RUN, DATA, NETWORK, LOSS, STEPS, WATCH, MACHINE = (
    partial(typer.Option, rich_help_panel=panel, show_default=False)
    for panel in ("Run", "Data", "Network", "Loss", "Steps", "Watching", "Machine")
)


def list_of(kind: type) -> dict:
    """How an option such as `8,16,24,32` is read and shown."""
    return {
        "parser": lambda text: tuple(kind(part.strip()) for part in text.split(",")),
        "metavar": f"{kind.__name__.upper()},…",
    }


@app.command()
def train(
    preset: Annotated[str | None, RUN(help="tiny, small or default; tiny if absent.")] = None,
    output_dir: Annotated[Path | None, RUN(help="The run's folder; runs/PRESET if absent.")] = None,
    resume: Annotated[Path | None, RUN(help="A run's folder or checkpoint to go on from.")] = None,
    seed: Annotated[int | None, RUN(help="Of weights, stretches and augmentation.")] = None,
    data_root: Annotated[str | None, DATA(help="Shaped as MUSDB18; the band if absent.")] = None,
    target_stems: Annotated[tuple | None, DATA(help="As vocals,other.", **list_of(str))] = None,
    segment_seconds: Annotated[float | None, DATA(help="Length of a stretch.")] = None,
    samples_per_track: Annotated[int | None, DATA(help="Stretches per song and epoch.")] = None,
    sample_rate: Annotated[int | None, DATA(help="Resample songs to this, in Hz.")] = None,
    augment: Annotated[str | None, DATA(help="none, light or full.")] = None,
    dims: Annotated[tuple | None, NETWORK(help="Channels per level.", **list_of(int))] = None,
    depths: Annotated[tuple | None, NETWORK(help="Blocks per level.", **list_of(int))] = None,
    window_size: Annotated[int | None, NETWORK(help="Side of an attention window.")] = None,
    num_heads: Annotated[int | None, NETWORK(help="Attention heads.")] = None,
    mask: Annotated[str | None, NETWORK(help="magnitude or complex.")] = None,
    n_fft: Annotated[int | None, NETWORK(help="Window of the transform, in samples.")] = None,
    hop_length: Annotated[int | None, NETWORK(help="From frame to frame, in samples.")] = None,
    bins: Annotated[int | None, NETWORK(help="The network sees so many of the lowest.")] = None,
    l1_weight: Annotated[float | None, LOSS(help="Of the spectra in one window.")] = None,
    mrstft_weight: Annotated[float | None, LOSS(help="Of those in three windows.")] = None,
    waveform_weight: Annotated[float | None, LOSS(help="Of the samples.")] = None,
    sdr_weight: Annotated[float | None, LOSS(help="Of the SDR in dB.")] = None,
    batch_size: Annotated[int | None, STEPS(help="Stretches at once, over all devices.")] = None,
    accumulate: Annotated[int | None, STEPS(help="Batches per step.")] = None,
    max_epochs: Annotated[int | None, STEPS(help="Passes over the songs.")] = None,
    max_steps: Annotated[int | None, STEPS(help="An earlier end.")] = None,
    learning_rate: Annotated[float | None, STEPS(help="At its highest.")] = None,
    weight_decay: Annotated[float | None, STEPS(help="AdamW's.")] = None,
    warmup_steps: Annotated[int | None, STEPS(help="While the learning rate rises.")] = None,
    gradient_clip_val: Annotated[float | None, STEPS(help="Largest norm; 0 is off.")] = None,
    ema_decay: Annotated[float | None, STEPS(help="Of the averaged weights; 0 is off.")] = None,
    log_every_n_steps: Annotated[int | None, WATCH(help="Between points of a curve.")] = None,
    val_every_n_steps: Annotated[int | None, WATCH(help="Once an epoch if absent.")] = None,
    patience: Annotated[int | None, WATCH(help="Validations without progress.")] = None,
    checkpoint_every_n_steps: Annotated[int | None, WATCH(help="Once an epoch if absent.")] = None,
    checkpoint_every_n_minutes: Annotated[float | None, WATCH(help="And this often.")] = None,
    device: Annotated[str | None, MACHINE(help="cpu, cuda, or auto.")] = None,
    devices: Annotated[int | None, MACHINE(help="How many; torchrun decides itself.")] = None,
    num_workers: Annotated[int | None, MACHINE(help="Processes that read, per device.")] = None,
    precision: Annotated[str | None, MACHINE(help="32-true, bf16-mixed or 16-mixed.")] = None,
    use_amp: Annotated[bool | None, MACHINE(help="The mixed precision that fits, or none.")] = None,
    activation_checkpointing: Annotated[bool | None, MACHINE(help="Less memory, slower.")] = None,
) -> None:
    """Train a separator; with no option at all, a tiny one on the embedded band.

    Several cards: --devices 4, or torchrun --nproc-per-node 4 -m tfswa_lab.cli train …

    Ctrl-C and SIGTERM end a run after the step in hand, with a checkpoint: --resume RUN goes on.
    """
    run_training({name: value for name, value in locals().items() if value is not None})


def run_training(options: dict) -> None:
    """Train with the options given, for the others those of the checkpoint or preset."""
    import torch

    from tfswa_lab.training.run import build_trainer, choose_preset

    name, resume = options.pop("preset", None), options.pop("resume", None)
    folder = options.pop("output_dir", None)
    try:
        preset = choose_preset(name, resume, options)
        torch.manual_seed(preset.seed)  # of the first weights, alike in all processes
        trainer = build_trainer(preset, folder or run_folder(name or "tiny", resume), progress=True)
        torch.manual_seed(preset.seed + trainer.fabric.global_rank)  # of dropout, unlike
        trainer.fit(resume)
    except (OSError, ValueError, FloatingPointError) as error:
        typer.echo(f"Error: {error}", err=True)  # unframed: commands in it can be copied
        raise typer.Exit(1) from error
    if trainer.fabric.is_global_zero:
        typer.echo(
            f"{trainer.step} of {trainer.total_steps} steps; best in validation: "
            f"{trainer.best_sdr:.2f} dB SDR after step {trainer.best_step}; "
            f"it is in {trainer.output_dir / 'best'}"
        )


def run_folder(preset: str, resume: Path | None) -> Path:
    """Where a run writes if nobody says so: `RUN` for `RUN` and `RUN/checkpoints/….ckpt`."""
    if resume is None:
        return Path("runs", preset)
    return resume if resume.is_dir() else resume.parent.parent


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
    import torch

    from tfswa_lab.cli.evaluate import OF_MODEL, Source, run_evaluation
    from tfswa_lab.evaluation.oracles import BOUNDS
    from tfswa_lab.teaching.score_plot import write_picture

    options["bounds"] = tuple(BOUNDS) if options["bounds"] else ()
    of_model = {name: options.pop(name) for name in OF_MODEL if name in options}
    files = {name: options.pop(name, None) for name in ("model", "estimates", "stems")}
    try:
        report, text = run_evaluation(Source(**files, of_model=of_model), **options)
        picture = text.with_suffix(".png")
        write_picture(report, picture)
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"the tables: {text}\na picture:  {picture}")


if __name__ == "__main__":
    app()
