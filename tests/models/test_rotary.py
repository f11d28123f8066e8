"""Rotary positions against complex numbers; attention that stays with the fused kernels."""

import cmath
import gc
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from tfswa_lab.models.rotary import RotaryAttention, rotary_angles, rotate

FLASH = "_scaled_dot_product_flash_attention_for_cpu"


def turned_by_complex_numbers(x):
    """Pairs of channels as complex numbers times `exp(i · position · frequency)`, one by one."""
    length, width = x.shape
    rows = []
    for position in range(length):
        row = []
        for i in range(width // 2):
            z = complex(x[position, 2 * i], x[position, 2 * i + 1])
            z *= cmath.exp(1j * position / 10_000 ** (2 * i / width))
            row += [z.real, z.imag]
        rows.append(row)
    return torch.tensor(rows, dtype=x.dtype)


@pytest.mark.parametrize("width", [2, 6, 32])
def test_rotation_equals_multiplication_by_complex_numbers(width):
    torch.manual_seed(0)
    x = torch.randn(50, width, dtype=torch.float64)
    turned = rotate(x, rotary_angles(50, width, torch.float64))
    torch.testing.assert_close(turned, turned_by_complex_numbers(x), atol=1e-12, rtol=0)


def test_scores_depend_on_the_distance_only():
    torch.manual_seed(0)
    query, key = torch.randn(2, 8, dtype=torch.float64)
    angles = rotary_angles(300, 8, torch.float64)
    scores = rotate(query.expand(300, 8), angles) @ rotate(key.expand(300, 8), angles).T
    for distance in (-120, -1, 0, 1, 7, 299):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores[0].std() > 0.1  # and do depend on it


def test_far_positions_stay_apart_in_half_precision():
    """Angles computed in bfloat16 would give positions 2000 to 2007 one angle."""
    x = torch.ones(2008, 2, dtype=torch.bfloat16)
    far = rotate(x, rotary_angles(2008, 2))[2000:]
    exact = rotate(x.double(), rotary_angles(2008, 2, torch.float64))[2000:]
    assert (far.double() - exact).abs().max() < 0.02
    assert len({tuple(row) for row in far.tolist()}) == 8


def attention_by_hand(unit, tokens):
    """One sequence, one head and one query at a time."""
    query, key, value = unit.qkv(tokens).chunk(3, dim=-1)
    width = query.shape[-1] // unit.num_heads
    outputs = torch.zeros_like(query)
    for sequence in range(len(tokens)):
        for head in range(unit.num_heads):
            d = slice(head * width, (head + 1) * width)
            q = turned_by_complex_numbers(query[sequence, :, d])
            k = turned_by_complex_numbers(key[sequence, :, d])
            for place, one in enumerate(q):
                weights = (k @ one / math.sqrt(width)).exp()
                outputs[sequence, place, d] = weights / weights.sum() @ value[sequence, :, d]
    return unit.proj(outputs)


@torch.no_grad()
def test_attention_equals_the_formula_by_hand():
    torch.manual_seed(0)
    unit = RotaryAttention(dim=10, attention_dim=12, num_heads=2).double()
    tokens = torch.randn(3, 9, 10, dtype=torch.float64)
    torch.testing.assert_close(unit(tokens), attention_by_hand(unit, tokens))


class Operations(TorchDispatchMode):
    """The names of all operations that run while this is open."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_under_autocast_query_key_and_value_all_arrive_in_bfloat16(monkeypatch):
    arrived = []
    fused = F.scaled_dot_product_attention

    def spy(query, key, value, **options):
        arrived.extend(x.dtype for x in (query, key, value))
        return fused(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    unit = RotaryAttention(8, 8, 2)
    with torch.autocast("cpu", torch.bfloat16):
        unit(torch.randn(2, 5, 8))
    assert arrived == [torch.bfloat16] * 3
    arrived.clear()
    unit(torch.randn(2, 5, 8))
    assert arrived == [torch.float32] * 3


@pytest.mark.parametrize("mixed", [False, True])
def test_the_flash_kernel_takes_it_forth_and_back(mixed):
    torch.manual_seed(0)
    unit = RotaryAttention(8, 16, 2)
    tokens = torch.randn(3, 50, 8, requires_grad=True)
    precision = torch.autocast("cpu", torch.bfloat16, enabled=mixed)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), precision, Operations() as seen:
        unit(tokens).float().square().sum().backward()
    assert {FLASH, f"{FLASH}_backward"} <= seen.names
    assert not {"softmax", "_softmax", "_safe_softmax"} & seen.names


def test_on_a_cpu_attention_dropout_has_no_fused_kernel():
    """As the docstring says; if torch ever gets one, this test tells."""
    unit = RotaryAttention(8, 16, 2, dropout=0.1)
    with Operations() as seen:
        unit(torch.randn(3, 50, 8))
    assert FLASH not in seen.names
    with Operations() as seen:
        unit.eval()(torch.randn(3, 50, 8))
    assert FLASH in seen.names


def test_nothing_wider_than_a_query_is_kept_for_the_backward_pass():
    """A view of the joint projection would keep all three thirds of it."""
    unit = RotaryAttention(dim=8, attention_dim=16, num_heads=2)
    kept = []

    def pack(tensor):
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        unit(torch.randn(3, 50, 8))
    assert max(kept) == 3 * 50 * 16 * 4


def test_no_length_leaves_anything_behind():
    unit = RotaryAttention(8, 8, 2)
    assert set(unit.state_dict()) == {"qkv.weight", "proj.weight"}

    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    with torch.no_grad():
        unit(torch.randn(1, 7, 8))
        before = tensors()
        for length in range(1, 40):
            unit(torch.randn(1, length, 8))
    assert tensors() <= before  # others' may go meanwhile
    assert not list(unit.buffers())


@pytest.mark.parametrize(
    ("attention_dim", "num_heads", "message"),
    [(10, 4, "attention_dim=10 cannot be split into num_heads=4"), (12, 4, "odd width 3")],
)
def test_heads_that_cannot_turn_are_refused(attention_dim, num_heads, message):
    with pytest.raises(ValueError, match=message):
        RotaryAttention(8, attention_dim, num_heads)
