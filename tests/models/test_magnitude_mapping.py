"""Magnitudes of each stem with the mixture's phase, as the published TFSWA-ResUNet makes them."""

import pytest
import torch
from torch import nn

from tfswa_lab.models.separator import Separator, build_separator
from tfswa_lab.models.storage import load_separator, save_separator
from tfswa_lab.models.tfswa_resunet import TFSWAResUNet
from tfswa_lab.stft import STFTProcessor

STEMS = ("vocals", "drums", "bass", "other")


def sdr_db(estimate, reference):
    return (20 * torch.log10(reference.norm() / (reference - estimate).norm())).item()


class Oracle(nn.Module):
    """A network that knows the stems' magnitudes, on the scale of its input."""

    separator_heads = ("magnitude mapping",)

    def __init__(self, answer, inputs, outputs):
        super().__init__()
        self.answer = answer
        self.sizes = {"in_channels": inputs, "out_channels": outputs}

    def forward(self, x):
        return self.answer(x)


def separator_with(answer, stems, stft, **options):
    return Separator(
        Oracle(answer, 2, 2 * stems), stft, STEMS[:stems], "magnitude mapping", **options
    )


def test_the_mixtures_own_magnitudes_return_the_mixture():
    mixture = 0.1 * torch.randn(2, 2, 10_001)
    separator = separator_with(lambda x: x, 1, STFTProcessor())
    torch.testing.assert_close(separator(mixture)[:, 0], mixture, atol=1e-6, rtol=0)


def test_the_true_magnitudes_give_what_magnitudes_with_the_mixtures_phase_can_give():
    """The limit of the method, computed without the separator: `torch.polar`, then the inverse."""
    torch.manual_seed(0)
    stems = torch.randn(1, 4, 2, 20_000) * torch.tensor([0.4, 0.3, 0.2, 0.1])[:, None, None]
    mixture, stft = stems.sum(1), STFTProcessor()
    truth, mixed = stft(stems), stft(mixture)
    limit = stft.istft(torch.polar(truth.abs(), mixed.angle()[:, None].expand_as(truth)), 20_000)
    scale = mixed.abs().square().mean().sqrt()
    magnitudes = truth.abs().flatten(1, 2).mT / scale  # (b, n·c, t, f)
    estimates = separator_with(lambda x: magnitudes, 4, stft)(mixture)
    for n in range(4):
        assert sdr_db(estimates[0, n], stems[0, n]) == pytest.approx(
            sdr_db(limit[0, n], stems[0, n]), abs=0.01
        )


def test_a_stem_that_is_alone_comes_back_whole():
    """The phase is the stem's own, so the true magnitudes leave no error."""
    voice, stft = 0.1 * torch.randn(1, 2, 9000), STFTProcessor()
    separator = separator_with(lambda x: torch.cat([x, 0 * x], dim=1), 2, stft)
    vocals, drums = separator(voice).unbind(1)
    assert sdr_db(vocals, voice) > 80
    assert (drums == 0).all()


def test_silent_cells_stay_silent_whatever_the_network_says():
    separator = separator_with(torch.ones_like, 1, STFTProcessor(128, 32))
    mixture = torch.randn(1, 2, 4000)
    mixture[..., 2000:] = 0
    assert (separator(mixture)[..., 2200:] == 0).all()


def test_bins_above_the_limit_are_silent():
    separator = separator_with(lambda x: x, 1, STFTProcessor(512, 128), bins=100)
    spectrograms = separator.spectrograms(separator.stft(torch.randn(1, 2, 4000)))
    assert (spectrograms[..., :100, :] != 0).all()
    assert (spectrograms[..., 100:, :] == 0).all()


def small(stems=("vocals",), audio_channels=2, **options):
    torch.manual_seed(0)
    return build_separator(
        stems,
        "magnitude mapping",
        n_fft=256,
        hop_length=64,
        audio_channels=audio_channels,
        architecture=TFSWAResUNet,
        num_tfswa=1,
        **options,
    )


def test_the_published_network_fits_and_keeps_its_44_3_million_parameters():
    with torch.device("meta"):
        separator = build_separator(
            ("vocals",), "magnitude mapping", hop_length=441, architecture=TFSWAResUNet
        )
    assert sum(p.numel() for p in separator.parameters()) == 44_429_600


def test_a_louder_mixture_gives_equally_louder_stems():
    separator = small().eval()
    mixture = 0.1 * torch.randn(1, 2, 4000)
    estimates = separator(mixture)
    assert estimates.abs().max() > 1e-4
    torch.testing.assert_close(separator(4 * mixture), 4 * estimates, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("stems", "channels"), [(STEMS, 2), (("vocals", "other"), 1)])
def test_every_parameter_of_the_published_network_learns(stems, channels):
    separator = small(stems, channels)
    estimates = separator(torch.randn(2, channels, 2000))
    assert estimates.shape == (2, len(stems), channels, 2000)
    (estimates - torch.randn_like(estimates)).abs().mean().backward()
    assert all(p.grad.isfinite().all() for p in separator.parameters())
    assert sum(bool(p.grad.abs().max() > 0) for p in separator.parameters()) > 100


def test_a_saved_network_gives_the_same_samples(tmp_path):
    separator = small(("vocals", "other"), bins=100, sample_rate=16_000)
    separator(torch.randn(2, 2, 2000))  # moves the batch statistics, which must be saved too
    again = load_separator(save_separator(separator, tmp_path))
    mixture = torch.randn(1, 2, 3000)
    assert torch.equal(again(mixture), separator.eval()(mixture))
    assert again.model.sizes == separator.model.sizes
    assert (again.mask, again.bins, again.sample_rate) == ("magnitude mapping", 100, 16_000)
    assert type(again.normalizer) is type(separator.normalizer)


def test_mixed_precision_ends_before_the_way_back(check_mixed_precision):
    check_mixed_precision(small().eval())


def test_it_makes_no_masks():
    separator = small()
    with pytest.raises(ValueError, match="ask for spectrograms"):
        separator.masks(separator.stft(torch.randn(1, 2, 500)))


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        ("magnitude", {}, "outputs of TFSWAResUNet; choose 'magnitude mapping'"),
        ("complex", {}, "outputs of TFSWAResUNet; choose 'magnitude mapping'"),
        ("mapping", {}, "outputs of TFSWAResUNet; choose 'magnitude mapping'"),
        ("magnitude mapping", {"in_channels": 4}, r"in_channels=2 \(magnitudes\), the model has 4"),
    ],
)
def test_other_heads_and_inputs_are_refused(mask, options, message):
    with pytest.raises(ValueError, match=message):
        build_separator(("vocals",), mask, architecture=TFSWAResUNet, num_tfswa=0, **options)
