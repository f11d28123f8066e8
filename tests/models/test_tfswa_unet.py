"""Published counts, gradients, shapes, and checkpointing that changes nothing but memory."""

import copy

import pytest
import torch

from tfswa_lab.models.attention import AttentionUnit
from tfswa_lab.models.checkpointing import checkpointed
from tfswa_lab.models.tfswa_block import DownsampleBlock, TFSWABlock, UpsampleBlock
from tfswa_lab.models.tfswa_unet import SIZES, TFSWAUNet

MINI = {"dims": (8, 8, 16, 16), "depths": (2, 1, 2, 1), "num_heads": 2, "window_size": 4}


def test_the_default_network_has_the_published_counts():
    model = TFSWAUNet()
    assert model.get_num_parameters() == 15_404_834
    assert len(list(model.parameters())) == 936


@pytest.mark.parametrize(("out", "count"), [(2, 1_448_754), (4, 1_448_788), (8, 1_448_856)])
def test_the_small_network_has_the_published_counts(out, count):
    model = TFSWAUNet(4, out, dims=(16, 32, 64, 128), depths=(1, 1, 1, 1))
    assert model.get_num_parameters() == count


def test_a_block_has_40_c_squared_plus_36_c_parameters_in_41_tensors():
    parameters = list(TFSWABlock(24, num_heads=4).parameters())
    assert sum(p.numel() for p in parameters) == 40 * 24**2 + 36 * 24
    assert len(parameters) == 41


def test_model_info_tells_sizes_and_bytes():
    model = TFSWAUNet(**MINI)
    model.stem.requires_grad_(False)
    info = model.get_model_info()
    frozen = sum(p.numel() for p in model.stem.parameters())
    assert info["parameters"] - info["trainable_parameters"] == frozen
    assert info["parameter_bytes"] == 4 * info["parameters"]
    assert info["dims"] == MINI["dims"]


def biases_that_a_batch_norm_cancels(model):
    """A constant added before a batch norm is subtracted again: its gradient is rounding.

    That holds for a convolution straight before one, and for the last bias of each attention,
    which reaches the fusion's batch norm through nothing but a 1×1 convolution.
    """
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, AttentionUnit):
            names.add(f"{name}.mlp.2.bias")
        if isinstance(module, torch.nn.Sequential):
            for (key, layer), after in zip(module.named_children(), list(module)[1:], strict=False):
                convolution = isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d)
                if convolution and isinstance(after, torch.nn.BatchNorm2d):
                    names.add(f"{name}.{key}.bias")
    return names


@pytest.mark.parametrize(("sizes", "blocks"), [(MINI, 11), ({}, 22)])
def test_every_parameter_gets_a_finite_and_useful_gradient(sizes, blocks):
    torch.manual_seed(0)
    model = TFSWAUNet(**sizes).double()  # so that rounding is told from a small gradient
    target = torch.rand(2, 2, 32, 40, dtype=torch.float64)
    (model(torch.randn_like(target)) - target).square().mean().backward()
    cancelled = biases_that_a_batch_norm_cancels(model)
    assert len(cancelled) == 1 + 3 + 3 + 1 + (2 + 3) * blocks
    largest = max(p.grad.abs().max() for p in model.parameters())
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        relative = gradient.abs().max() / largest
        assert (relative < 1e-13) if name in cancelled else (relative > 1e-9), name


@pytest.mark.parametrize(("t", "f"), [(8, 8), (8, 129), (9, 8), (17, 33), (31, 40), (87, 65)])
@pytest.mark.parametrize("training", [True, False])
def test_any_size_from_8_by_8_trains_and_evaluates(t, f, training):
    model = TFSWAUNet(2, 3, **MINI).train(training)
    output = model(torch.randn(1, 2, t, f))
    assert output.shape == (1, 3, t, f)
    assert ((output >= 0) & (output <= 1)).all()


def test_blocks_alternate_between_plain_and_shifted_windows():
    model = TFSWAUNet()
    shifts = [block.swa.shift_size for block in model.encoder[2]]
    assert shifts == [(0, 0), (4, 4)] * 3


def test_down_and_up_halve_and_double():
    x = torch.randn(1, 4, 16, 24)
    down = DownsampleBlock(4, 6)(x)
    assert down.shape == (1, 6, 8, 12)
    assert UpsampleBlock(6, 4)(down).shape == x.shape


def test_the_skip_is_added_once_and_only_in_the_first_block():
    torch.manual_seed(0)
    block = TFSWABlock(8, 2, 4).eval()
    x, skip = torch.randn(2, 1, 8, 8, 8)
    torch.testing.assert_close(block(x, skip), block(x) + skip)


def test_checkpointing_gives_equal_gradients_and_counts_statistics_once():
    torch.manual_seed(0)
    plain = TFSWAUNet(**MINI)
    lean = TFSWAUNet(**MINI, activation_checkpointing=True)
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(2, 2, 24, 24)
    for model in (plain, lean):
        model(x).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), lean.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(plain.named_buffers(), lean.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert lean.encoder[0][0].input_proj[1].num_batches_tracked == 1


def test_checkpointing_keeps_less_between_forward_and_backward():
    def saved_bytes(model):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.randn(1, 2, 32, 32))
        return total

    assert saved_bytes(TFSWAUNet(**MINI, activation_checkpointing=True)) < saved_bytes(
        TFSWAUNet(**MINI)
    )


def test_plain_checkpointing_would_count_statistics_twice():
    """The trap that `checkpointed` avoids, so that this file notices if torch ever closes it."""
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(3)
    twin = copy.deepcopy(norm)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    checkpointed(norm, x).sum().backward()
    torch.utils.checkpoint.checkpoint(twin, x, use_reentrant=False).sum().backward()
    assert norm.num_batches_tracked == 1
    assert twin.num_batches_tracked == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dims": (8, 16, 32)}, "four entries"),
        ({"depths": (1, 1, 0, 1)}, "at least 1"),
        ({"window_size": 0}, "at least 1"),
        ({"num_heads": 3}, "equal heads"),
    ],
)
def test_sizes_that_make_no_network_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        TFSWAUNet(**sizes)


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (2, 16, 16)])
def test_input_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="expected"):
        TFSWAUNet(**MINI)(torch.zeros(shape))


def test_tiny_sizes_run():
    assert TFSWAUNet(**SIZES["tiny"])(torch.randn(1, 2, 16, 16)).shape == (1, 2, 16, 16)
