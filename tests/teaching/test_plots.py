"""Pictures: physics ends up at the right place, colours are told apart, nothing leaks."""

import itertools

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb

from tfswa_lab.stft import STFTProcessor
from tfswa_lab.teaching import plots

RATE = 44_100


pytestmark = pytest.mark.usefixtures("headless")


def tone_spectrogram(hz: float, start_seconds: float = 0.0) -> torch.Tensor:
    time = torch.arange(RATE) / RATE
    return STFTProcessor()(torch.sin(2 * torch.pi * hz * time) * (time >= start_seconds))


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_a_tone_is_drawn_at_its_frequency_and_time(scale):
    _, ax = plots.plot_spectrogram(tone_spectrogram(1000.0, start_seconds=0.5), scale=scale)
    mesh = ax.collections[0]
    corners = mesh.get_coordinates()  # (f + 1, t + 1, 2): seconds, Hz
    row, column = np.unravel_index(mesh.get_array().argmax(), mesh.get_array().shape)
    left, right = corners[0, column, 0], corners[0, column + 1, 0]
    low, high = corners[row, 0, 1], corners[row + 1, 0, 1]
    assert low < 1000 < high
    assert left > 0.5 - 0.03
    assert (left + right) / 2 == pytest.approx(column * 512 / RATE)
    assert ax.get_yscale() == scale
    assert ax.get_ylim()[1] == RATE / 2


def test_decibels_are_relative_to_the_maximum_or_to_the_reference():
    magnitude = torch.tensor([[1.0, 0.1], [0.0, 10.0]])
    expected = torch.tensor([[-20.0, -40.0], [-120.0, 0.0]])
    torch.testing.assert_close(plots.power_db(magnitude), expected)
    torch.testing.assert_close(plots.power_db(magnitude, reference=1e4)[1, 1].item(), -20.0)
    assert plots.power_db(torch.zeros(3, 4)).max() == -120  # silence is black, and no NaN


def test_channels_are_averaged_in_power():
    antiphase = torch.stack([torch.ones(2, 2), -torch.ones(2, 2)]).to(torch.cfloat)
    torch.testing.assert_close(plots.mean_power(antiphase), torch.ones(2, 2))


def test_a_column_of_stems_shares_one_range():
    loud = tone_spectrogram(500.0)
    _, axes = plots.plot_stems({"vocals": loud, "bass": 0.01 * loud})
    levels = [ax.collections[0].get_array().max() for ax in axes]
    assert levels[0] - levels[1] == pytest.approx(40.0, abs=0.1)
    assert {ax.collections[0].get_clim() for ax in axes} == {(-80.0, 0.0)}
    titles = [(ax.get_title(loc="left"), ax._left_title.get_color()) for ax in axes]
    assert titles == [(name, plots.STEM_COLOURS[name]) for name in ("vocals", "bass")]


def test_everything_draws_into_given_axes_and_opens_no_other_figure():
    fig, axes = plt.subplots(2, 2)
    calls = [
        lambda ax: plots.plot_waveform(torch.randn(2, 1000), stem="drums", ax=ax),
        lambda ax: plots.plot_spectrogram(torch.rand(2, 129, 10), ax=ax),
        lambda ax: plots.plot_mask(torch.rand(129, 10), ax=ax),
        lambda ax: plots.plot_matrix(torch.rand(5, 6).softmax(-1), ax=ax),
    ]
    for ax, call in zip(axes.flat, calls, strict=True):
        assert call(ax) == (fig, ax)
        assert ax.get_xlabel()
        assert ax.get_ylabel()
    assert plt.get_fignums() == [fig.number]
    fig.canvas.draw()


def test_units_are_written():
    _, ax = plots.plot_waveform(torch.zeros(2, RATE), start_seconds=3.0)
    assert ax.get_xlabel() == "time in s"
    assert ax.get_xlim() == pytest.approx((3.0, 4.0), abs=1e-3)
    fig, ax = plots.plot_spectrogram(torch.rand(129, 10))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time in s", "frequency in Hz")
    assert fig.axes[1].get_ylabel().startswith("dB re")
    fig, ax = plots.plot_mask(torch.rand(129, 10))
    assert ax.collections[0].get_clim() == (0, 1)


def test_colour_maps_grow_lighter_evenly():
    for name in ("magma", "cividis"):
        levels = [lightness(colour[:3]) for colour in matplotlib.colormaps[name](range(256))]
        steps = np.diff(levels)
        assert steps.min() > -0.05
        assert steps.max() < 4 * steps.mean()


def test_stem_colours_differ_in_grey_and_for_colour_blind_readers():
    colours = {name: np.array(to_rgb(colour)) for name, colour in plots.STEM_COLOURS.items()}
    for one, other in itertools.combinations(colours.values(), 2):
        assert abs(lightness(one) - lightness(other)) > 13
        for blindness in COLOUR_BLIND.values():
            assert np.abs(blindness @ linear(one) - blindness @ linear(other)).max() > 0.05


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="scale='mel'"):
        plots.plot_spectrogram(torch.rand(129, 10), scale="mel")
    with pytest.raises(ValueError, match="at least one"):
        plots.plot_stems({})


def linear(rgb: np.ndarray) -> np.ndarray:
    """SRGB to linear light (IEC 61966-2-1)."""
    rgb = np.asarray(rgb)
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lightness(rgb: np.ndarray) -> float:
    """CIE L* of an sRGB colour, 0 to 100."""
    luminance = linear(rgb) @ [0.2126, 0.7152, 0.0722]
    return 116 * np.cbrt(luminance) - 16 if luminance > 0.008856 else 903.3 * luminance


# Machado, Oliveira & Fernandes, IEEE TVCG 2009, severity 1.0.
COLOUR_BLIND = {
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
}
