"""Checks of lesson 04: how far convolutions reach, turn by position, keep only the input.

Axis letters: `c` channels, `t` frames, `f` frequency bins, `l` tokens of one sequence, `d` width.

Notebook: 04_tf_locoformer
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tfswa_lab.models.tf_locoformer import LocoformerLayer, TFLocoformerBlock, TimePath
from tfswa_lab.teaching.checks import mismatch, mismatch_or_mistake, verdict

LAYER = {
    "dim": 8,
    "hidden_dim": 6,
    "num_heads": 2,
    "attention_dim": 8,
    "num_groups": 2,
    "dropout": 0.0,
}


class Silent(nn.Module):
    """An attention that attends to nothing."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Zeros of the shape of `tokens`."""
        return torch.zeros_like(tokens)


def silence_attention(network: nn.Module) -> nn.Module:
    """Replace every attention of `network`, in place, so that only convolutions link tokens."""
    for layer in network.modules():
        if isinstance(layer, LocoformerLayer):
            layer.attention = Silent()
    return network


def check_field(field: Callable[[int, int], object]) -> bool:
    """Exercise 1: `field(kernel_size, num_blocks)` bins on each side, without attention."""
    for kernel_size, num_blocks in [(4, 1), (8, 1), (4, 3), (1, 2)]:
        if hint := _field_hint(field(kernel_size, num_blocks), kernel_size, num_blocks):
            where = f"kernel {kernel_size}, {num_blocks} blocks"
            return verdict("field", f"{where}: {hint}")
    return verdict("field", None)


def _field_hint(got: object, kernel_size: int, num_blocks: int) -> str | None:
    expected = measured_field(kernel_size, num_blocks)
    mistakes = {
        "a path has two feed-forward networks": expected / 2,
        "the time path links no bins": 2 * expected,
        "that is the whole field; the question is about one side": 2 * expected + 1,
        "a kernel of 1 reaches no neighbour at all": 2 * num_blocks * kernel_size,
    }
    return mismatch_or_mistake(got, expected, mistakes)


def measured_field(kernel_size: int, num_blocks: int) -> int:
    """The largest distance in bins at which the gradient of an output cell is not 0."""
    middle = 2 * num_blocks * kernel_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = (TFLocoformerBlock(kernel_size=kernel_size, **LAYER) for _ in range(num_blocks))
        network = silence_attention(nn.Sequential(*blocks)).double()
        x = torch.randn(1, 8, 1, 2 * middle + 1, dtype=torch.float64, requires_grad=True)
    network(x)[..., middle].sum().backward()
    return middle - int(x.grad.abs().sum((0, 1, 2)).nonzero()[0])


def check_turn(turn: Callable[[Tensor, Tensor], object]) -> bool:
    """Exercise 2: `turn(x, positions)` turns neighbouring pairs of channels `(…, l, d)`."""
    generator = torch.Generator().manual_seed(0)
    for start in (0, 2000):  # large angles are equal in half precision
        positions = torch.arange(start, start + 9)
        x = torch.randn(2, 9, 6, generator=generator)
        if hint := _turn_hint(turn(x.clone(), positions), x, positions):
            return verdict("turn", f"positions from {start}: {hint}")
    half = x.bfloat16()
    got = turn(half.clone(), positions)
    if got.dtype != half.dtype:
        return verdict("turn", f"bfloat16 came back as {got.dtype}; cast cosine and sine")
    if mismatch(got.float(), _turned(half.float(), positions), 0.02):
        return verdict("turn", "bfloat16: compute the angles in float32, then cast")
    return verdict("turn", None)


def _turned(x: Tensor, positions: Tensor, base: float = 10_000.0, step: int = 2) -> Tensor:
    """By complex numbers, in double precision; the pair at channel p has frequency base^(-p/d)."""
    width = x.shape[-1]
    channel = torch.arange(width // 2, dtype=torch.float64) * step
    angle = positions.double()[:, None] * base ** (-channel / width)  # (l, d/2)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.exp(1j * angle)).flatten(-2).float()


def _turn_hint(got: object, x: Tensor, positions: Tensor) -> str | None:
    halves = torch.stack(x.chunk(2, -1), -1).flatten(-2)  # channel i beside channel i + d/2
    turned_halves = torch.cat(_turned(halves, positions).unflatten(-1, (-1, 2)).unbind(-1), -1)
    mistakes = {
        "you turn the other way: y = x·exp(+iφ)": _turned(x, -positions),
        "pair i has exponent 2i/d, not i/d": _turned(x, positions, step=1),
        "these are channels i and i + d/2; ours are neighbours, 2i and 2i + 1": turned_halves,
        "positions need not start at 0": _turned(x, torch.arange(len(positions))),
    }
    return mismatch_or_mistake(got, _turned(x, positions), mistakes, 1e-3)


def check_lean(lean: Callable[[nn.Module, Tensor], object]) -> bool:
    """Exercise 3: `lean(module, x)` is `module(x)`, keeping only `x` for the backward pass."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = TimePath(kernel_size=3, **LAYER).double()
        x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    for inner in (True, False):  # inside a network x has a gradient; the first part's may have none
        if hint := _lean_hint(lean, module, x.clone().requires_grad_(inner)):
            return verdict("lean", hint)
    return verdict("lean", None)


def _lean_hint(lean: Callable, module: nn.Module, x: Tensor) -> str | None:
    module.zero_grad()
    weights = list(module.parameters())
    wanted = [x, *weights] if x.requires_grad else weights
    expected = torch.autograd.grad(module(x).square().sum(), wanted)
    output, kept = _recorded(lean, module, x)
    if hint := mismatch(_values(output), _values(module(x))):
        return f"forward: {hint}"
    if not output.requires_grad:
        return "no gradient comes back; the function must also be given the parameters"
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *weights)}
    if extra := sum(count for pointer, count in kept.items() if pointer not in own):
        return f"{extra:,} bytes are kept besides the input, which has {x.nbytes:,}"
    output.square().sum().backward()
    gradients = [tensor.grad for tensor in wanted]
    if any(gradient is None for gradient in gradients):
        return "some parameter, or the input, has no gradient"
    pairs = zip(gradients, expected, strict=True)
    return next((f"gradients: {hint}" for pair in pairs if (hint := mismatch(*pair))), None)


def _recorded(lean: Callable, module: nn.Module, x: Tensor) -> tuple[object, dict[int, int]]:
    """Its result, and the size in bytes of each storage that autograd keeps, by address."""
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        return lean(module, x), kept


def _values(output: object) -> object:
    return output.detach() if isinstance(output, Tensor) else output
