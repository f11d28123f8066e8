"""Physics of the three attentions, and their independent reference: brute force."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from tfswa_lab.models import attention
from tfswa_lab.models.attention import (
    FrequencySequenceAttention,
    MultiHeadAttention,
    ScaledDotProductAttention,
    ShiftedWindowAttention,
    TemporalSequenceAttention,
    pad_to_windows,
    window_mask,
    window_merge,
    window_partition,
)


def random_unit(unit):
    """Weights large enough that a leak would show."""
    for parameter in unit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return unit.double().eval()


def test_the_written_out_formula_equals_the_fused_kernel():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 11, 8, dtype=torch.float64)
    mask = torch.rand(11, 11) > 0.3
    mask |= torch.eye(11, dtype=torch.bool)
    output, weights = ScaledDotProductAttention()(query, key, value, mask)
    fused = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(output, fused)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert (weights[..., ~mask] == 0).all()


def test_multi_head_attention_equals_torch_nn_multihead_attention():
    torch.manual_seed(0)
    ours, peer = MultiHeadAttention(24, 3), torch.nn.MultiheadAttention(24, 3, batch_first=True)
    with torch.no_grad():
        peer.in_proj_weight.copy_(ours.qkv.weight)
        peer.in_proj_bias.zero_()
        peer.out_proj.weight.copy_(ours.proj.weight)
        peer.out_proj.bias.copy_(ours.proj.bias)
    tokens = torch.randn(2, 9, 24)
    expected, maps = peer(tokens, tokens, tokens, average_attn_weights=False)
    torch.testing.assert_close(ours(tokens), expected, atol=1e-6, rtol=1e-5)
    output, weights = ours(tokens, need_weights=True)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(weights, maps, atol=1e-6, rtol=1e-5)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="dim=10 cannot be split into num_heads=4"):
        MultiHeadAttention(10, 4)


def jacobian_support(unit, t, f, at):
    """Boolean (t, f): which input cells the output at cell `at` depends on."""
    x = torch.randn(1, 8, t, f, dtype=torch.float64, requires_grad=True)
    unit(x)[0, :, at[0], at[1]].sum().backward()
    return x.grad[0].abs().amax(0) != 0


def test_tsa_sees_its_own_frequency_over_all_time_and_nothing_else():
    torch.manual_seed(0)
    seen = jacobian_support(random_unit(TemporalSequenceAttention(8, 2)), 7, 6, at=(3, 2))
    expected = torch.zeros(7, 6, dtype=torch.bool)
    expected[:, 2] = True
    assert torch.equal(seen, expected)


def test_fsa_sees_its_own_frame_over_all_frequencies_and_nothing_else():
    torch.manual_seed(0)
    seen = jacobian_support(random_unit(FrequencySequenceAttention(8, 2)), 7, 6, at=(3, 2))
    expected = torch.zeros(7, 6, dtype=torch.bool)
    expected[3] = True
    assert torch.equal(seen, expected)


def test_shifted_windows_see_across_the_borders_of_the_unshifted_ones():
    torch.manual_seed(0)
    plain = random_unit(ShiftedWindowAttention(8, 2, window_size=4))
    shifted = random_unit(ShiftedWindowAttention(8, 2, window_size=4, shift_size=2))
    seen_plain = jacobian_support(plain, 8, 8, at=(3, 3))
    seen_shifted = jacobian_support(shifted, 8, 8, at=(3, 3))
    assert seen_plain[:4, :4].all()
    assert seen_plain.sum() == 16
    assert seen_shifted[2:6, 2:6].all()
    assert seen_shifted.sum() == 16


def test_partition_and_merge_undo_each_other():
    x = torch.randn(3, 5, 12, 20)
    assert torch.equal(window_merge(window_partition(x, (4, 5)), (4, 5), x.shape), x)
    assert torch.equal(pad_to_windows(x, (8, 8))[:, :, :12, :20], x)


def brute_force_swa(unit, x):
    """Global attention over all cells, masked by which tile of the shifted grid holds them."""
    _, c, t, f = x.shape
    (wt, wf), (st, sf) = unit.window_size, unit.shift_size
    tiles = [((i - st) // wt, (j - sf) // wf) for i in range(t) for j in range(f)]
    mask = torch.tensor([[p == q for q in tiles] for p in tiles])
    tokens = rearrange(x, "b c t f -> b (t f) c")
    mha = unit.attention
    query, key, value = mha.qkv(unit.norm1(tokens)).chunk(3, dim=-1)
    heads = []
    for h in range(mha.num_heads):
        d = slice(h * c // mha.num_heads, (h + 1) * c // mha.num_heads)
        scores = query[..., d] @ key[..., d].transpose(1, 2) / (c // mha.num_heads) ** 0.5
        heads.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value[..., d])
    tokens = tokens + mha.proj(torch.cat(heads, -1))
    tokens = tokens + unit.mlp(unit.norm2(tokens))
    return rearrange(tokens, "b (t f) c -> b c t f", t=t)


@pytest.mark.parametrize("seed", range(24))
def test_swa_equals_brute_force_masked_global_attention(seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))  # noqa: E731
    t, f = draw(1, 20), draw(1, 20)
    window = (draw(1, 9), draw(1, 9))
    shift = (draw(0, window[0]), draw(0, window[1]))
    torch.manual_seed(seed)
    unit = random_unit(ShiftedWindowAttention(8, 2, window, shift))
    x = torch.randn(2, 8, t, f, dtype=torch.float64)
    torch.testing.assert_close(unit(x), brute_force_swa(unit, x), atol=1e-10, rtol=0)
    unit, x = unit.float(), x.float()
    torch.testing.assert_close(unit(x), brute_force_swa(unit, x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mask", [None, (1, 1, 4, 4), (10, 1, 4, 4)])
def test_too_many_sequences_for_a_kernel_are_attended_to_in_parts(mask, monkeypatch):
    torch.manual_seed(0)
    qkv = torch.randn(3, 10, 2, 4, 8)
    mask = None if mask is None else torch.randn(mask) > -1
    whole = attention.fused_attention(*qkv, mask)
    monkeypatch.setattr(attention, "MOST_SEQUENCES", 3)
    torch.testing.assert_close(attention.fused_attention(*qkv, mask), whole, equal_nan=True)


def test_every_query_may_see_itself_so_no_row_of_the_softmax_is_empty():
    mask = window_mask(7, 5, (4, 4), (2, 1), "cpu")
    assert mask.diagonal(dim1=1, dim2=2).all()
    assert torch.equal(mask, mask.transpose(1, 2))


def test_a_shift_as_large_as_the_window_is_refused():
    with pytest.raises(ValueError, match="shift_size=8"):
        ShiftedWindowAttention(8, 2, window_size=8, shift_size=8)
