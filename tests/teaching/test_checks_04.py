"""Checks of lesson 04: right answers pass, and each usual mistake gets its own hint."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tfswa_lab.teaching.checks.lesson_04 import check_field, check_lean, check_turn, measured_field


@pytest.mark.parametrize(("kernel_size", "num_blocks"), [(1, 1), (2, 1), (5, 2), (8, 3)])
def test_the_measured_field_is_that_of_two_convolution_pairs_a_block(kernel_size, num_blocks):
    assert measured_field(kernel_size, num_blocks) == 2 * num_blocks * (kernel_size - 1)


def test_checks_leave_the_random_state_alone():
    before = torch.get_rng_state()
    check_field(lambda kernel_size, num_blocks: 0)
    check_lean(lambda module, x: module(x))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_field_by_formula_passes():
    assert check_field(lambda kernel_size, num_blocks: 2 * num_blocks * (kernel_size - 1))


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda k, n: 0, "kernel 4, 1 blocks: expected 6, got 0"),
        (lambda k, n: None, "expected a number"),
        (lambda k, n: n * (k - 1), "two feed-forward networks"),
        (lambda k, n: 4 * n * (k - 1), "the time path links no bins"),
        (lambda k, n: 4 * n * (k - 1) + 1, "question is about one side"),
        (lambda k, n: 2 * n * k, "a kernel of 1 reaches no neighbour"),
    ],
)
def test_usual_mistakes_about_the_field_are_named(answer, hint, capsys):
    assert not check_field(answer)
    assert hint in capsys.readouterr().out


def turn(x, positions, base=10_000.0, step=2, sign=1, cast=True, angle_dtype=torch.float32):
    """One pair at a time, with real numbers only."""
    turned, width = torch.empty(x.shape, dtype=x.dtype if cast else torch.float32), x.shape[-1]
    for i in range(width // 2):
        angle = positions.to(angle_dtype) * sign * base ** (-step * i / width)
        cos, sin = angle.cos(), angle.sin()
        if cast:
            cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        one, two = x[..., 2 * i], x[..., 2 * i + 1]
        turned[..., 2 * i] = cos * one - sin * two
        turned[..., 2 * i + 1] = sin * one + cos * two
    return turned


def turn_halves(x, positions):
    """The other convention: channel i with channel i + d/2."""
    neighbours = torch.stack(x.chunk(2, -1), -1).flatten(-2)
    return torch.cat(turn(neighbours, positions).unflatten(-1, (-1, 2)).unbind(-1), -1)


def test_pairs_turned_one_by_one_pass():
    assert check_turn(turn)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda x, positions: None, "expected an array of shape (2, 9, 6)"),
        (lambda x, positions: x, "positions from 0: right shape, but values differ"),
        (lambda x, positions: turn(x, positions, sign=-1), "you turn the other way"),
        (lambda x, positions: turn(x, positions, step=1), "2i/d, not i/d"),
        (turn_halves, "channels i and i + d/2"),
        (lambda x, positions: turn(x, torch.arange(9)), "positions need not start at 0"),
        (lambda x, positions: turn(x, positions, cast=False), "bfloat16 came back as torch.float"),
        (lambda x, positions: turn(x, positions, angle_dtype=x.dtype), "angles in float32"),
    ],
)
def test_usual_mistakes_in_turning_are_named(answer, hint, capsys):
    assert not check_turn(answer)
    assert hint in capsys.readouterr().out


class Lean(torch.autograd.Function):
    """Activation checkpointing; a sign to be got wrong, weights to be forgotten."""

    @staticmethod
    def forward(ctx, module, sign, x, *weights):
        ctx.module, ctx.sign, ctx.weights = module, sign, weights
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.module(x)
        return None, None, *torch.autograd.grad(output, (x, *ctx.weights), ctx.sign * gradient)


def lean(module, x):
    return Lean.apply(module, 1, x, *module.parameters())


class Hoarder(torch.autograd.Function):
    """Keeps the whole graph, hidden in an attribute."""

    @staticmethod
    def forward(ctx, module, x, *weights):
        ctx.x = x.detach().requires_grad_()
        with torch.enable_grad():
            ctx.output = module(ctx.x)
        return ctx.output.detach()

    @staticmethod
    def backward(ctx, gradient):
        ctx.output.backward(gradient)
        return None, ctx.x.grad, *(None for _ in ctx.needs_input_grad[2:])


def test_a_function_that_keeps_its_input_passes():
    assert check_lean(lean)


def test_torchs_own_checkpoint_passes():
    assert check_lean(lambda module, x: checkpoint(module, x, use_reentrant=False))


def some_weights_forgotten(module, x):
    return Lean.apply(module, 1, x, *list(module.parameters())[:3])


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda module, x: None, "forward: expected an array"),
        (lambda module, x: 2 * lean(module, x), "forward: right shape"),
        (lambda module, x: module(x), "bytes are kept besides the input"),
        (lambda module, x: module(x).detach(), "no gradient comes back"),
        (
            lambda module, x: checkpoint(module, x, use_reentrant=True),
            "must also be given the parameters",
        ),
        (
            lambda module, x: Hoarder.apply(module, x, *module.parameters()),
            "bytes are kept besides the input",
        ),
        (some_weights_forgotten, "some parameter, or the input, has no gradient"),
        (
            lambda module, x: Lean.apply(module, -1, x, *module.parameters()),
            "gradients: right shape, but values differ",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_usual_mistakes_in_checkpointing_are_named(answer, hint, capsys):
    assert not check_lean(answer)
    assert hint in capsys.readouterr().out
