"""Figures of the lessons: units on every axis, one colour per stem, one dB range per set.

Axis letters: `c` channels, `f` frequency bins, `t` frames, `s` samples.

Every function takes `ax=None`, returns `fig, ax`, and changes no other state of matplotlib.

Notebook: 01_sound_to_spectrogram
"""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from torch import Tensor

from tfswa_lab.audio import SAMPLE_RATE

# Their lightness is 15 steps (CIE L*) or more apart, so they differ in grey and for colour-blind
# readers; a test measures it.
STEM_COLOURS = {
    "mixture": "#1a1a1a",
    "vocals": "#c1394b",
    "drums": "#e6b033",
    "bass": "#004488",
    "other": "#35a08a",
}
OTHER_COLOUR = "#707070"  # for a signal that is not a stem, such as a tone or a residual
DB_RANGE = 80.0
LOWEST_HZ = 40.0  # the lower end of a logarithmic frequency axis


def _axes(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    if ax is not None:
        return ax.figure, ax
    return plt.subplots(figsize=size, layout="constrained", dpi=100)


def _title(ax: Axes, title: str | None) -> None:
    ax.set_title(title or "", loc="left", fontsize="medium")


def plot_waveform(
    waveform: Tensor, rate: int = SAMPLE_RATE, stem: str = "", start_seconds: float = 0.0, ax=None
) -> tuple[Figure, Axes]:
    """A waveform `(s,)` or `(c, s)` over time; channels are averaged, the colour is the stem's.

    Notebook: 00_start_here
    """
    fig, ax = _axes(ax, (8, 1.8))
    mono = torch.atleast_2d(waveform).detach().cpu().mean(0).numpy()
    seconds = start_seconds + np.arange(len(mono)) / rate
    ax.plot(seconds, mono, color=STEM_COLOURS.get(stem, OTHER_COLOUR), linewidth=0.6)
    ax.set(xlabel="time in s", ylabel="amplitude", xlim=(seconds[0], seconds[-1] + 1 / rate))
    _title(ax, stem)
    return fig, ax


def power_db(spectrogram: Tensor, reference: float | None = None) -> Tensor:
    """Power in dB of a complex or magnitude spectrogram `(f, t)` or `(c, f, t)`, channels averaged.

    Args:
        spectrogram: complex, or magnitudes.
        reference: the power that is 0 dB; by default the largest one. A set of pictures shares it.

    >>> power_db(torch.tensor([[1.0, 0.1]]))
    tensor([[  0., -20.]])
    """
    power = mean_power(spectrogram)
    reference = reference or power.max().item() or 1.0
    return 10 * (power / reference).clamp(min=1e-12).log10()


def mean_power(spectrogram: Tensor) -> Tensor:
    """Power `(f, t)` of a spectrogram `(f, t)` or `(c, f, t)`, averaged over channels."""
    power = spectrogram.detach().cpu().abs().square()
    return power.mean(0) if power.ndim == 3 else power


def plot_spectrogram(
    spectrogram: Tensor,
    hop_length: int = 512,
    rate: int = SAMPLE_RATE,
    title: str | None = None,
    scale: str = "log",
    reference: float | None = None,
    ax=None,
) -> tuple[Figure, Axes]:
    """A spectrogram `(f, t)` or `(c, f, t)`, complex or magnitude, over the top 80 dB.

    Args:
        spectrogram: from an STFT whose frames are `hop_length` samples apart.
        hop_length: in samples.
        rate: samples per second.
        title: what to see.
        scale: "log" or "linear" frequency axis.
        reference: the power that is 0 dB, see `power_db`.
        ax: where to draw.
    """
    fig, ax = _axes(ax, (8, 3))
    level = power_db(spectrogram, reference)
    mesh = _time_frequency(ax, level, hop_length, rate, scale, cmap="magma", vmin=-DB_RANGE, vmax=0)
    against = "its maximum" if reference is None else "the loudest cell of the set"
    fig.colorbar(mesh, ax=ax, label=f"dB re {against}", extend="min")
    _title(ax, title)
    return fig, ax


def plot_mask(
    mask: Tensor,
    hop_length: int = 512,
    rate: int = SAMPLE_RATE,
    title: str | None = None,
    scale: str = "log",
    ax=None,
) -> tuple[Figure, Axes]:
    """A mask `(f, t)` or `(c, f, t)` with values in [0, 1]: what passes is bright."""
    fig, ax = _axes(ax, (8, 3))
    mask = mask.detach().cpu().float()
    mask = mask.mean(0) if mask.ndim == 3 else mask
    mesh = _time_frequency(ax, mask, hop_length, rate, scale, cmap="cividis", vmin=0, vmax=1)
    fig.colorbar(mesh, ax=ax, label="share that passes")
    _title(ax, title)
    return fig, ax


def _time_frequency(
    ax: Axes, values: Tensor, hop_length: int, rate: int, scale: str, **colours
) -> QuadMesh:
    """Cells `(f, t)` centred on their frame's time and their bin's frequency."""
    if scale not in ("log", "linear"):
        raise ValueError(f'scale={scale!r} must be "log" or "linear"')
    bins, frames = values.shape
    spacing = rate / 2 / (bins - 1)
    hz = (np.arange(bins + 1) - 0.5) * spacing
    seconds = (np.arange(frames + 1) - 0.5) * hop_length / rate
    mesh = ax.pcolormesh(seconds, hz.clip(0), values.numpy(), rasterized=True, **colours)
    ax.set(xlabel="time in s", ylabel="frequency in Hz", xlim=(0, seconds[-1]), ylim=(0, rate / 2))
    if scale == "log":
        ax.set_yscale("log")
        ax.set_yticks([100, 1_000, 10_000], ["100", "1k", "10k"])
        ax.set_ylim(max(LOWEST_HZ, spacing / 2), rate / 2)  # after the ticks, which widen it
    return mesh


def plot_matrix(
    matrix: Tensor,
    xlabel: str = "key",
    ylabel: str = "query",
    title: str | None = None,
    label: str = "attention weight",
    ax=None,
) -> tuple[Figure, Axes]:
    """A matrix `(queries, keys)` such as an attention map, from 0 up, first row on top.

    Notebook: 02_attention_blocks
    """
    fig, ax = _axes(ax, (4, 3.4))
    weights = matrix.detach().cpu().float().numpy()
    image = ax.imshow(weights, cmap="cividis", vmin=0, interpolation="nearest")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    fig.colorbar(image, ax=ax, label=label)
    _title(ax, title)
    return fig, ax


def plot_stems(
    spectrograms: Mapping[str, Tensor],
    hop_length: int = 512,
    rate: int = SAMPLE_RATE,
    scale: str = "log",
) -> tuple[Figure, np.ndarray]:
    """A column of spectrograms with one dB range and one colour bar, titles in stem colours.

    Args:
        spectrograms: name to `(f, t)` or `(c, f, t)`; the loudest cell of all is 0 dB.
        hop_length: in samples.
        rate: samples per second.
        scale: "log" or "linear" frequency axis.
    """
    if not spectrograms:
        raise ValueError("plot_stems() needs at least one spectrogram")
    rows = len(spectrograms)
    fig, axes = plt.subplots(
        rows, 1, figsize=(8, 0.4 + 1.5 * rows), sharex=True, squeeze=False, layout="constrained"
    )
    reference = max(mean_power(s).max().item() for s in spectrograms.values())
    for ax, (name, spectrogram) in zip(axes[:, 0], spectrograms.items(), strict=True):
        level = power_db(spectrogram, reference)
        mesh = _time_frequency(
            ax, level, hop_length, rate, scale, cmap="magma", vmin=-DB_RANGE, vmax=0
        )
        ax.set_title(name, loc="left", color=STEM_COLOURS.get(name, OTHER_COLOUR), weight="bold")
        ax.label_outer()
        ax.set_ylabel("Hz")
    label = "dB re the loudest cell of the set"
    fig.colorbar(mesh, ax=axes, label=label, extend="min", aspect=50, pad=0.02)
    return fig, axes[:, 0]
