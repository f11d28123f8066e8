"""Ratios without filters against torchmetrics, and at their edges."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.audio import (
    scale_invariant_signal_distortion_ratio,
    signal_noise_ratio,
)

from tfswa_lab.evaluation.ratios import SAMPLES_AT_ONCE, sdr, si_sdr, usdr


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    references, errors = torch.randn(2, 3, 2, 5000, generator=generator, dtype=torch.float64)
    return references, 0.7 * references + 0.1 * errors


def test_usdr_is_the_signal_to_noise_ratio_of_both_channels_together(pair):
    references, estimates = pair
    expected = signal_noise_ratio(estimates.flatten(1), references.flatten(1))
    torch.testing.assert_close(usdr(references, estimates), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        sdr(references, estimates, math.inf, math.inf)[:, 0], usdr(references, estimates)
    )


def test_si_sdr_is_that_of_torchmetrics_and_deaf_to_gain(pair):
    references, estimates = pair
    expected = scale_invariant_signal_distortion_ratio(estimates.flatten(1), references.flatten(1))
    torch.testing.assert_close(si_sdr(references, estimates), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(si_sdr(references, -9 * estimates), si_sdr(references, estimates))


def test_sdr_of_a_frame_is_the_usdr_of_that_stretch(pair):
    frames = sdr(*pair, window=1.0, hop=0.6, rate=1000)
    assert frames.shape == (3, 7)
    stretch = slice(1200, 2200)
    torch.testing.assert_close(frames[:, 2], usdr(*(x[..., stretch] for x in pair)))


def test_silence_has_no_ratio_and_perfection_an_infinite_one(pair):
    references, estimates = pair
    references[1] = 0
    estimates[2] = references[2]
    assert usdr(references, estimates).isnan().tolist() == [False, True, False]
    assert usdr(references, estimates)[2] == math.inf
    estimates[0] = 0
    assert usdr(references, estimates)[0] == 0  # all of it is missing
    assert si_sdr(references, estimates).isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_blocks_do_not_show(dtype, more):
    draw = np.random.default_rng(0)
    s, noise = draw.standard_normal((2, 3, 2, 2 * SAMPLES_AT_ONCE + more))
    s, x = s.astype(dtype), (0.5 * s + 1e-5 * noise).astype(dtype)
    r, e = (y.astype(np.longdouble).reshape(3, -1) for y in (s, x))
    r_scaled = ((r * e).sum(1) / (r * r).sum(1))[:, None] * r
    for ratio, target in ((usdr, r), (si_sdr, r_scaled)):
        expected = 10 * np.log10((target**2).sum(1) / ((e - target) ** 2).sum(1))
        np.testing.assert_allclose(ratio(s, x), expected.astype(float), rtol=0, atol=1e-12)


@pytest.mark.parametrize("ratio", [sdr, usdr, si_sdr])
def test_shapes_that_differ_are_refused(pair, ratio):
    with pytest.raises(ValueError, match="same shape"):
        ratio(pair[0], pair[1][:2])
