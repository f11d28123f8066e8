"""The five published savings: what the fixed code frees, predicted and traced."""

from functools import cache, partial

import pytest
import torch

from tfswa_lab.memory.predict import predict
from tfswa_lab.memory.predict.allocator import replay
from tfswa_lab.memory.trace import trace
from tfswa_lab.models.rotary import RotaryAttention
from tfswa_lab.stft import STFTProcessor
from tfswa_lab.teaching import claims

SMALL = {"seconds": 0.05, "n_fft": 128, "dim": 16, "num_heads": 2, "attention_dim": 16}
SMALL |= {"hidden_dim": 16}
SPECTROGRAM = 2 * 2049 * 431 * 8  # (c, f, t) of complex64

fixed = pytest.mark.parametrize("claim", claims.FIXED)
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])


@cache
def predicted(make=claims.make_step, attention="auto", **choices):
    return predict(partial(make, **choices), attention, steps=1)


@pytest.mark.parametrize("separate", [claims.spec_deleted, claims.loop_deleted])
def test_fixed_code_separates_as_before(separate):
    wave, stft = torch.randn(1, 2, 2000), STFTProcessor(128, 32)
    model = torch.nn.Conv2d(4, 4 * claims.STEMS, 3, padding=1)
    expected = claims.as_published(model, stft, wave)
    assert expected.shape == (1, claims.STEMS, 2, 2000)
    assert torch.equal(separate(model, stft, wave), expected)


@pytest.mark.parametrize("attend", [claims.attention_as_published, claims.qkv_deleted])
def test_published_attention_is_the_patients(attend):
    unit, tokens = RotaryAttention(16, 24, 3), torch.randn(5, 11, 16)
    torch.testing.assert_close(attend(unit, tokens), unit(tokens))


@fixed
@modes
def test_whole_steps_save_a_spectrogram_at_most(claim, training):
    before = predicted(training=training).peak
    saved = before - predicted(training=training, **claims.FIXED[claim]).peak
    if claim == "1 del spec" and not training:
        assert saved == pytest.approx(SPECTROGRAM, rel=0.1)
    else:
        assert saved == 0
    assert 100 * saved < 1e9 * claims.CLAIMED_GB[claim]


@fixed
@modes
def test_on_its_own_no_line_saves_more_than_a_spectrogram(claim, training):
    change = claims.FIXED[claim]
    make = claims.make_attention if "attend" in change else claims.make_alone
    before, after = (predicted(make, training=training, **c).peak for c in ({}, change))
    assert 0 <= before - after < 1.1 * SPECTROGRAM


@fixed
@modes
def test_traced_at_a_small_size_as_predicted(claim, training):
    peaks = []
    for change in ({}, claims.FIXED[claim]):
        with trace(stacks=False) as seen:
            claims.make_step(training=training, **SMALL, **change)()
        peaks.append(seen.peak("cpu").allocated)
    spectrogram = 2 * 65 * 69 * 8
    assert 0 <= peaks[0] - peaks[1] <= (spectrogram if claim == "1 del spec" else 0)


@modes
def test_empty_cache_after_every_two_blocks_saves_nothing(training):
    history = predicted(training=training, num_blocks=4).timeline
    starts = claims.block_starts(history)
    assert starts == sorted(set(starts))
    assert len(starts) == 4
    never, often = replay(history), replay(history, empty_cache_after=[starts[2] - 1])
    assert often.peak_allocated == never.peak_allocated
    assert often.peak_reserved[0] >= never.peak_reserved[0]


def test_the_math_kernel_keeps_the_published_scores():
    math, fused = (
        max(block.size for block in predicted(attention=kernel).timeline.blocks)
        for kernel in ("math", "efficient")
    )
    assert math == 431 * 12 * 2049**2 * 4
    assert fused < math / 40


def test_what_was_allocated_before_is_not_measured(monkeypatch):
    """In MiB: 3 are there before, the step's network takes 5, and its step 2 more for a while."""
    allocated, peak = [3], [9]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: allocated[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peak[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def reset(_):
        peak[0] = allocated[0]

    def take(size):
        allocated[0] += size
        peak[0] = max(peak[0], allocated[0])

    def make():
        take(5)
        return lambda: (take(2), take(-2))

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    assert claims.measured(make) == 7
