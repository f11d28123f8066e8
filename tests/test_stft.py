"""Identities and peers of the transform, and what the normalisers promise."""

import numpy as np
import pytest
import scipy.signal
import torch

from tfswa_lab.models.separator import build_separator
from tfswa_lab.stft import (
    LevelNormalizer,
    RunningSpectrogramNormalizer,
    SpectrogramNormalizer,
    STFTProcessor,
)


def test_the_documented_shape():
    assert STFTProcessor()(torch.randn(2, 2, 44_100)).shape == (2, 2, 1025, 87)


@pytest.mark.parametrize("leading", [(), (3,), (2, 2), (2, 4, 2)])
def test_any_leading_dimensions_give_what_each_signal_gives_alone(leading):
    stft = STFTProcessor(256, 64)
    x = torch.randn(*leading, 1000)
    together = stft(x)
    alone = torch.stack([stft(row) for row in x.reshape(-1, 1000)])
    torch.testing.assert_close(together, alone.reshape(together.shape))
    torch.testing.assert_close(stft.istft(together, 1000), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("n_fft", "hop"), [(2048, 512), (2048, 441), (2048, 682), (64, 21)])
def test_the_round_trip_is_good_to_1e_6_for_any_length(n_fft, hop):
    torch.manual_seed(0)
    stft = STFTProcessor(n_fft, hop)
    lengths = [*range(1, 40), *range(40, 3 * n_fft, n_fft // 7), 44_031, 44_032, 44_033, 100_001]
    errors = [stft.reconstruction_error(torch.randn(length)) for length in lengths]
    assert max(errors) <= 1e-6
    assert max(errors) > 0


def test_frames_equal_a_loop_of_windowed_ffts():
    n_fft, hop = 64, 16
    x = np.random.default_rng(0).standard_normal(500)
    padded = np.pad(x, n_fft // 2)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    frames = [np.fft.rfft(padded[i : i + n_fft] * window) for i in range(0, len(x) + 1, hop)]
    ours = STFTProcessor(n_fft, hop)(torch.from_numpy(x))
    np.testing.assert_allclose(ours.numpy(), np.stack(frames, axis=1), atol=1e-12)


def test_frames_equal_scipys():
    x = np.random.default_rng(0).standard_normal(4096)
    window = scipy.signal.get_window("hann", 512)
    _, _, peer = scipy.signal.stft(x, window=window, nperseg=512, noverlap=384, boundary="zeros")
    ours = STFTProcessor(512, 128)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ours, peer * window.sum(), atol=1e-10)


def test_a_tone_lands_in_its_bin():
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(44_100) / 44_100)
    spectrogram = STFTProcessor()(tone).abs()
    assert (spectrogram[:, 10:-10].argmax(0) == round(1000 * 2048 / 44_100)).all()


def test_model_layout_and_back():
    spectrogram = torch.randn(2, 2, 33, 7, dtype=torch.complex64)
    stft = STFTProcessor(64, 16)
    x = stft.to_model_input(spectrogram)
    assert x.shape == (2, 4, 7, 33)
    assert torch.equal(x[1, 2, 5, 9], spectrogram[1, 1, 9, 5].real)
    assert torch.equal(x[1, 3, 5, 9], spectrogram[1, 1, 9, 5].imag)
    assert torch.equal(stft.from_model_output(x), spectrogram)


def test_what_cannot_be_inverted_is_refused():
    with pytest.raises(ValueError, match="hop_length=1024 must lie"):
        STFTProcessor(2048, 1024)
    with pytest.raises(ValueError, match="at least one sample"):
        STFTProcessor()(torch.zeros(2, 0))
    spectrogram = STFTProcessor(256, 64)(torch.zeros(1000))
    for stft, length in ((STFTProcessor(256, 32), 1000), (STFTProcessor(256, 64), 1100)):
        with pytest.raises(ValueError, match="check its hop, its axes, and the length"):
            stft.istft(spectrogram, length)


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (torch.ones(1000, dtype=torch.int16), r"int16 .* divide by full scale, 32768 for int16"),
        (torch.ones(1000, dtype=torch.bool), "bool holds no samples"),
        (torch.ones(1000, dtype=torch.complex64), r"complex64 is a spectrogram's type"),
    ],
)
def test_what_is_no_waveform_is_refused_there_and_in_a_separator(waveform, message):
    with pytest.raises(ValueError, match=message):
        STFTProcessor(256, 64)(waveform)
    sizes = {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": 1, "window_size": 4}
    separator = build_separator(("vocals", "other"), n_fft=256, hop_length=64, **sizes)
    with pytest.raises(ValueError, match=message):
        separator(waveform.expand(1, 2, -1))


def test_magnitudes_have_no_inverse():
    stft = STFTProcessor(256, 64)
    with pytest.raises(ValueError, match="float32 has no phase; pass the complex spectrogram"):
        stft.istft(stft(torch.randn(1000)).abs(), 1000)


def test_odd_windows_and_silence_have_no_answer():
    with pytest.raises(ValueError, match="must be even"):
        STFTProcessor(255, 64)
    with pytest.raises(ValueError, match="silent"):
        STFTProcessor().reconstruction_error(torch.zeros(1000))


def test_running_statistics_cannot_be_poisoned():
    normalizer = RunningSpectrogramNormalizer(2, 5)
    before = normalizer.running_mean.clone()
    for bad in (torch.zeros(1, 2, 4, 1), torch.full((1, 2, 4, 5), torch.nan)):
        with pytest.raises(ValueError, match=r"expected|NaN"):
            normalizer(bad)
    assert torch.equal(normalizer.running_mean, before)


@pytest.mark.parametrize("sizes", [(0, 5), (2, 0), (-1, 5), (2, 5, -0.1), (2, 5, 1.1)])
def test_running_statistics_of_nothing_are_refused(sizes):
    with pytest.raises(ValueError, match="at least 1 channel and 1 bin"):
        RunningSpectrogramNormalizer(*sizes)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_running_statistics_of_equal_shares_are_those_of_the_whole_batch(parts):
    """Each share takes its own mean; what `over_processes` averages is played in turn."""
    x = 3 * torch.randn(4, 2, 6, 5) + torch.arange(5)
    shares = x.chunk(parts)
    mean = torch.stack([share.mean((0, 2), keepdim=True) for share in shares]).mean(0)
    spread = [(share - mean).square().mean((0, 2), keepdim=True) for share in shares]
    for share in shares:
        normalizer = RunningSpectrogramNormalizer(2, 5)
        averages = iter([mean, torch.stack(spread).mean(0)])
        normalizer.over_processes = lambda _, averages=averages: next(averages)
        found = normalizer.statistics(share)
        torch.testing.assert_close(found.mean, x.mean((0, 2), keepdim=True))
        torch.testing.assert_close(found.std, x.std((0, 2), keepdim=True, correction=0))


def test_each_bin_gets_zero_mean_and_unit_variance():
    x = 10 * torch.rand(2, 2, 200, 9) + torch.arange(9)
    y, statistics = SpectrogramNormalizer()(x)
    torch.testing.assert_close(y.mean(2), torch.zeros(2, 2, 9), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(2, correction=0), torch.ones(2, 2, 9), atol=1e-4, rtol=0)
    torch.testing.assert_close(SpectrogramNormalizer().denormalize(y, statistics), x)


def test_silence_and_a_single_frame_stay_finite():
    y, _ = SpectrogramNormalizer()(torch.zeros(1, 2, 1, 5))
    assert (y == 0).all()


def test_running_statistics_follow_torch_batch_norm():
    """Peer: BatchNorm1d over the flattened (channel, bin) pairs, without Bessel's correction."""
    torch.manual_seed(0)
    ours, peer = RunningSpectrogramNormalizer(2, 5, eps=0), torch.nn.BatchNorm1d(10, affine=False)
    for _ in range(3):
        x = 3 * torch.randn(4, 2, 6, 5) + 1
        flat = x.permute(0, 2, 1, 3).reshape(24, 10)
        y, statistics = ours(x)
        torch.testing.assert_close(
            y.permute(0, 2, 1, 3).reshape(24, 10), peer(flat), atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(ours.denormalize(y, statistics), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.running_mean.flatten(), peer.running_mean)
    twin = RunningSpectrogramNormalizer(2, 5, eps=0)
    twin.load_state_dict(ours.state_dict())
    assert torch.equal(twin.eval()(x)[0], ours.eval()(x)[0])


def test_evaluation_uses_the_running_statistics_and_leaves_them_alone():
    normalizer = RunningSpectrogramNormalizer(1, 3)
    normalizer(torch.randn(2, 1, 50, 3) * 5)
    normalizer.eval()
    before = normalizer.running_mean.clone()
    one, _ = normalizer(torch.ones(1, 1, 4, 3))
    two, _ = normalizer(torch.ones(3, 1, 9, 3))
    torch.testing.assert_close(one[0, 0, 0], two[0, 0, 0])
    assert torch.equal(normalizer.running_mean, before)


def test_the_level_normalizer_takes_the_level_and_leaves_the_proportions():
    x = torch.randn(2, 3, 20, 7) * torch.logspace(-3, 0, 7)
    y, statistics = LevelNormalizer()(x)
    torch.testing.assert_close(y.std((1, 2, 3), correction=0), torch.ones(2), atol=1e-3, rtol=0)
    torch.testing.assert_close(LevelNormalizer()(100 * x)[0], y, atol=1e-2, rtol=1e-2)
    levels, expected = (y[0] - y[0].mean()).std((0, 1)), x[0].std((0, 1))
    torch.testing.assert_close(levels / levels[-1], expected / expected[-1])
    torch.testing.assert_close(LevelNormalizer().denormalize(y, statistics), x)
