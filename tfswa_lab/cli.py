"""The command line: `tfswa-lab separate SONG --model FOLDER --out FOLDER`, and `tfswa-lab train`.

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
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
) -> None:
    """Separate a song of any length and sample rate into one file per stem."""
    try:
        files = separate_file(song, model, out, segment_seconds, overlap, device)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    for file in files:
        typer.echo(file)


def separate_file(
    song: Path, model: Path, out: Path, segment_seconds: float, overlap: float, device: str
) -> list[Path]:
    """Read, resample to the model's rate, separate, resample back, and write the stems."""
    # Imported here: `tfswa-lab --help` should not wait for torch.
    from tqdm import tqdm

    from tfswa_lab import audio
    from tfswa_lab.device import pick_device
    from tfswa_lab.evaluation.separate import separate_track
    from tfswa_lab.models.storage import load_separator

    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; name a folder for the stems")
    separator = load_separator(model).to(pick_device(device))
    mixture, rate = audio.read(song)
    heard = audio.to_channels(mixture, separator.audio_channels)
    resampled = audio.resample(heard, rate, separator.sample_rate)
    segment = round(segment_seconds * separator.sample_rate)
    estimates = separate_track(separator, resampled, segment, overlap, progress=tqdm)
    estimates = audio.resample(estimates, separator.sample_rate, rate)[..., : mixture.shape[1]]
    gain = 1 / max(1.0, estimates.abs().max().item())
    if gain < 1:
        typer.echo(f"an estimate would clip: all stems are scaled by {gain:.3f}", err=True)
    return [
        audio.write(out / f"{song.stem}_{stem}.wav", gain * estimate, rate)
        for stem, estimate in zip(separator.stems, estimates, strict=True)
    ]


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


if __name__ == "__main__":
    app()
