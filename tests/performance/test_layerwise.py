"""One layer at a time: equal outputs, the same objects afterwards, and memory as predicted."""

import gc
import weakref

import pytest
import torch
from torch import nn

from tfswa_lab.performance.precision import (
    cast_module,
    largest_layer_bytes,
    layerwise,
    remove_layerwise,
)


class Mixed(nn.Module):
    """A parameter of the whole, lists of parameters, tied weights, a layer used twice, buffers."""

    def __init__(self, width=16):
        super().__init__()
        self.position = nn.Parameter(torch.rand(5, width))
        self.gains = nn.ParameterList(nn.Parameter(torch.rand(width)) for _ in range(2))
        self.block = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True)
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(width, width, 3, padding=1))
        self.old = nn.utils.weight_norm(nn.Conv1d(width, width, 3, padding=1))
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.both = nn.Sequential(self.first, self.second, self.first)
        self.register_buffer("scale", torch.rand(width))
        self.norm = nn.BatchNorm1d(width)
        self.norm.register_buffer("scale", self.scale)

    def forward(self, x):
        x = self.block(x + self.position) * self.gains[0] + self.gains[1]
        x = self.old(self.conv(x.transpose(1, 2)))
        x = self.norm(x).transpose(1, 2) * self.scale
        return self.both(self.lstm(x)[0])


@pytest.fixture
def mixed():
    torch.manual_seed(1)
    module = Mixed().eval()
    module.block.norm1.register_forward_hook(lambda *of: None)  # no fast path, as with hooks
    return module, torch.rand(2, 5, 16)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@torch.no_grad()
def test_outputs_are_equal_and_everything_is_the_same_object_afterwards(mixed):
    module, x = mixed
    expected = module(x)
    held = [*module.parameters(), *module.buffers()]
    hooks = [len(part._forward_hooks) for part in module.modules()]
    assert layerwise(module, "cpu") is module
    for _ in range(2):
        assert torch.equal(module(x), expected)
    with pytest.raises(ValueError, match="Mixed is layerwise already"):
        layerwise(module, "cpu")
    remove_layerwise(remove_layerwise(module))
    assert all(a is b for a, b in zip([*module.parameters(), *module.buffers()], held, strict=True))
    assert hooks == [len(part._forward_hooks) for part in module.modules()]
    assert module.second.weight is module.first.weight
    assert module.norm.scale is module.scale
    assert torch.equal(module(x), expected)
    assert torch.equal(layerwise(module, "cpu")(x), expected)


class Watched(nn.Module):
    """Says which weights are on the device whenever it runs."""

    def __init__(self, seen, inside=None):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))
        self.register_buffer("runs", torch.zeros(()))
        self.inside, self.seen = inside, seen

    def forward(self, x):
        self.runs += 1
        self.seen.append([p.dtype for p in self.root.parameters()])
        if x.isnan().any():
            raise ValueError("no numbers")
        return self.inside(x) if self.inside is not None else x * self.weight


def on_the_device(monkeypatch):
    """Without a GPU: what is on "the device" is float64 instead of float32."""
    to = torch.Tensor.to

    def moved(tensor, *where):
        gone = where == (torch.device("cuda"),)
        return to(tensor, torch.float64) if gone else to(tensor, *where)

    monkeypatch.setattr(torch.Tensor, "to", moved)


@torch.no_grad()
def test_one_layer_is_there_at_a_time_and_changed_buffers_come_home(monkeypatch):
    on_the_device(monkeypatch)
    seen = []
    root = nn.Sequential(Watched(seen), Watched(seen, inside=Watched(seen)), Watched(seen))
    for part in root.modules():
        object.__setattr__(part, "root", root)
    layerwise(root, "cuda")
    there, here = torch.float64, torch.float32
    root(torch.ones(3))
    assert seen == [
        [there, here, here, here],
        [here, there, here, here],
        [here, there, there, here],
        [here, here, here, there],
    ]
    assert [buffer.item() for buffer in root.buffers()] == [1, 1, 1, 1]
    assert {x.dtype for x in (*root.parameters(), *root.buffers())} == {here}
    with pytest.raises(ValueError, match="no numbers"):
        root(torch.full((3,), torch.nan))
    assert {x.dtype for x in (*root.parameters(), *root.buffers())} == {here}


@torch.no_grad()
def test_ctrl_c_leaves_nothing_there_once_the_hooks_are_gone(monkeypatch):
    on_the_device(monkeypatch)

    class Stopped(nn.Linear):
        def forward(self, x):
            raise KeyboardInterrupt

    root = layerwise(nn.Sequential(Stopped(3, 3)), "cuda")
    with pytest.raises(KeyboardInterrupt):
        root(torch.ones(3))
    remove_layerwise(root)
    assert root[0].weight.dtype == torch.float32


def test_gradients_are_refused_where_weights_leave():
    module = layerwise(nn.Linear(2, 2), "cuda")
    with pytest.raises(ValueError, match=r"use torch\.no_grad\(\)"):
        module(torch.ones(2))


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_the_largest_layer_counts_what_is_there_at_once():
    assert largest_layer_bytes(nn.Linear(3, 5)) == 4 * (15 + 5)
    assert largest_layer_bytes(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 9))) == 216
    attention = nn.MultiheadAttention(8, 2)
    assert largest_layer_bytes(attention) == sum(p.nbytes for p in attention.parameters())
    mixed = nn.Sequential(Mixed())
    always = sum(x.nbytes for x in (mixed[0].position, *mixed[0].gains, mixed[0].scale))
    attention = sum(x.nbytes for x in mixed[0].block.self_attn.parameters())
    assert largest_layer_bytes(mixed) == always + max(
        attention, largest_layer_bytes(nn.LSTM(16, 16))
    )


@torch.no_grad()
def test_half_precision_and_nothing_kept_alive():
    module = layerwise(cast_module(nn.Linear(4, 4), torch.float16), "cpu")
    assert module(torch.ones(4, dtype=torch.float16)).dtype == torch.float16
    weight = weakref.ref(module.weight)
    remove_layerwise(module)
    del module
    gc.collect()
    assert weight() is None
