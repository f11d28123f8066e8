"""Which pairs are compared, and what counts as silence."""

import math
import re

import numpy as np
import pytest
import torch

from tfswa_lab.evaluation.bsseval import bss_eval, bss_eval_mono
from tfswa_lab.evaluation.frames import audible, checked_pair, checked_taps
from tfswa_lab.evaluation.ratios import sdr, si_sdr, usdr


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def pair():
    references = noise(2, 2, 4000)
    return references, 0.8 * references + 0.2 * references.flip(0) + 0.1 * noise(2, 2, 4000, seed=1)


# What is taken


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_of_any_precision_are_taken_as_they_are(pair, dtype):
    taken = checked_pair(*(x.to(dtype) for x in pair))
    for x, y in zip(pair, taken, strict=True):
        assert torch.equal(x.to(dtype), y)


def test_arrays_that_lie_otherwise_in_memory_are_taken(pair):
    last = (x.numpy().swapaxes(1, 2).copy() for x in pair)  # museval's order
    taken = checked_pair(*(x.swapaxes(1, 2) for x in last))
    for x, y in zip(pair, taken, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("level", [1e-90, 1e-30, 1e30, 1e90])
def test_no_level_changes_a_ratio(pair, level):
    scaled = [level * x for x in pair]
    for ratio in (usdr, si_sdr, lambda *p: sdr(*p, 1000, 1000, rate=1)):
        torch.testing.assert_close(ratio(*scaled), ratio(*pair), rtol=0, atol=1e-9)
    full, loud = (bss_eval(*x, 1000, 1000, 64, rate=1) for x in (pair, scaled))
    for name in ("sdr", "isr", "sir", "sar"):
        torch.testing.assert_close(getattr(loud, name), getattr(full, name), rtol=0, atol=1e-9)


# What is refused


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((44_100, 2), r"\(44100, 2\) has more stems than samples; soundfile .* x\.T\[None\]"),
        ((2, 44_100, 2), r"\(2, 44100, 2\) has more channels than samples; .* x\.swapaxes\(1, 2\)"),
        ((44_100, 2, 2), r"\(44100, 2, 2\) has more stems than samples"),
    ],
)
@pytest.mark.parametrize("ratio", [bss_eval, sdr, usdr, si_sdr, bss_eval_mono])
def test_the_order_of_other_libraries_is_refused(shape, message, ratio):
    with pytest.raises(ValueError, match=message):
        ratio(torch.ones(shape), torch.ones(shape))


def test_the_remedy_for_soundfiles_order_is_one(pair):
    one_stem = [x[0].T for x in pair]  # (samples, channels)
    found = usdr(*(x.T[None] for x in one_stem))
    torch.testing.assert_close(found, usdr(*pair)[:1])


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("which", [0, 1])
def test_integers_are_refused_as_their_scale_is_unknown(pair, dtype, which):
    mixed = list(pair)
    mixed[which] = (10 * pair[which]).to(dtype)
    name = ("references", "estimates")[which]
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"{name} are {kind}; .* full scale, 32768 for 16 bits"):
        usdr(*mixed)


@pytest.mark.parametrize("kind", [list, tuple])
def test_stems_that_are_not_stacked_are_refused(pair, kind):
    with pytest.raises(ValueError, match=f"estimates are a {kind.__name__}; stack the stems"):
        usdr(pair[0], kind(pair[1]))


@pytest.mark.parametrize("level", [1e-170, 1e160, 1e307])
@pytest.mark.parametrize("ratio", [bss_eval, sdr, usdr, si_sdr])
def test_levels_without_squares_are_refused(pair, level, ratio):
    extreme = pair[1] / pair[1][0].abs().max() * level
    peak = re.escape(f"{level:.0e}")
    with pytest.raises(ValueError, match=rf"estimates\[0\] has a peak of {peak}, .* alike"):
        ratio(pair[0], extreme)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_sample_that_is_no_number_is_found(pair, bad):
    pair[0][1, 1, -1] = bad
    with pytest.raises(ValueError, match=r"references\[1\] contains NaN"):
        usdr(*pair)


# Taps


@pytest.mark.parametrize("taps", [7, np.int64(7), np.uint8(7), torch.tensor(7)])
def test_whole_numbers_of_any_type_are_taps(taps):
    assert checked_taps(taps) == 7
    assert type(checked_taps(taps)) is int


@pytest.mark.parametrize("taps", [0, -3, 7.0, math.nan, "7", None, np.int64(0)])
def test_what_is_no_number_of_taps_is_refused(taps):
    with pytest.raises(ValueError, match=r"filter_length=.*whole number of taps"):
        checked_taps(taps)


# Silence


def test_stems_are_silent_or_cancel_or_are_scored():
    references, estimates = noise(5, 2, 100), noise(5, 2, 100, seed=1)
    references[0] = 0
    references[1, 1] = -references[1, 0]
    estimates[2] = 0
    estimates[3, 1] = -estimates[3, 0]
    sounding, scored, notes = audible(references, estimates)
    assert (sounding, scored) == ([1, 2, 3, 4], [4])
    assert notes == (
        "stem 0 is silent throughout, so it has no ratios",
        "stem 1 has channels that cancel throughout, which counts as silence, so it has no ratios",
        "the estimate of stem 2 is silent throughout: no ratios",
        "the estimate of stem 3 has channels that cancel throughout, which counts as silence: "
        "no ratios",
    )


def test_what_leaks_of_a_stem_whose_channels_cancel_is_interference():
    references = noise(2, 2, 20_000)
    references[1, 1] = -references[1, 0]
    estimates = references.clone()
    estimates[0] += 0.1 * references[1] + 0.001 * noise(2, 20_000, seed=1)
    result = bss_eval(references, estimates, math.inf, math.inf, 8, rate=1)
    assert result.sir[0, 0].item() == pytest.approx(20, abs=0.5)
    assert result.sar[0, 0] > 55
    assert result.sdr[1].isnan().all()
