"""Overlap-add must be invisible: an identity separator returns its input."""

import pytest
import torch
from torch import nn

from tfswa_lab.evaluation.separate import fade_window, separate_track


class Identity(nn.Module):
    """One stem, the mixture itself; remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.lengths = []

    def forward(self, mixture):
        self.lengths.append(mixture.shape[-1])
        return mixture[:, None]


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 1000, 8372])
def test_an_identity_returns_the_input_without_seam_or_lost_tail(length, overlap):
    mixture = torch.randn(2, length)
    model = Identity()
    estimates = separate_track(model, mixture, segment=64, overlap=overlap)
    assert estimates.shape == (1, 2, length)
    torch.testing.assert_close(estimates[0], mixture, atol=1e-6, rtol=0)
    assert set(model.lengths) == {min(64, length)}


class ZeroMean(nn.Module):
    """Subtracts the segment's mean: silence appended to a segment would change its output."""

    def forward(self, mixture):
        return (mixture - mixture.mean(-1, keepdim=True))[:, None]


@pytest.mark.parametrize("length", [30, 64, 65, 1000])
def test_no_silence_is_shown_to_the_model(length):
    estimates = separate_track(ZeroMean(), torch.full((2, length), 0.5), segment=64)
    assert estimates.abs().max() < 1e-6


def test_the_work_grows_with_the_overlap_as_it_should():
    model = Identity()
    separate_track(model, torch.zeros(2, 64 * 100), segment=64, overlap=0.25)
    assert len(model.lengths) == 133  # ceil((6400 - 16) / (64 - 16))


def test_windows_of_neighbours_cross_fade_symmetrically():
    window = fade_window(64, 16)
    torch.testing.assert_close(window[:16] + window[-16:], torch.ones(16))
    assert (window > 0).all()


@pytest.mark.parametrize(
    ("mixture", "overlap", "message"),
    [
        (torch.zeros(2, 0), 0.25, "channels, samples"),
        (torch.zeros(10), 0.25, "channels, samples"),
        (torch.zeros(2, 10), 0.9, "overlap=0.9"),
        (torch.zeros(2, 10), -0.1, "overlap=-0.1"),
    ],
)
def test_bad_input_is_refused(mixture, overlap, message):
    with pytest.raises(ValueError, match=message):
        separate_track(Identity(), mixture, 64, overlap)


@pytest.mark.parametrize("segment", [0, -5, 500.0])
def test_a_segment_that_is_no_number_of_samples_is_refused(segment):
    with pytest.raises(ValueError, match="must be a number of samples"):
        separate_track(Identity(), torch.zeros(2, 10), segment)
