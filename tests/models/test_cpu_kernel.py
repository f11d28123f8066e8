"""The compiled kernel gives what torch's operators give, and only where nobody looks inside."""

import copy
import math
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tfswa_lab.device import compute_threads
from tfswa_lab.memory import predict
from tfswa_lab.models import attention, cpu_kernel, lean_inference
from tfswa_lab.models.attention import (
    AttentionUnit,
    FrequencySequenceAttention,
    ShiftedWindowAttention,
    TemporalSequenceAttention,
)
from tfswa_lab.models.separator import build_separator
from tfswa_lab.models.tfswa_unet import SIZES

UNITS = {
    "TSA": TemporalSequenceAttention,
    "FSA": FrequencySequenceAttention,
    "W-MSA": ShiftedWindowAttention,
    "SW-MSA": lambda dim, heads: ShiftedWindowAttention(dim, heads, 8, 4),
    "oblong": lambda dim, heads: ShiftedWindowAttention(dim, heads, (4, 6), (1, 5)),
}


@pytest.fixture(autouse=True)
def small_planes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_inference, "LEAST_NUMBERS", 0)


@pytest.fixture
def kernel_runs(monkeypatch: pytest.MonkeyPatch) -> list:
    """One entry for each time that the kernel was taken."""
    runs, kernel = [], cpu_kernel.attention_unit

    def counted(*args):
        runs.append(args)
        return kernel(*args)

    monkeypatch.setattr(cpu_kernel, "attention_unit", counted)
    return runs


def made(name: str, dim: int = 16, heads: int = 2, weights: float = 0.3) -> AttentionUnit:
    torch.manual_seed(0)
    unit = UNITS[name](dim, heads).eval()
    for parameter in unit.parameters():
        nn.init.normal_(parameter, std=weights)
    return unit


def in_float64(unit: AttentionUnit, x: torch.Tensor) -> torch.Tensor:
    """By torch's operators: the kernel knows float32 only."""
    return copy.deepcopy(unit).double()(x.double())


@torch.inference_mode()
@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize(("dim", "heads"), [(16, 4), (16, 2), (16, 1), (24, 2), (40, 2)])
@pytest.mark.parametrize("plane", [(1, 9, 11), (2, 16, 24), (1, 1, 1), (1, 5, 300)])
def test_it_equals_torch_in_float64(name, dim, heads, plane, kernel_runs):
    unit = made(name, dim, heads)
    b, t, f = plane
    x = torch.randn(b, dim, t, f)
    torch.testing.assert_close(unit(x).double(), in_float64(unit, x), rtol=2e-5, atol=2e-5)
    assert len(kernel_runs) == 1


@torch.inference_mode()
@pytest.mark.parametrize("name", UNITS)
def test_scores_that_would_overflow_lose_their_maximum(name, kernel_runs):
    unit = made(name)
    unit.attention.qkv.weight *= 30  # scores of some thousands
    x = torch.randn(1, 16, 20, 30)
    right = in_float64(unit, x)
    assert (unit(x) - right).abs().max() < 1e-4 * right.abs().max()
    assert len(kernel_runs) == 1


@torch.inference_mode()
@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_reaches_the_same_cells(name, value):
    unit, x = made(name), torch.randn(1, 16, 16, 24)
    x[0, 3, 5, 7] = value
    assert torch.equal(unit(x).isfinite(), in_float64(unit, x).isfinite())


@torch.inference_mode()
def test_threads_change_no_bit():
    unit, x = made("SW-MSA"), torch.randn(1, 16, 40, 50)
    results = []
    for threads in (1, 2, 3):
        with compute_threads(threads):
            results.append(unit(x))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@torch.inference_mode()
def test_the_small_separator_stays_the_same(kernel_runs, monkeypatch):
    torch.manual_seed(0)
    separator = build_separator(("vocals", "other"), **SIZES["small"]).eval()
    mixture = 0.1 * torch.randn(1, 2, 20_000)
    lean = separator(mixture)
    assert len(kernel_runs) == 3 * 7  # blocks
    monkeypatch.setattr(attention, "runs_lean", lambda *_: False)
    right = separator(mixture)
    assert (lean - right).abs().max() < 1e-5 * right.abs().max()


# Whoever looks inside, or has changed something, gets torch's operators ----------------------


def fused(*args, **kwargs):
    return lean_inference.TORCHS_KERNEL(*args, **kwargs)


def hook(*_):
    return None


def replaced(unit: AttentionUnit) -> None:
    unit.mlp[1] = nn.ReLU()


WATCHERS = {
    "gradients": lambda unit: torch.enable_grad(),
    "autocast": lambda unit: torch.autocast("cpu", torch.bfloat16),
    "counter of FLOPs": lambda unit: FlopCounterMode(display=False),
    "hook": lambda unit: nullcontext(unit.attention.register_forward_hook(hook)),
    "hook before": lambda unit: nullcontext(unit.mlp[0].register_forward_pre_hook(hook)),
    "float64": lambda unit: nullcontext(unit.double()),
    "another layer": lambda unit: nullcontext(replaced(unit)),
}


@pytest.mark.parametrize("name", WATCHERS)
def test_watchers_see_every_operator(name, kernel_runs):
    unit, x = made("FSA"), torch.randn(1, 16, 4, 6)
    with torch.no_grad(), WATCHERS[name](unit):
        unit(x.to(unit.norm1.weight.dtype))
    assert not kernel_runs


def narrowed(unit: AttentionUnit) -> None:
    unit.mlp[0], unit.mlp[2] = nn.Linear(16, 30), nn.Linear(30, 16)


CHANGES = {
    "approximate GELU": lambda unit: setattr(unit.mlp[1], "approximate", "tanh"),
    "norm without bias": lambda unit: setattr(unit, "norm1", nn.LayerNorm(16, bias=False)),
    "bias of queries": lambda unit: setattr(unit.attention, "qkv", nn.Linear(16, 48)),
    "hidden layer that is no multiple of 4": narrowed,
    "another attend": lambda unit: setattr(unit, "attend", partial(torch.mul, 2.0)),
    "another attention": lambda unit: setattr(unit.attention, "forward", lambda tokens, _: tokens),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_unit_is_left_to_torch(name, kernel_runs):
    unit, x = made("FSA"), torch.randn(1, 16, 4, 6)
    CHANGES[name](unit)
    torch.testing.assert_close(unit(x).double(), in_float64(unit, x), rtol=2e-5, atol=2e-5)
    assert not kernel_runs


@torch.no_grad()
def test_a_plane_of_other_channels_gets_torchs_error(kernel_runs):
    with pytest.raises(RuntimeError, match="normalized_shape"):
        made("FSA", dim=8)(torch.randn(1, 16, 4, 6))
    assert not kernel_runs


@torch.no_grad()
def test_torchs_defaults_change_nothing(kernel_runs):
    unit, x = made("FSA"), torch.randn(1, 16, 4, 6)
    right = unit(x)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert torch.equal(unit(x), right)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(kernel_runs) == 2


@torch.no_grad()
def test_a_replaced_kernel_of_torch_is_taken(kernel_runs, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    made("FSA")(torch.randn(1, 16, 4, 6))
    assert not kernel_runs


@torch.no_grad()
def test_heads_of_two_channels_are_left_to_torch(kernel_runs):
    made("FSA", dim=16, heads=8)(torch.randn(1, 16, 4, 6))
    assert not kernel_runs


@torch.no_grad()
def test_transforms_of_functions_are_left_to_torch(kernel_runs):
    unit, x = made("FSA"), torch.randn(3, 1, 16, 4, 6)
    torch.testing.assert_close(torch.vmap(unit)(x)[1], unit(x[1]))
    assert len(kernel_runs) == 1


def test_a_prediction_sees_torchs_operators(kernel_runs):
    unit = made("FSA")

    def make_step():
        x = torch.randn(1, 16, 40, 60)

        def step():
            with torch.no_grad():
                unit(x)

        return step

    assert predict(make_step).peak > 40 * 60 * 64 * 4  # the hidden layer, which the kernel cuts up
    assert not kernel_runs


@torch.no_grad()
def test_without_numba_torch_does_it(monkeypatch):
    unit, x = made("TSA"), torch.randn(1, 16, 4, 6)
    lean = unit(x)
    monkeypatch.setattr(lean_inference, "_kernel", lambda: None)
    torch.testing.assert_close(lean, unit(x))


@torch.no_grad()
def test_views_and_leaves_with_gradients_work():
    unit = made("FSA")
    x = torch.randn(1, 4, 16, 6, requires_grad=True)
    torch.testing.assert_close(unit(x.transpose(1, 2)), in_float64(unit, x.transpose(1, 2)).float())
    leaf = torch.randn(1, 16, 4, 6, requires_grad=True)
    assert not unit(leaf).requires_grad


def test_the_functions_of_one_number_are_right():
    bits = np.linspace(-130, 127, 100_001, dtype=np.float32)
    powers = np.array([cpu_kernel.exp2(x) for x in bits[::50]])
    right = 2.0 ** np.maximum(bits[::50].astype(float), -126)
    assert np.abs(powers / right - 1).max() < 3e-7
    assert math.isnan(cpu_kernel.exp2(np.float32(math.nan)))
    x = np.linspace(-12, 12, 2001, dtype=np.float32)
    values = np.array([cpu_kernel.gelu(each) for each in x])
    right = F.gelu(torch.tensor(x, dtype=torch.float64)).numpy()
    assert np.abs(values - right).max() < 1e-6
