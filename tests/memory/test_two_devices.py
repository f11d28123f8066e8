"""Predictions of random programs that use a host and a GPU, against bytes of real tensors.

The oracle runs a program on real CPU tensors and keeps its own book of where each storage would
lie: a copy lies where it was copied to, every other result where its inputs lie.
"""

import random
from weakref import finalize

import pytest
import torch
import torch._dynamo  # before the heap is frozen
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from tfswa_lab.memory.predict import predict

pytestmark = pytest.mark.usefixtures("new_objects_only")

PROGRAMS = 200


class Book(TorchDispatchMode):
    """Bytes of the storages on each device, now and at most."""

    def __init__(self):
        super().__init__()
        self.places, self.now, self.most = {}, {"host": 0, "gpu": 0}, {"host": 0, "gpu": 0}
        self.target = None  # where the result of a copy goes

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        inputs = {
            self.places.get(x.untyped_storage()._cdata, "host")
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        result = operator(*args, **(kwargs or {}))
        place = self.target or ("gpu" if "gpu" in inputs else "host")
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.places:
                self.enter(x.untyped_storage(), place)
        return result

    def enter(self, storage, place):
        key, size = storage._cdata, storage.nbytes()
        size = -(-size // 512) * 512 if place == "gpu" else size
        self.places[key] = place
        self.now[place] += size
        self.most[place] = max(self.most[place], self.now[place])
        finalize(storage, self.leave, key, place, size)

    def leave(self, key, place, size):
        del self.places[key]
        self.now[place] -= size


class Move(torch.autograd.Function):
    """A copy whose gradient is copied back."""

    @staticmethod
    def forward(ctx, to, x, place, dtype):
        ctx.back = to, to.place(x), x.dtype
        return to.copy(x, place, dtype)

    @staticmethod
    def backward(ctx, grad):
        to, place, dtype = ctx.back
        return None, to.copy(grad, place, dtype), None, None


class RealTorch:
    """A program's moves, made with real tensors."""

    def __init__(self, book):
        self.book = book

    def on(self, place, function):
        self.book.target = place
        try:
            return function()
        finally:
            self.book.target = None

    def place(self, x):
        return self.book.places.get(x.untyped_storage()._cdata, "host")

    def move(self, x, place, dtype=None):
        dtype = dtype or x.dtype
        if self.place(x) == place:
            return x.to(dtype)
        return Move.apply(self, x, place, dtype)

    def copy(self, x, place, dtype):
        return self.on(place, lambda: x.to(dtype, copy=True))

    def new(self, shape, place, grad=False):
        return self.on(place, lambda: torch.randn(shape, requires_grad=grad))

    def pin(self, x):
        return x.clone()

    def module(self, module):
        for p in module.parameters():
            p.data = self.move(p.data, "gpu")
        return module


class FakeTorch:
    """The same moves as a user writes them."""

    def move(self, x, place, dtype=None):
        device = {"gpu": "cuda", "host": "cpu"}[place]
        if dtype is None:
            return x.cuda() if place == "gpu" else x.cpu()
        return x.to(device, dtype)

    def new(self, shape, place, grad=False):
        return torch.randn(shape, device={"gpu": "cuda:0", "host": None}[place], requires_grad=grad)

    def pin(self, x):
        return x.pin_memory()

    def module(self, module):
        return module.cuda()


def program(seed):
    """A program that is drawn once: it returns what `predict` takes, for one of the two torches."""

    def make(to):
        draw = random.Random(seed)
        width = 8 * draw.randint(1, 12)
        net = to.module(nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)))
        data = to.new((draw.randint(20, 60), width), "host")
        kept = {"weight": to.new((width, width), draw.choice(["gpu", "host"]), grad=True)}
        plan = [draw.randrange(len(CHANGES)) for _ in range(draw.randint(3, 9))]
        rows, loops = draw.randint(4, 16), draw.randint(1, 3)
        casts = draw.random() < 0.3
        checkpoints, pins, keeps = (draw.random() < 0.5 for _ in range(3))
        keeps_place = draw.choice(["gpu", "host"])

        def step():
            for k in range(loops):
                x = data[k : k + rows]
                x = to.move(to.pin(x) if pins else x, "gpu", torch.float64 if casts else None)
                x = to.move(x, "gpu", torch.float32) if casts else x
                x = checkpoint(net, x, use_reentrant=False) if checkpoints else net(x)
                x = x @ to.move(kept["weight"], "gpu")
                for number in plan:
                    x = CHANGES[number](x, to)
                x.square().mean().backward()
                if keeps:
                    kept[k] = to.move(x.detach()[: rows // 2], keeps_place)

        return step

    return make


def there_and_back(x, to):
    return to.move(to.move(x, "host") * 2, "gpu")


CHANGES = [
    lambda x, to: x.relu(),
    lambda x, to: x + x.mean(0),
    lambda x, to: x.t().contiguous().t(),
    lambda x, to: torch.cat([x, x[:2]]),
    lambda x, to: x[1:] if len(x) > 3 else x,
    lambda x, to: x.reshape(-1, 2, x.shape[1] // 2).flatten(1),
    lambda x, to: to.move(to.move(x, "gpu", torch.float64).exp(), "gpu", torch.float32),
    lambda x, to: x * to.new(x.shape, "gpu"),
    lambda x, to: x * to.move(to.new(x.shape, "host"), "gpu"),
    there_and_back,
]


@pytest.mark.parametrize("first", range(0, PROGRAMS, 25))
def test_peaks_on_both_devices_are_the_bytes_of_real_tensors(first):
    for seed in range(first, first + 25):
        with Book() as book:
            step = program(seed)(RealTorch(book))
            for _ in range(2):
                step()
        predicted = predict(lambda seed=seed: program(seed)(FakeTorch()))
        found = {"gpu": predicted.peak, "host": predicted.host.allocated}
        assert found == book.most, seed
