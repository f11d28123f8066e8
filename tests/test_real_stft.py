"""The transform by convolutions is torch's, for any length, and so is its inverse."""

import pytest
import torch

from tfswa_lab.stft import RealSTFT, STFTProcessor

SIZES = [(6, 2), (64, 21), (130, 40), (512, 128), (2048, 512)]


def lengths(n_fft, hop):
    return sorted({1, 2, hop - 1, hop, hop + 1, n_fft // 2, n_fft - 1, n_fft, 3 * n_fft + 7})


@pytest.mark.parametrize(("n_fft", "hop"), SIZES)
def test_it_is_torch_stft_to_1e_5_at_any_length(n_fft, hop):
    stft = STFTProcessor(n_fft, hop)
    real = RealSTFT(stft)
    for length in lengths(n_fft, hop):
        x = torch.randn(2, 2, length, generator=torch.Generator().manual_seed(length))
        right = torch.view_as_real(stft.stft(x)).permute(0, 1, 4, 2, 3)  # (b, c, ri, f, t)
        parts = real.stft(x)
        assert parts.shape == right.shape
        assert (parts - right).abs().max() <= 1e-5 * right.abs().max()


@pytest.mark.parametrize(("n_fft", "hop"), SIZES)
def test_the_inverse_is_torchs_for_what_is_no_transform_of_a_sound(n_fft, hop):
    stft = STFTProcessor(n_fft, hop)
    real = RealSTFT(stft)
    for length in lengths(n_fft, hop):
        generator = torch.Generator().manual_seed(length)
        bins, frames = n_fft // 2 + 1, 1 + length // hop
        parts = torch.randn(2, 2, 2, bins, frames, generator=generator)
        right = stft.istft(torch.complex(parts[:, :, 0], parts[:, :, 1]), length)
        found = real.istft(parts, length)
        assert found.shape == right.shape
        assert (found - right).abs().max() <= 1e-5 * right.abs().max()


def test_thousands_of_equal_numbers_are_added_precisely():
    """All bins of a click are equal; added one by one in float32 they were off by 2e-5."""
    stft = STFTProcessor(4096, 1024)
    real = RealSTFT(stft)
    click = torch.tensor([[[0.9]]])
    assert (real.istft(real.stft(click), 1) - click).abs().max() < 1e-5


def test_a_tone_lies_in_its_bin_with_its_phase():
    real = RealSTFT(STFTProcessor(64, 16))
    tone = torch.cos(2 * torch.pi * 5 / 64 * torch.arange(640.0) + 0.3)
    parts = real.stft(tone[None, None])[0, 0, :, :, 20]  # a frame that is centred on sample 320
    assert parts.norm(dim=0).argmax() == 5
    phase = torch.atan2(parts[1, 5], parts[0, 5])
    start = 2 * torch.pi * 5 / 64 * (320 - 32) + 0.3
    assert torch.cos(phase - start) > 0.9999


def test_only_tables_are_stored():
    real = RealSTFT(STFTProcessor(2048, 512))
    assert sum(x.numel() for x in real.state_dict().values()) < 6 * 2048
