"""The command line: `tfswa-lab separate SONG --model FOLDER --out FOLDER`.

Notebook: 03_tfswa_unet
"""

from __future__ import annotations

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
    resampled = audio.resample(audio.to_stereo(mixture), rate, separator.sample_rate)
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


if __name__ == "__main__":
    app()
