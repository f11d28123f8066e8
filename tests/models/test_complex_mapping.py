"""Separators without masks: the network's outputs are the stems, on the mixture's scale."""

import pytest
import torch
from torch import nn

from tfswa_lab.models.mask_resunet import MaskResUNet
from tfswa_lab.models.separator import Separator, build_separator, output_channels
from tfswa_lab.models.storage import load_separator, save_separator
from tfswa_lab.models.tf_locoformer import SIZES, TFLocoformer
from tfswa_lab.models.tfswa_unet import TFSWAUNet
from tfswa_lab.stft import SpectrogramNormalizer, STFTProcessor

STEMS = ("vocals", "drums", "bass", "other")


class Gains(nn.Module):
    """Each stem is the mixture times a number."""

    separator_heads = ("mapping",)

    def __init__(self, gains, audio_channels=2):
        super().__init__()
        self.gains = torch.tensor(gains)
        inputs = 2 * audio_channels
        self.sizes = {"in_channels": inputs, "out_channels": inputs * len(gains)}

    def forward(self, x):
        return (self.gains.view(-1, 1, 1, 1) * x[:, None]).flatten(1, 2)


def tiny(stems=STEMS, **options):
    torch.manual_seed(0)
    return build_separator(
        stems,
        "mapping",
        n_fft=128,
        hop_length=32,
        architecture=TFLocoformer,
        **options,
        **SIZES["tiny"],
    )


@pytest.mark.parametrize("audio_channels", [1, 2])
def test_stems_come_back_in_order_and_on_the_mixtures_scale(audio_channels):
    torch.manual_seed(0)
    network = Gains([1.0, -0.5, 0.0], audio_channels)
    separator = Separator(
        network, STFTProcessor(), STEMS[:3], "mapping", audio_channels=audio_channels
    )
    mixture = 0.1 * torch.randn(2, audio_channels, 30_000)
    mixture -= mixture.mean(-1, keepdim=True)
    same, turned, silent = separator(mixture).unbind(1)
    assert (same - mixture).norm() < 0.01 * mixture.norm()  # but for the mean of its level
    torch.testing.assert_close(turned, -0.5 * same)
    assert (silent == 0).all()


def test_a_steady_tone_survives_which_per_bin_normalisation_takes_for_the_mean():
    """Its bin turns by whole circles from frame to frame, so all of it is the bin's mean."""
    tone = torch.sin(2 * torch.pi * torch.arange(40_000) * 64 / 2048).expand(1, 2, -1)
    stft = STFTProcessor(2048, 512)

    def kept(normalizer=None):
        separator = Separator(Gains([1.0]), stft, ("vocals",), "mapping", normalizer=normalizer)
        inner = slice(8000, -8000)
        return (separator(tone)[0, 0, :, inner].norm() / tone[0, :, inner].norm()).item()

    assert kept() == pytest.approx(1, abs=0.01)
    assert kept(SpectrogramNormalizer()) < 0.6


def test_a_louder_mixture_gives_equally_louder_stems():
    separator = tiny().eval()
    mixture = torch.randn(1, 2, 4000)
    torch.testing.assert_close(separator(4 * mixture), 4 * separator(mixture), atol=1e-4, rtol=1e-3)


def test_it_has_no_masks():
    separator = tiny()
    with pytest.raises(ValueError, match="ask for spectrograms"):
        separator.masks(separator.stft(torch.randn(1, 2, 500)))


def test_bins_above_the_limit_are_silent():
    separator = Separator(Gains([1.0]), STFTProcessor(512, 128), ("vocals",), "mapping", bins=100)
    spectrograms = separator.spectrograms(separator.stft(torch.randn(1, 2, 4000)))
    assert spectrograms.shape == (1, 1, 2, 257, 32)
    assert (spectrograms[..., :100, :] != 0).all()
    assert (spectrograms[..., 100:, :] == 0).all()


def test_the_locoformer_trains_inside_a_separator_and_is_consistent():
    separator = tiny(mixture_consistency=True)
    assert separator.model.sizes["out_channels"] == output_channels(STEMS, "mapping") == 16
    mixture = torch.randn(2, 2, 2000)
    estimates = separator(mixture)
    torch.testing.assert_close(estimates.sum(1), mixture, atol=1e-5, rtol=0)
    estimates.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in separator.parameters())


def test_a_saved_locoformer_gives_the_same_samples(tmp_path):
    separator = tiny(("vocals", "other"), bins=40, sample_rate=16_000).eval()
    again = load_separator(save_separator(separator, tmp_path))
    mixture = torch.randn(1, 2, 3000)
    assert torch.equal(again(mixture), separator(mixture))
    assert again.model.sizes == separator.model.sizes
    assert (again.mask, again.bins, again.sample_rate) == ("mapping", 40, 16_000)


def test_mixed_precision_ends_before_the_way_back(check_mixed_precision):
    check_mixed_precision(tiny().eval())


def test_other_architectures_are_built_by_their_class():
    separator = build_separator(("vocals",), "complex", 4, architecture=MaskResUNet, sub_bands=8)
    assert isinstance(separator.model, MaskResUNet)
    assert separator.model.sizes["sub_bands"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"architecture": TFLocoformer},
            "'magnitude' does not suit the outputs of TFLocoformer; choose 'mapping'",
        ),
        (
            {"architecture": TFSWAUNet, "mask": "mapping"},
            "outputs of TFSWAUNet; choose 'magnitude' or 'complex'",
        ),
        (
            {"architecture": TFLocoformer, "mask": "mapping", "in_channels": 2},
            r"feeds in_channels=4 \(real and imaginary parts\), the model has 2",
        ),
    ],
)
def test_networks_and_masks_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_separator(("vocals", "other"), **options)
