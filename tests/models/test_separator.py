"""Masks on the mixture's spectrogram: identities, both kinds of masks, both kinds of input."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tfswa_lab.models.separator import (
    MASKS,
    Separator,
    build_separator,
    complex_mask,
    magnitude_mask,
    output_channels,
)
from tfswa_lab.stft import STFTProcessor

STEMS = ("vocals", "drums", "bass", "other")
MINI = {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": 1, "window_size": 4}


class Constant(nn.Module):
    """A network that answers with one number per output channel."""

    def __init__(self, values, in_channels=2):
        super().__init__()
        self.values = torch.tensor(values)
        self.sizes = {"in_channels": in_channels, "out_channels": len(values)}

    def forward(self, x):
        return self.values.view(1, -1, 1, 1).expand(x.shape[0], -1, *x.shape[2:])


def test_masks_of_one_return_the_mixture():
    mixture = torch.randn(2, 2, 10_001)
    separator = Separator(Constant([1.0, 1.0]), STFTProcessor(), ("vocals",))
    torch.testing.assert_close(separator(mixture)[:, 0], mixture, atol=1e-5, rtol=0)


def test_each_stem_and_channel_has_its_own_mask():
    mixture = torch.randn(1, 2, 5000)
    separator = Separator(Constant([1.0, 0.5, 0.25, 0.0]), STFTProcessor(), ("vocals", "other"))
    vocals, other = separator(mixture)[0]
    expected = mixture[0] * torch.tensor([[1.0], [0.5]])
    torch.testing.assert_close(vocals, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(other[0], 0.25 * mixture[0, 0], atol=1e-5, rtol=0)
    assert other[1].abs().max() == 0


def test_a_complex_mask_can_turn_the_phase_by_a_quarter():
    """Mask i (outputs 0.5, 1.0) turns a cosine into minus a sine."""
    s = torch.arange(44_100)
    cosine = torch.cos(2 * torch.pi * 1000 * s / 44_100).expand(1, 2, -1)
    separator = Separator(Constant([0.5, 1.0, 0.5, 1.0]), STFTProcessor(), ("vocals",), "complex")
    turned = separator(cosine)[0, 0, 0, 4000:-4000]
    minus_sine = -torch.sin(2 * torch.pi * 1000 * s / 44_100)[4000:-4000]
    torch.testing.assert_close(turned, minus_sine, atol=1e-3, rtol=0)


def test_outputs_and_masks_keep_stem_and_channel_order():
    output = torch.arange(8.0).view(1, 8, 1, 1) / 8
    assert magnitude_mask(output, 4)[0, :, :, 0, 0].tolist() == [
        [0, 1 / 8], [2 / 8, 3 / 8], [4 / 8, 5 / 8], [6 / 8, 7 / 8]
    ]  # fmt: skip
    mask = complex_mask(output, 2)[0, :, :, 0, 0]
    assert mask[1, 0] == complex(2 * 4 / 8 - 1, 2 * 5 / 8 - 1)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("in_channels", [2, 4])
def test_built_separators_derive_their_outputs_and_train(mask, in_channels):
    torch.manual_seed(0)
    separator = build_separator(STEMS, mask, in_channels, n_fft=128, hop_length=32, **MINI)
    assert separator.model.sizes["out_channels"] == output_channels(STEMS, mask)
    estimates = separator(torch.randn(2, 2, 1000))
    assert estimates.shape == (2, 4, 2, 1000)
    estimates.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in separator.parameters())


def test_mixture_consistency_makes_estimates_sum_to_the_mixture():
    mixture = torch.randn(1, 2, 4000)
    separator = build_separator(
        STEMS, n_fft=128, hop_length=32, mixture_consistency=True, **MINI
    ).eval()
    torch.testing.assert_close(separator(mixture).sum(1), mixture, atol=2e-6, rtol=0)


def test_magnitude_masks_never_amplify():
    separator = build_separator(("vocals",), n_fft=128, hop_length=32, **MINI).eval()
    masks = separator.masks(separator.stft(torch.randn(1, 2, 3000)))
    assert ((masks >= 0) & (masks <= 1)).all()


def test_the_mask_can_attenuate_far_below_6_db():
    """A second sigmoid on top of the network's own would stop at 0.5."""
    separator = Separator(Constant([1e-4, 1e-4]), STFTProcessor(), ("vocals",))
    assert separator.masks(separator.stft(torch.randn(1, 2, 3000))).max() < 1e-3


def test_a_louder_mixture_gives_equally_louder_stems():
    torch.manual_seed(0)
    separator = build_separator(("vocals", "other"), n_fft=128, hop_length=32, **MINI).eval()
    mixture = torch.randn(1, 2, 4000)
    torch.testing.assert_close(separator(4 * mixture), 4 * separator(mixture), atol=1e-3, rtol=1e-3)


def test_bins_above_the_limit_are_silent_and_those_below_untouched():
    stft = STFTProcessor(512, 128)
    separator = Separator(Constant([1.0, 1.0]), stft, ("vocals",), bins=100)
    spectrogram = stft(torch.randn(1, 2, 4000))
    masks = separator.masks(spectrogram)
    assert masks.shape == (1, 1, *spectrogram.shape[1:])
    assert (masks[..., :100, :] == 1).all()
    assert (masks[..., 100:, :] == 0).all()


@pytest.mark.parametrize(("mask", "outputs"), [("magnitude", [1.0]), ("complex", [1.0, 0.5])])
@pytest.mark.parametrize("in_channels", [1, 2])
def test_mono_mixtures_have_one_mask_per_stem(mask, outputs, in_channels):
    mixture = torch.randn(2, 1, 3000)
    network = Constant(outputs, in_channels)
    separator = Separator(network, STFTProcessor(), ("vocals",), mask, audio_channels=1)
    torch.testing.assert_close(separator(mixture)[:, 0], mixture, atol=1e-5, rtol=0)


def test_mixed_precision_ends_before_the_masks_meet_the_spectrogram(check_mixed_precision):
    torch.manual_seed(0)
    separator = build_separator(("vocals", "other"), "complex", 4, 128, 32, **MINI)
    check_mixed_precision(separator.eval())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Constant([1.0] * 4), STFTProcessor(), ("vocals",)), "need out_channels=2"),
        ((Constant([1.0] * 2), STFTProcessor(), ("vocals",), "phase"), "mask='phase' is unknown"),
        ((Constant([1.0] * 2), STFTProcessor(), ("vocals",), "magnitude", True), "single stem"),
        ((Constant([1.0] * 2, 3), STFTProcessor(), ("vocals",)), "the model has 3"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Separator(*arguments)


@pytest.mark.parametrize("bins", [0, 66])
def test_bins_that_do_not_exist_are_refused(bins):
    with pytest.raises(ValueError, match="n_fft=128 has 1 to 65"):
        build_separator(("vocals",), n_fft=128, hop_length=32, bins=bins, **MINI)


@pytest.mark.parametrize("stems", ["vocals", (), ("bass", "bass"), ("../evil",), ("a/b",), ("",)])
def test_names_that_could_not_be_files_are_refused(stems):
    with pytest.raises(ValueError, match="stem"):
        build_separator(stems, n_fft=128, hop_length=32, **MINI)


def test_a_network_that_does_not_tell_its_channels_is_refused():
    with pytest.raises(ValueError, match="Identity has no `sizes` attribute"):
        Separator(nn.Identity(), STFTProcessor(), ("vocals",))


def test_the_network_never_waits_for_a_value():
    """A branch on the data would stall a GPU, and could not be traced without data."""
    separator = build_separator(("vocals", "other"), n_fft=128, hop_length=32, **MINI)
    with FakeTensorMode(allow_non_fake_inputs=True):
        masks = separator.masks(separator.stft(torch.randn(1, 2, 500)))
    assert masks.shape == (1, 2, 2, 65, 16)


def test_a_mono_mixture_is_refused_with_its_shape():
    separator = build_separator(("vocals",), n_fft=128, hop_length=32, **MINI)
    with pytest.raises(ValueError, match=r"\(1, 1, 500\)"):
        separator(torch.randn(1, 1, 500))
