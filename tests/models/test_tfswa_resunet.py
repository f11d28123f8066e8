"""The published network: its size, its serial order, and what it can see."""

import pytest
import torch

from tfswa_lab.models.tfswa_resunet import SequenceBlock, TFSWAModule, TFSWAResUNet, conv_block


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TFSWAResUNet().eval()


def test_parameters_are_within_half_a_percent_of_the_published_44_3_million(model):
    count = sum(p.numel() for p in model.parameters())
    assert count == 44_429_600
    assert abs(count / 44.3e6 - 1) < 0.005


def test_mlp_ratio_4_would_not_explain_the_published_count():
    count = sum(p.numel() for p in TFSWAResUNet(mlp_ratio=4).parameters())
    assert count / 44.3e6 > 1.2


def test_the_bottleneck_map_of_the_paper_is_10_by_8(model):
    seen = []
    handle = model.bottleneck.register_forward_hook(lambda m, i, o: seen.append(i[0].shape))
    with torch.no_grad():
        assert model(torch.rand(1, 2, 301, 1024)).shape == (1, 2, 301, 1024)
    handle.remove()
    assert seen == [(1, 384, 10, 8)]


def test_any_size_gives_magnitudes_of_that_size(model):
    with torch.no_grad():
        output = model(torch.rand(1, 2, 11, 1025))
    assert output.shape == (1, 2, 11, 1025)
    assert (output >= 0).all()


def test_the_sequence_block_has_no_residual_around_its_attention():
    block = SequenceBlock(8, 2, 2)
    torch.nn.init.zeros_(block.attention.proj.weight)
    torch.nn.init.zeros_(block.attention.proj.bias)
    tokens = torch.randn(1, 5, 8)
    torch.testing.assert_close(block(tokens), block.mlp(torch.zeros_like(tokens)))


def test_serial_tsa_then_fsa_lets_one_cell_see_the_whole_plane():
    torch.manual_seed(0)
    module = TFSWAModule(8, 2, window_size=(2, 2))
    x = torch.randn(1, 8, 6, 7, requires_grad=True)
    module(x)[0, :, 2, 3].sum().backward()
    assert (x.grad[0].abs().amax(0) > 0).all()


def test_a_conv_block_is_four_residual_modules():
    block = conv_block(3, 5)
    assert len(block) == 4
    assert block(torch.randn(1, 3, 4, 4)).shape == (1, 5, 4, 4)


def test_every_parameter_gets_a_finite_gradient():
    torch.manual_seed(0)
    model = TFSWAResUNet(num_tfswa=1)
    model(torch.rand(1, 2, 64, 256)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
