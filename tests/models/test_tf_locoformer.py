"""Published counts, the whole network by hand, who sees whom, and checkpointing by parts."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from tfswa_lab.models.tf_locoformer import (
    SIZES,
    ConvSwiGLU,
    FrequencyPath,
    RMSGroupNorm,
    TFLocoformer,
    TFLocoformerBlock,
    TimePath,
)

LAYER = {
    "dim": 8,
    "hidden_dim": 6,
    "kernel_size": 4,
    "num_heads": 2,
    "attention_dim": 12,
    "num_groups": 2,
}
MINI = LAYER | {"num_blocks": 2}


@pytest.mark.parametrize(
    ("name", "count"), [("S", 5_125_220), ("M", 14_975_620), ("L", 22_459_780)]
)
def test_the_papers_sizes_have_the_published_counts(name, count):
    """Real and imaginary part of one channel in, of two speakers out."""
    model = TFLocoformer(in_channels=2, out_channels=4, **SIZES[name])
    assert model.get_num_parameters() == count


@pytest.mark.parametrize(("dim", "blocks", "count"), [(96, 4, 7_397_864), (48, 3, 1_392_920)])
def test_a_mono_music_recipe_for_four_stems_has_its_counts(dim, blocks, count):
    model = TFLocoformer(2, 8, dim, blocks, hidden_dim=4 * dim, kernel_size=4, attention_dim=dim)
    assert model.get_num_parameters() == count


def norm_by_hand(x, gamma, groups):
    out = torch.empty_like(x)
    for group in range(groups):
        c = slice(group * x.shape[-1] // groups, (group + 1) * x.shape[-1] // groups)
        rms = x[..., c].square().mean(-1, keepdim=True).sqrt()
        out[..., c] = x[..., c] / (rms + 1e-5) * gamma[c]
    return out


def ffn_by_hand(x, w):
    """Pad, convolve, gate, convolve back, cut: `(n, l, c)`, every tap a matrix."""
    length, kernel = x.shape[1], w["conv.weight"].shape[-1]
    x = F.pad(x, (0, 0, kernel - 1, kernel - 1))
    taps = [x[:, k : k + length + kernel - 1] @ w["conv.weight"][..., k].T for k in range(kernel)]
    value, gate = (sum(taps) + w["conv.bias"]).chunk(2, dim=-1)
    hidden = value * gate * torch.sigmoid(gate)
    out = x.new_zeros(len(x), length + 2 * (kernel - 1), w["deconv.weight"].shape[1])
    for k in range(kernel):
        out[:, k : k + hidden.shape[1]] += hidden @ w["deconv.weight"][..., k]
    return (out + w["deconv.bias"])[:, kernel - 1 : kernel - 1 + length]


def attention_by_hand(x, w, heads):
    """All scores written out, positions as complex factors."""
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in (x @ w["qkv.weight"].T).chunk(3, -1))
    width = q.shape[-1]
    place = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None]
    turn = torch.exp(1j * place * 10_000 ** (-torch.arange(0, width, 2) / width))  # (l, 1, d/2)
    q, k = (torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * turn for y in (q, k))
    scores = torch.einsum("nlhd,nmhd->nhlm", q, k.conj()).real / width**0.5
    output = torch.einsum("nhlm,nmhd->nlhd", scores.softmax(-1), v)
    return output.flatten(-2) @ w["proj.weight"].T


def part_of(weights, prefix):
    return {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}


def path_by_hand(x, w, sizes):
    """Sequences `(n, l, c)`; both feed-forward branches are added whole."""
    norm = lambda y, name: norm_by_hand(y, w[name], sizes["num_groups"])  # noqa: E731
    x = x + ffn_by_hand(norm(x, "norm1.gamma"), part_of(w, "ffn1."))
    attention = part_of(w, "attention.")
    x = x + attention_by_hand(norm(x, "norm2.gamma"), attention, sizes["num_heads"])
    return x + ffn_by_hand(norm(x, "norm3.gamma"), part_of(w, "ffn2."))


def network_by_hand(model, x):
    weights, sizes = model.state_dict(), model.sizes
    x = F.conv2d(x, weights["encoder.0.weight"], weights["encoder.0.bias"], padding=1)
    mean, var = (f(x, dim=(1, 2, 3), keepdim=True) for f in (torch.mean, torch.var))
    var = var * (x[0].numel() - 1) / x[0].numel()
    gain, bias = (weights[f"encoder.1.{name}"].view(-1, 1, 1) for name in ("weight", "bias"))
    x = (x - mean) / (var + 1e-5).sqrt() * gain + bias
    for i in range(sizes["num_blocks"]):
        frames = [
            path_by_hand(frame, part_of(weights, f"blocks.{i}.frequency."), sizes)
            for frame in x.permute(2, 0, 3, 1)  # t times (b, f, c)
        ]
        x = torch.stack(frames, dim=2)  # (b, f, t, c)
        bins = [
            path_by_hand(one, part_of(weights, f"blocks.{i}.time."), sizes)
            for one in x.transpose(0, 1)  # f times (b, t, c)
        ]
        x = torch.stack(bins, dim=3).permute(0, 2, 1, 3)  # (b, t, c, f) to (b, c, t, f)
    kernel = weights["decoder.weight"].transpose(0, 1).flip(2, 3)
    return F.conv2d(x, kernel, weights["decoder.bias"], padding=1)


def random_weights(module):
    """Large enough that a leak would show, biases and gains too."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.double()


@torch.no_grad()
@pytest.mark.parametrize("kernel_size", [1, 4, 7])
def test_the_network_equals_its_formulas_by_hand(kernel_size):
    torch.manual_seed(0)
    model = random_weights(TFLocoformer(4, 6, **MINI | {"kernel_size": kernel_size}))
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(model(x), network_by_hand(model, x))


@torch.no_grad()
@pytest.mark.parametrize("kernel_size", [1, 4, 8])
@pytest.mark.parametrize("length", [1, 2, 5, 16, 31])
def test_convolutions_keep_every_length(kernel_size, length):
    torch.manual_seed(0)
    unit = random_weights(ConvSwiGLU(6, 5, kernel_size))
    tokens = torch.randn(3, length, 6, dtype=torch.float64)
    torch.testing.assert_close(unit(tokens), ffn_by_hand(tokens, unit.state_dict()))


@pytest.mark.parametrize("kernel_size", [4, 8])
def test_a_token_sees_as_many_neighbours_on_both_sides(kernel_size):
    torch.manual_seed(0)
    unit = random_weights(ConvSwiGLU(6, 5, kernel_size))
    tokens = torch.randn(1, 40, 6, dtype=torch.float64, requires_grad=True)
    unit(tokens)[0, 20].sum().backward()
    seen = tokens.grad[0].abs().amax(-1).nonzero().flatten().tolist()
    assert seen == list(range(20 - kernel_size + 1, 20 + kernel_size))


def test_silence_stays_silent_through_the_norm_and_has_a_gradient():
    tokens = torch.zeros(2, 8, requires_grad=True)
    normalised = RMSGroupNorm(8, 2)(tokens)
    normalised.sum().backward()
    assert (normalised == 0).all()
    assert tokens.grad.isfinite().all()


def jacobian_support(module, t, f, at):
    """Boolean (t, f): which input cells the output at cell `at` depends on."""
    x = torch.randn(1, 8, t, f, dtype=torch.float64, requires_grad=True)
    module(x)[0, :, at[0], at[1]].sum().backward()
    return x.grad[0].abs().amax(0) != 0


@pytest.mark.parametrize("shape", [(7, 6), (5, 40)])
def test_paths_see_their_own_axis_whole_and_nothing_else(shape):
    torch.manual_seed(0)
    layer = LAYER | {"dropout": 0.0}
    along_f = jacobian_support(random_weights(FrequencyPath(**layer)), *shape, at=(3, 2))
    along_t = jacobian_support(random_weights(TimePath(**layer)), *shape, at=(3, 2))
    assert along_f[3].all()
    assert along_t[:, 2].all()
    assert along_f.sum() == shape[1]
    assert along_t.sum() == shape[0]
    block = random_weights(TFLocoformerBlock(**layer))
    assert jacobian_support(block, *shape, at=(3, 2)).all()


def test_items_of_a_batch_do_not_meet():
    torch.manual_seed(0)
    model = TFLocoformer(2, 4, **MINI)
    x = torch.randn(3, 2, 6, 9)
    alone = torch.cat([model(item[None]) for item in x])
    torch.testing.assert_close(model(x), alone, atol=1e-5, rtol=1e-4)


def test_every_parameter_gets_a_useful_gradient():
    torch.manual_seed(0)
    model = TFLocoformer(4, 8, **MINI).double()
    model(torch.randn(2, 4, 12, 10, dtype=torch.float64)).square().mean().backward()
    largest = max(p.grad.abs().max() for p in model.parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-6 * largest, name


def gradients(model, x):
    torch.manual_seed(1)  # of the dropout
    model(x).square().mean().backward()
    after = torch.get_rng_state()
    return [p.grad for p in model.parameters()], after


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("how", [True, "block", "path"])
def test_checkpointing_gives_equal_gradients(how, dropout):
    torch.manual_seed(0)
    plain = TFLocoformer(2, 4, **MINI, dropout=dropout)
    lean = TFLocoformer(2, 4, **MINI, dropout=dropout, activation_checkpointing=how)
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(2, 2, 8, 9)
    expected, state = gradients(plain, x)
    recomputed, state_after = gradients(lean, x)
    assert all(map(torch.equal, expected, recomputed))
    assert torch.equal(state, state_after)  # the next step draws the same numbers, too


@pytest.mark.parametrize(
    ("how", "order"),
    [
        (False, "F0 T0 F1 T1"),
        ("block", "F0 T0 F1 T1, F1 T1 F0 T0"),
        ("path", "F0 T0 F1 T1, T1 F1 T0 F0"),
    ],
)
def test_checkpointing_recomputes_whole_blocks_or_single_paths(how, order):
    model = TFLocoformer(2, 4, **MINI, activation_checkpointing=how)
    ran = []
    for i, block in enumerate(model.blocks):
        block.frequency.register_forward_pre_hook(lambda *_, i=i: ran.append(f"F{i}"))
        block.time.register_forward_pre_hook(lambda *_, i=i: ran.append(f"T{i}"))
    model(torch.randn(1, 2, 6, 5)).sum().backward()
    assert " ".join(ran) == order.replace(",", "")


@pytest.mark.parametrize("how", [False, "block", "path"])
def test_training_needs_no_values(how):
    """Only shapes: a step that would need a terabyte can be traced on a laptop."""
    with FakeTensorMode():
        model = TFLocoformer(4, 16, **SIZES["M"], activation_checkpointing=how)
        output = model(torch.randn(4, 4, 862, 2049))
        output.mean().backward()
        assert output.shape == (4, 16, 862, 2049)
        assert all(p.grad.shape == p.shape for p in model.parameters())


def test_exported_with_both_axes_free_it_gives_the_same_numbers():
    torch.manual_seed(0)
    model = TFLocoformer(2, 4, **MINI).eval()
    free = {2: torch.export.Dim("t", min=2, max=500), 3: torch.export.Dim("f", min=2, max=500)}
    program = torch.export.export(model, (torch.randn(1, 2, 9, 8),), dynamic_shapes={"x": free})
    x = torch.randn(1, 2, 13, 21)
    torch.testing.assert_close(program.module()(x), model(x))


def test_autocast_stays_close_to_float32_and_ends_in_it():
    torch.manual_seed(0)
    model = TFLocoformer(4, 8, **MINI).eval()
    x = torch.randn(1, 4, 20, 30)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 5)])
def test_any_size_trains(shape):
    model = TFLocoformer(2, 4, **SIZES["tiny"])
    x = torch.randn(1, 2, *shape, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_groups": 3}, "dim=8 cannot be split into num_groups=3"),
        ({"num_heads": 5}, "attention_dim=12 cannot be split into num_heads=5"),
        ({"num_heads": 4}, "odd width 3"),
        ({"num_blocks": 0}, "num_blocks=0 must be at least 1"),
        ({"kernel_size": -1}, "kernel_size=-1"),
        ({"dropout": 1.5}, "1.5"),
        ({"activation_checkpointing": "paths"}, "activation_checkpointing='paths'"),
    ],
)
def test_sizes_that_make_no_network_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        TFLocoformer(**MINI | wrong)


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (2, 16, 16)])
def test_input_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(b, 2, t, f\)"):
        TFLocoformer(**MINI)(torch.zeros(shape))


@pytest.mark.gpu
@pytest.mark.parametrize("how", [False, "path"])
def test_on_a_gpu_flash_attention_trains_it_in_bfloat16(how):
    torch.manual_seed(0)
    sizes = MINI | {"attention_dim": 32}
    model = TFLocoformer(4, 8, **sizes, activation_checkpointing=how)
    x = torch.randn(1, 4, 20, 30)
    exact = model(x).detach()
    flash = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    with flash, torch.autocast("cuda", torch.bfloat16):
        rough = model.cuda()(x.cuda())
        rough.square().mean().backward()
    assert (rough.cpu() - exact).norm() < 0.05 * exact.norm()
    assert all(p.grad.isfinite().all() for p in model.parameters())
