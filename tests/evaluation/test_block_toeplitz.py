"""The structured solver against the whole matrix, written out."""

import pytest
import torch

from tfswa_lab.evaluation.block_toeplitz import Inverse, predictors, solve

TAPS = 24


def correlations(channels, sides=2, samples=300, seed=0, taps=TAPS):
    """Blocks `(1, l, p, p)` and sides `(1, l, p, q)` of random signals, lag by lag."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(channels, samples, generator=generator, dtype=torch.float64)
    x = x + 0.7 * x.roll(1, -1)
    y = torch.randn(sides, samples, generator=generator, dtype=torch.float64)
    return between(x, x, taps), between(x, y, taps)


def between(x, y, taps=TAPS):
    """Σ x_k[t] y_j[t + m], by definition."""
    samples = x.shape[-1]
    return torch.stack([x[:, : samples - m] @ y[:, m:].mT for m in range(taps)])[None]


def dense(blocks):
    """The matrix `(l · p, l · p)` of the first system."""
    taps, channels = blocks.shape[1:3]
    matrix = blocks.new_zeros(taps, channels, taps, channels)
    for row in range(taps):
        for column in range(taps):
            block = blocks[0, abs(row - column)]
            matrix[row, :, column] = block if row >= column else block.mT
    return matrix.reshape(taps * channels, -1)


@pytest.mark.parametrize("channels", [1, 3])
def test_equal_to_the_whole_matrix(channels):
    blocks, sides = correlations(channels)
    filters, loading = solve(blocks, sides)
    expected = torch.linalg.solve(dense(blocks), sides[0].flatten(0, 1)).view_as(sides)
    torch.testing.assert_close(filters, expected, rtol=1e-10, atol=1e-12)
    assert loading.tolist() == [0]


def test_the_inverse_is_the_inverse():
    blocks, _ = correlations(2)
    unit = torch.eye(2 * TAPS, dtype=torch.float64).view(1, TAPS, 2, -1)
    inverse = Inverse(blocks)
    product = dense(blocks) @ inverse(unit)[0].flatten(0, 1)
    torch.testing.assert_close(product, unit[0].flatten(0, 1), rtol=0, atol=1e-10)
    assert inverse.exists.tolist() == [True]


def test_predictors_leave_nothing_but_their_errors():
    blocks, _ = correlations(2)
    forward, backward, forward_error, backward_error = predictors(blocks)
    of_forward = (dense(blocks) @ forward[0].flatten(0, 1)).unflatten(0, (TAPS, 2))
    of_backward = (dense(blocks) @ backward[0].flatten(0, 1)).unflatten(0, (TAPS, 2))
    torch.testing.assert_close(of_forward[0], forward_error[0])
    torch.testing.assert_close(of_backward[-1], backward_error[0])
    assert max(of_forward[1:].abs().max(), of_backward[:-1].abs().max()) < 1e-10
    assert torch.equal(forward[0, 0], torch.eye(2).double())
    assert torch.equal(backward[0, -1], torch.eye(2).double())


def test_systems_are_solved_side_by_side():
    pairs = [correlations(2, seed=seed) for seed in range(3)]
    blocks, sides = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    together, _ = solve(blocks, sides)
    for system, pair in enumerate(pairs):
        torch.testing.assert_close(together[system], solve(*pair)[0][0])


def singular(seed=0):
    """Two channels, of which the second is the first at another level."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 300, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 300, generator=generator, dtype=torch.float64)
    x = torch.cat([x, 0.3 * x])
    return between(x, x), between(x, y)


def test_a_channel_that_repeats_another_is_no_obstacle():
    blocks, sides = singular()
    filters, loading = solve(blocks, sides)
    assert 0 < loading.item() <= 1e-12
    residual = dense(blocks) @ filters[0].flatten(0, 1) - sides[0].flatten(0, 1)
    assert residual.norm() / sides.norm() < 1e-12
    # What both channels' filters make together is what the first alone can do.
    alone, _ = solve(blocks[..., :1, :1], sides[:, :, :1])
    together = filters[:, :, 0] + 0.3 * filters[:, :, 1]
    torch.testing.assert_close(together, alone[:, :, 0], rtol=1e-9, atol=1e-10)


def test_only_the_systems_that_need_it_are_loaded():
    blocks, sides = (torch.cat(parts) for parts in zip(correlations(2), singular(), strict=True))
    _, loading = solve(blocks, sides)
    assert loading[0] == 0 < loading[1]


def test_levels_far_apart_and_silent_channels_are_solved_as_well():
    blocks, sides = correlations(3)
    level = torch.tensor([1.0, 1e-6, 0.0], dtype=torch.float64)[:, None]
    filters, _ = solve(blocks * level * level.mT, sides * level)
    expected, _ = solve(blocks[..., :2, :2], sides[:, :, :2])
    torch.testing.assert_close(level[:2] * filters[:, :, :2], expected, rtol=1e-8, atol=1e-10)
    assert not filters[:, :, 2].any()


def test_what_is_no_correlation_is_refused():
    blocks, sides = correlations(2)
    with pytest.raises(ArithmeticError, match="these are no correlations"):
        solve(-blocks, sides)
