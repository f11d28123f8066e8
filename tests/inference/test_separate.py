"""Overlap-add must be invisible: an identity separator returns its input."""

import pytest
import torch
from torch import nn

from tfswa_lab.inference.separate import fade_window, segment_starts, separate_track


class Identity(nn.Module):
    """One stem, the mixture itself; remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.lengths = []

    def forward(self, mixture):
        self.lengths.append(mixture.shape[-1])
        return mixture[:, None]


@pytest.mark.parametrize(("batch_size", "shifts"), [(1, 0), (1, 1), (4, 1), (3, 5)])
@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 1000, 8372])
def test_an_identity_returns_the_input_without_seam_or_lost_tail(
    length, overlap, batch_size, shifts
):
    mixture = torch.randn(2, length)
    model = Identity()
    estimates = separate_track(
        model, mixture, segment=64, overlap=overlap, batch_size=batch_size, shifts=shifts
    )
    assert estimates.shape == (1, 2, length)
    torch.testing.assert_close(estimates[0], mixture, atol=1e-6, rtol=0)
    assert set(model.lengths) == {min(64, length)}


class ZeroMean(nn.Module):
    """Subtracts the segment's mean: silence appended to a segment would change its output."""

    def forward(self, mixture):
        return (mixture - mixture.mean(-1, keepdim=True))[:, None]


@pytest.mark.parametrize("shifts", [1, 3])
@pytest.mark.parametrize("length", [30, 64, 65, 1000])
def test_no_silence_is_shown_to_the_model(length, shifts):
    estimates = separate_track(ZeroMean(), torch.full((2, length), 0.5), segment=64, shifts=shifts)
    assert estimates.abs().max() < 1e-6


def test_the_work_grows_with_the_overlap_as_it_should():
    model = Identity()
    separate_track(model, torch.zeros(2, 64 * 100), segment=64, overlap=0.25)
    assert len(model.lengths) == 133  # ceil((6400 - 16) / (64 - 16))


def by_hand(model, mixture, starts, segment, fade):
    """Overlap-add as its definition says it, with the whole song in memory."""
    total, weight = torch.zeros(1, *mixture.shape), torch.zeros(mixture.shape[1])
    for start in starts:
        place = slice(start, start + segment)
        total[..., place] += model(mixture[None, :, place])[0] * fade_window(segment, fade)
        weight[place] += fade_window(segment, fade)
    return total / weight


class Centred(nn.Module):
    """Depends on where the segment lies: louder in its middle."""

    def forward(self, mixture):
        return (mixture * torch.hann_window(mixture.shape[-1]))[:, None]


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_overlapping_estimates_are_averaged_with_the_windows_as_weights(overlap):
    mixture, fade = torch.randn(2, 1000), int(64 * overlap)
    starts = [*range(0, 936, 64 - fade), 936]
    expected = by_hand(Centred(), mixture, starts, 64, fade)
    estimates = separate_track(Centred(), mixture, 64, overlap, batch_size=3)
    torch.testing.assert_close(estimates, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shifts", [2, 3, 7])
def test_shifts_average_over_shifted_copies_of_the_song(shifts):
    mixture, hop, copies = torch.randn(2, 1000), 48, []
    for shift in [i * hop // shifts for i in range(shifts)]:
        copy = separate_track(Centred(), mixture[:, shift:], 64, 0.25)
        copies.append(copy[..., 64 - shift : 800 - shift])  # without the ends of the song
    estimates = separate_track(Centred(), mixture, 64, 0.25, shifts=shifts)[..., 64:800]
    torch.testing.assert_close(estimates, torch.stack(copies).mean(0), atol=1e-6, rtol=0)


def test_shifts_lessen_what_depends_on_the_segments():
    mixture, errors = torch.ones(2, 5000), []
    for shifts in (1, 2, 4, 8):
        estimates = separate_track(Centred(), mixture, 64, 0.25, shifts=shifts)
        errors.append(estimates[..., 100:-100].std().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 4


def test_shifts_of_an_odd_hop_never_meet():
    for shifts in range(1, 8):
        starts = segment_starts(101, 10, 3, shifts)
        assert len(starts) == len(set(starts)) == -(-91 * shifts // 7) + 1
        assert (starts[0], starts[-1], starts) == (0, 91, sorted(starts))


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


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"batch_size": 1.5}, {"shifts": -1}, {"shifts": 49}]
)
def test_batches_and_shifts_that_make_no_sense_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        separate_track(Identity(), torch.zeros(2, 100), 64, 0.25, **wrong)


@pytest.mark.parametrize("segment", [0, -5, 500.0])
def test_a_segment_that_is_no_number_of_samples_is_refused(segment):
    with pytest.raises(ValueError, match="must be a number of samples"):
        separate_track(Identity(), torch.zeros(2, 10), segment)
