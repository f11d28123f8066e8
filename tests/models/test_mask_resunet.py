"""The small mask network: sizes counted by hand, any shape, masks, the whole plane in view."""

import pytest
import torch

from tfswa_lab.models.mask_resunet import MaskResUNet
from tfswa_lab.models.separator import Separator
from tfswa_lab.models.storage import load_separator, save_separator
from tfswa_lab.stft import STFTProcessor


def conv_module(i, o):
    """Two batch norms, two 3×3 convolutions and a 1×1 shortcut, counted by hand."""
    return 2 * i + (9 * i * o + o) + 2 * o + (9 * o * o + o) + (i * o + o)


def test_parameters_are_those_of_the_parts():
    network = MaskResUNet(2, 4, channels=(8, 12), bottleneck=16, num_tfswa=0, sub_bands=2)
    stem = 9 * (2 * 2) * 8 + 8
    encoder = conv_module(8, 8) + conv_module(8, 12)
    bottom = conv_module(12, 16) + conv_module(16, 16)
    decoder = conv_module(16 + 12, 12) + conv_module(12 + 8, 8)
    head = 2 * 8 + (8 * (4 * 2) + 4 * 2)
    expected = stem + encoder + bottom + decoder + head
    assert sum(p.numel() for p in network.parameters()) == expected


@pytest.mark.parametrize(("t", "f"), [(1, 1), (9, 129), (16, 64), (40, 513)])
def test_any_size_gives_masks_of_that_size_and_trains(t, f):
    torch.manual_seed(0)
    network = MaskResUNet(2, 4)
    masks = network(torch.randn(1, 2, t, f))
    assert masks.shape == (1, 4, t, f)
    assert ((masks > 0) & (masks < 1)).all()
    masks.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_through_the_bottleneck_a_cell_sees_the_whole_plane():
    torch.manual_seed(0)
    network = MaskResUNet(1, 1).eval()
    x = torch.randn(1, 1, 64, 256, requires_grad=True)
    network(x)[0, 0, 20, 30].backward()
    assert (x.grad[0, 0].abs() > 0).all()


def test_without_attention_it_sees_its_neighbourhood_only():
    torch.manual_seed(0)
    network = MaskResUNet(1, 1, channels=(8,), bottleneck=8, num_tfswa=0).eval()
    x = torch.randn(1, 1, 64, 256, requires_grad=True)
    network(x)[0, 0, 20, 30].backward()
    seen = x.grad[0, 0].abs() > 0
    assert seen[10:30].any()
    assert not seen[40:].any()


def test_the_separator_takes_it_and_storage_keeps_it(tmp_path):
    torch.manual_seed(0)
    network = MaskResUNet(2, 2, channels=(8, 8), bottleneck=8)
    separator = Separator(
        network, STFTProcessor(512, 128), ("vocals",), "complex", False, 16_000, 1, bins=128
    ).eval()
    mixture = torch.randn(1, 1, 5000)
    again = load_separator(save_separator(separator, tmp_path))
    assert (again.audio_channels, again.bins, again.sample_rate) == (1, 128, 16_000)
    torch.testing.assert_close(again(mixture), separator(mixture), atol=0, rtol=0)


@pytest.mark.parametrize("wrong", [{"channels": (0,)}, {"num_heads": 3}, {"sub_bands": 0}])
def test_sizes_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=r"heads|at least 1"):
        MaskResUNet(2, 2, **wrong)
