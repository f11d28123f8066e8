"""Overlap-add must be invisible: an identity separator returns its input."""

import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

from tfswa_lab import audio
from tfswa_lab.inference.separate import (
    Segmentation,
    fade_window,
    segment_starts,
    separate,
    separate_track,
)
from tfswa_lab.models.separator import build_separator
from tfswa_lab.models.tfswa_unet import SIZES


class Identity(nn.Module):
    """One stem, the mixture itself; remembers what it was shown."""

    sample_rate = 1  # of all separators here: a second is a sample

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
    estimates = separate_track(model, mixture, Segmentation(64, overlap, shifts, batch_size))
    assert estimates.shape == (1, 2, length)
    torch.testing.assert_close(estimates[0], mixture, atol=1e-6, rtol=0)
    assert set(model.lengths) == {min(64, length)}


class ZeroMean(nn.Module):
    """Subtracts the segment's mean: silence appended to a segment would change its output."""

    sample_rate = 1

    def forward(self, mixture):
        return (mixture - mixture.mean(-1, keepdim=True))[:, None]


@pytest.mark.parametrize("shifts", [1, 3])
@pytest.mark.parametrize("length", [30, 64, 65, 1000])
def test_no_silence_is_shown_to_the_model(length, shifts):
    estimates = separate_track(
        ZeroMean(), torch.full((2, length), 0.5), Segmentation(64, shifts=shifts)
    )
    assert estimates.abs().max() < 1e-6


def test_the_work_grows_with_the_overlap_as_it_should():
    model = Identity()
    separate_track(model, torch.zeros(2, 64 * 100), Segmentation(64, overlap=0.25))
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

    sample_rate = 1

    def forward(self, mixture):
        return (mixture * torch.hann_window(mixture.shape[-1]))[:, None]


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_overlapping_estimates_are_averaged_with_the_windows_as_weights(overlap):
    mixture, fade = torch.randn(2, 1000), int(64 * overlap)
    starts = [*range(0, 936, 64 - fade), 936]
    expected = by_hand(Centred(), mixture, starts, 64, fade)
    estimates = separate_track(Centred(), mixture, Segmentation(64, overlap, batch_size=3))
    torch.testing.assert_close(estimates, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shifts", [2, 3, 7])
def test_shifts_average_over_shifted_copies_of_the_song(shifts):
    mixture, hop, copies = torch.randn(2, 1000), 48, []
    for shift in [i * hop // shifts for i in range(shifts)]:
        copy = separate_track(Centred(), mixture[:, shift:], Segmentation(64, 0.25))
        copies.append(copy[..., 64 - shift : 800 - shift])  # without the ends of the song
    estimates = separate_track(Centred(), mixture, Segmentation(64, 0.25, shifts))[..., 64:800]
    torch.testing.assert_close(estimates, torch.stack(copies).mean(0), atol=1e-6, rtol=0)


def test_shifts_lessen_what_depends_on_the_segments():
    mixture, errors = torch.ones(2, 5000), []
    for shifts in (1, 2, 4, 8):
        estimates = separate_track(Centred(), mixture, Segmentation(64, 0.25, shifts))
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
    "mixture", [torch.zeros(2, 0), torch.zeros(10)], ids=["no samples", "no channels"]
)
def test_a_mixture_that_is_none_is_refused(mixture):
    with pytest.raises(ValueError, match="channels, samples"):
        separate_track(Identity(), mixture)
    with pytest.raises(ValueError, match="channels, samples"):
        separate(mixture[None, None], model=Identity())


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.zeros(2, 100, dtype=torch.int16), "of floats"),
        (torch.full((2, 100), torch.nan), "NaN"),
        (torch.full((2, 100), torch.inf), "infinite"),
        (torch.full((2, 100), 1e39, dtype=torch.float64), "beyond float32"),
        (torch.zeros(100, 2), r"\(samples, channels\).*waveform\.T"),
    ],
)
def test_samples_without_a_level_are_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        separate_track(Halves(), samples)
    with pytest.raises(ValueError, match=message):
        separate(samples, model=Halves())


NAN, INF = float("nan"), float("inf")
WRONG = {
    "segment_seconds": [0, -1, -5, NAN, INF, 1e-6, 1e-4, 1e7, 1e300, True, "6"],
    "overlap": [0.6, 0.9, -0.1, NAN, False, "0.1", None],
    "shifts": [-1, 1.5, NAN, True, "1"],
    "batch_size": [0, 1.5, INF, True, "1"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_numbers_that_make_no_sense_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}={value!r}')} must be"):
        Segmentation(**{name: value})


def test_numbers_of_numpy_are_numbers():
    numbers = Segmentation(np.float32(0.5), np.float64(0.25), np.int64(2), np.int32(3))
    assert numbers == Segmentation(0.5, 0.25, 2, 3)
    assert json.loads(json.dumps(asdict(numbers))) == asdict(numbers)


def test_a_segmentation_that_does_not_fit_the_sample_rate_is_refused():
    with pytest.raises(ValueError, match="shifts=49 must be from 0 to 48"):
        separate_track(Identity(), torch.zeros(2, 100), Segmentation(64, 0.25, shifts=49))
    with pytest.raises(ValueError, match=r"segment_seconds=0\.4 is less than a sample at 1 Hz"):
        separate_track(Identity(), torch.zeros(2, 100), Segmentation(0.4))


class Halves(nn.Module):
    """Two stems, of mono at 8 kHz."""

    sample_rate, audio_channels, stems = 8000, 1, ("one", "other")

    def forward(self, mixture):
        assert mixture.shape[1] == 1
        return torch.stack([mixture, 0.5 * mixture], 1)


@pytest.mark.parametrize("rate", [None, 16_000, 44_100])
def test_stems_have_the_rate_and_the_length_of_the_song(rate):
    song = torch.rand(2, 10_001) - 0.5
    stems = separate(song, rate, Halves(), Segmentation(0.2))
    assert list(stems) == ["one", "other"]
    heard = song.mean(0, keepdim=True)
    if rate is not None:
        heard = audio.resample(audio.resample(heard, rate, 8000), 8000, rate)[..., :10_001]
    torch.testing.assert_close(stems["one"], heard, atol=1e-6, rtol=0)
    torch.testing.assert_close(stems["other"], 0.5 * heard, atol=1e-6, rtol=0)


def test_a_file_is_separated_as_its_waveform(tmp_path):
    song = audio.write(tmp_path / "song.wav", torch.rand(2, 20_000) - 0.5, 16_000)
    expected = separate(audio.read(song)[0], 16_000, Halves())
    for path in (song, str(song)):
        stems = separate(path, model=Halves())
        assert all(torch.equal(stems[name], expected[name]) for name in expected)


@pytest.mark.parametrize("rate", [0, -8000, 8000.5, "44100", True, float("nan")])
def test_a_rate_that_makes_no_sense_is_refused(rate):
    with pytest.raises(ValueError, match="whole numbers of Hz"):
        separate(torch.rand(2, 9000), rate, Halves())


def test_a_file_states_its_own_rate(tmp_path):
    song = audio.write(tmp_path / "song.wav", torch.rand(2, 2000) - 0.5, 16_000)
    with pytest.raises(ValueError, match=r"song\.wav states its sample rate"):
        separate(song, 44_100, Halves())


@pytest.mark.parametrize(
    ("of_weights", "of_input"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2],
)
def test_a_network_gets_its_own_precision_but_never_less_than_float32(of_weights, of_input):
    model = Identity()
    model.weight = nn.Parameter(torch.zeros(1, dtype=of_weights))
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    for given in (torch.float32, torch.float64):
        seen = []
        assert separate_track(model, torch.zeros(2, 50, dtype=given)).dtype == given
        assert set(seen) == {of_input}


@pytest.mark.parametrize("song", [[[0.0] * 99] * 2, None, 5])
def test_a_song_of_another_type_is_refused_in_short(song):
    for call in (separate_track, lambda model, given: separate(given, 8000, model)):
        with pytest.raises(ValueError, match="expected a waveform as a tensor, got a") as raised:
            call(Halves(), song)
        assert len(str(raised.value)) < 150


def test_the_old_order_of_arguments_is_explained():
    with pytest.raises(ValueError, match="the song comes first"):
        separate(Halves(), torch.zeros(2, 99))


def test_numpy_and_a_single_channel_are_waveforms():
    song = torch.rand(2, 9000) - 0.5
    expected = separate(song, 8000, Halves())
    assert torch.equal(separate(song.numpy(), 8000, Halves())["one"], expected["one"])
    line = separate(song[0], 8000, Halves())
    assert torch.equal(line["one"], separate(song[:1], 8000, Halves())["one"])


def test_half_precision_loses_no_more_than_its_rounding():
    quiet = torch.full((2, 20_000), 1e-3)
    stem = separate(quiet.half(), 8000, Halves())["one"]
    assert stem.dtype == torch.float16
    assert (stem.float() - 1e-3).abs().max() < 1e-6
    stem = separate_track(Identity(), quiet.half(), Segmentation(64))[0]
    assert (stem.float() - 1e-3).abs().max() < 1e-6


@pytest.mark.parametrize("way", ["reversed", "big-endian", "long double", "read-only", "fortran"])
def test_arrays_of_every_kind_are_read_as_they_are(way):
    song = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 9000)).astype(np.float32)
    expected = separate(song, 8000, Halves())["one"].float()
    if way == "reversed":
        given = song[::-1, :][::-1, :]
    elif way == "read-only":
        given = song.copy()
        given.setflags(write=False)
    elif way == "fortran":
        given = np.asfortranarray(song)
    else:
        given = song.astype(">f4" if way == "big-endian" else np.longdouble)
    torch.testing.assert_close(separate(given, 8000, Halves())["one"].float(), expected)


def test_one_call_separates_with_the_model_that_ships():
    stems = separate(0.1 * torch.randn(2, 20_000), 48_000)
    assert list(stems) == ["vocals", "drums", "bass", "other"]
    assert all(stem.shape == (2, 20_000) for stem in stems.values())


@pytest.mark.parametrize("segmentation", [44_100, 6.0, None, {"shifts": 2}])
def test_a_segmentation_of_another_type_is_refused(segmentation):
    with pytest.raises(ValueError, match="pass a Segmentation"):
        separate_track(Halves(), torch.zeros(2, 99), segmentation)
    with pytest.raises(ValueError, match="pass a Segmentation"):
        separate(torch.zeros(2, 99), 8000, Halves(), segmentation)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(2), nn.Dropout(0.5)])
def test_layers_in_training_mode_are_refused_and_left_as_they_were(layer):
    model = Identity()
    model.layer = layer.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{type(layer).__name__} in training mode"):
        separate_track(model, torch.zeros(2, 99))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert separate_track(model.eval(), torch.zeros(2, 99)).shape == (1, 2, 99)


def test_a_waveform_of_other_floats_is_separated_in_the_networks_precision():
    separator = build_separator(
        ("vocals", "other"), n_fft=512, hop_length=128, **SIZES["tiny"]
    ).eval()
    song = torch.rand(2, 20_000, dtype=torch.float64) - 0.5
    expected = separate_track(separator, song.float())
    estimates = separate_track(separator, song)
    torch.testing.assert_close(estimates, expected.double(), atol=1e-6, rtol=0)
