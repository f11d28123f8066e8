"""Draw the picture of the README: a mixture, its stems, and what each attention sees of one cell.

python data_scripts/make_picture.py docs/lab.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import torch
import typer
from matplotlib.axes import Axes
from torch import Tensor, nn

from tfswa_lab import audio
from tfswa_lab.data.band import ensure_band
from tfswa_lab.models.attention import (
    FrequencySequenceAttention,
    ShiftedWindowAttention,
    TemporalSequenceAttention,
)
from tfswa_lab.stft import STFTProcessor
from tfswa_lab.teaching.plots import STEM_COLOURS, mean_power, power_db

SONG = "test/Quiet Lanterns - Holding Every Window"
SECONDS = 6
GRID, CELL = (24, 32), (9, 12)  # frames × bins of the attention maps, and the cell that looks


def seen_from(unit: nn.Module) -> Tensor:
    """Size of the gradient of the output cell `CELL` with respect to every input cell, `(f, t)`."""
    torch.manual_seed(0)
    for parameter in unit.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, 8, *GRID, requires_grad=True)
    unit(x)[0, :, CELL[0], CELL[1]].sum().backward()
    return x.grad[0].abs().sum(0).T


def draw_stems(axes: list[Axes]) -> None:
    """Spectrograms of the mixture and its stems on one dB range."""
    stft, folder = STFTProcessor(), ensure_band() / SONG
    spectrograms = {}
    for name in ("mixture", *audio.STEMS):
        waveform, rate = audio.read(folder / f"{name}.wav", frames=SECONDS * audio.SAMPLE_RATE)
        spectrograms[name] = stft(waveform)
    reference = mean_power(spectrograms["mixture"]).max().item()
    for ax, (name, spectrogram) in zip(axes, spectrograms.items(), strict=True):
        level = power_db(spectrogram, reference)
        hz = torch.linspace(0, rate / 2, level.shape[0])
        seconds = torch.arange(level.shape[1]) * stft.hop_length / rate
        ax.pcolormesh(seconds, hz, level, cmap="magma", vmin=-80, vmax=0, rasterized=True)
        ax.set_yscale("log")
        ax.set(ylim=(60, 16_000), yticks=[])
        ax.set_title(name, color=STEM_COLOURS[name], weight="bold", loc="left")
        ax.minorticks_off()
    axes[0].set_yticks([100, 1000, 10_000], ["100 Hz", "1 kHz", "10 kHz"])
    axes[0].set_xlabel("time in s")


def draw_attentions(axes: list[Axes]) -> None:
    """Which cells one cell sees through each attention."""
    units = {
        "TSA: its frequency, all time": TemporalSequenceAttention(8, 2),
        "FSA: its frame, all frequencies": FrequencySequenceAttention(8, 2),
        "W-MSA: its window": ShiftedWindowAttention(8, 2, 8),
        "SW-MSA: the shifted window": ShiftedWindowAttention(8, 2, 8, 4),
    }
    for ax, (title, unit) in zip(axes, units.items(), strict=True):
        ax.imshow(seen_from(unit) > 0, origin="lower", cmap="cividis", aspect="auto")
        ax.plot(*CELL, "o", color="#c1394b", markersize=5)
        ax.set_title(title, fontsize="medium", loc="left")
        ax.set(xticks=[], yticks=[])
    axes[0].set(xlabel="time", ylabel="frequency")


def main(target: Annotated[Path, typer.Argument(help="PNG to write.")]) -> None:
    """Draw the picture of the README."""
    figure = plt.figure(figsize=(11, 5), layout="constrained", dpi=110)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    draw_stems(list(top.subplots(1, 5, sharex=True)))
    draw_attentions(list(bottom.subplots(1, 4)))
    figure.savefig(target)


if __name__ == "__main__":
    typer.run(main)
