"""Clips of singing: what has no score, and what is no clip."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tfswa_lab.evaluation.bsseval import ClipScores, bss_eval_mono, gnsdr, gsar, gsir, score_clip


@pytest.fixture
def pair():
    draw = np.random.default_rng(0)
    references, errors = draw.standard_normal((2, 2, 3000))
    return references, references + 0.1 * errors


def test_lengths_of_filters_from_numpy_are_taken(pair):
    found = bss_eval_mono(*pair, filter_length=np.int64(8))
    assert torch.equal(found.sar, bss_eval_mono(*pair, filter_length=8).sar)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filter_length": 0}, "filter_length=0: a whole number"),
        ({"filter_length": 51.2}, "filter_length=51.2: a whole number"),
        ({"rate": 0}, "rate=0 Hz makes no sense"),
        ({"rate": -16_000}, "rate=-16000 Hz makes no sense"),
        ({"rate": math.nan}, "rate=nan Hz makes no sense"),
    ],
)
def test_numbers_that_make_no_sense_are_named(pair, change, message):
    with pytest.raises(ValueError, match=message):
        bss_eval_mono(*pair, **change)


def test_clips_of_integers_and_lists_are_refused_before_they_are_mixed(pair):
    with pytest.raises(ValueError, match="references are int64"):
        score_clip(*((100 * x).astype(np.int64) for x in pair))
    with pytest.raises(ValueError, match="references are a list"):
        score_clip(list(pair[0]), pair[1])


@pytest.mark.parametrize("mean", [gnsdr, gsir, gsar])
def test_no_clips_have_no_mean(mean):
    with pytest.raises(ValueError, match="there are no clips"):
        mean([])


def test_a_clip_without_a_floor_has_no_gain_but_other_ratios(pair):
    clips = [score_clip(*pair), bss_eval_mono(*pair)]
    with pytest.raises(ValueError, match=r"clips\[1\] has no floor.*score_clip"):
        gnsdr(clips)
    torch.testing.assert_close(gsir(clips), clips[0].sir)


@pytest.mark.parametrize("mean", [gnsdr, gsir, gsar])
def test_a_clip_without_a_score_is_not_left_out_in_silence(mean):
    clip = ClipScores(*torch.tensor([[9.0, 1.0], [9.0, 1.0], [9.0, 1.0]]), 2.0, torch.zeros(2))
    nan = torch.tensor([math.nan, 1.0])
    unscored = replace(clip, sdr=nan, sir=nan, sar=nan)
    assert mean([clip, clip]).tolist() == [9, 1]
    torch.testing.assert_close(mean([clip, unscored]), nan, equal_nan=True)
