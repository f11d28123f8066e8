"""Scripts that the rules once got wrong, found by judges who had not read the rules."""

from __future__ import annotations

import functools
import heapq
import io
import random

import torch
from planted import (
    CACHE,
    GRAPH,
    HEALTHY,
    HOST,
    PEAK,
    TENSORS,
    WARM_UP,
    Training,
    batch,
    network,
    planter,
)
from torch import nn
from torch.func import functional_call, grad, vmap

JUDGED = []
planted = planter(JUDGED)


@planted(HEALTHY, WARM_UP)
def lazy_layers():
    net = nn.Sequential(nn.LazyConv1d(16, 5), nn.ReLU(), nn.Flatten(), nn.LazyLinear(12))
    return lambda: net(torch.randn(4, 2, 64)).square().mean().backward()


@planted(HEALTHY)
def gradients_of_each_sample():
    net = network()
    weights = {name: weight.detach() for name, weight in net.named_parameters()}

    def loss(weights, x, y):
        return (functional_call(net, weights, (x[None],)) - y).square().mean()

    of_each = vmap(grad(loss), in_dims=(None, 0, 0))

    def step():
        for name, gradient in of_each(weights, batch(), batch()).items():
            weights[name] = weights[name] - 0.01 * gradient.mean(0)

    return step


@planted(HEALTHY, PEAK)
def convolutions_of_any_length():
    net = nn.Sequential(nn.Conv1d(1, 8, 16, 8), nn.PReLU(), nn.ConvTranspose1d(8, 1, 16, 8))
    training = Training(net, torch.optim.Adam)
    lengths = random.Random(1)

    def step():
        wave = torch.randn(2, 1, 8 * lengths.randint(50, 500))
        training.update(net(wave).abs().mean())

    return step


@planted(HEALTHY, WARM_UP, PEAK)
def bfloat16_of_any_length():
    training = Training(optimizer=torch.optim.AdamW)
    rows = random.Random(0)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = training.loss(rows.randint(2, 300)).float()
        training.update(loss)

    return step


@planted(CACHE, WARM_UP, HEALTHY)
def pool_that_one_line_fills_and_another_refreshes():
    class Pool:
        def __init__(self, size):
            self.size, self.images = size, []

        def query(self, image):
            if len(self.images) < self.size:
                self.images.append(image.clone())
                return image
            at = random.randrange(self.size)
            old, self.images[at] = self.images[at], image.clone()
            return old

    random.seed(0)
    pool = Pool(20)
    return lambda: pool.query(batch()).mean()


@planted(TENSORS, words=("bias",))
def lru_cache_of_ever_longer_inputs():
    @functools.cache
    def bias(length):
        at = torch.arange(length)
        return -(at[:, None] - at).abs().float()

    return lambda step: bias(40 + step).sum()


@planted(TENSORS, words=("bias_table",))
def table_of_ever_longer_inputs():
    class Alibi(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias_table = {}

        def forward(self, x):
            length = x.shape[1]
            if length not in self.bias_table:
                at = torch.arange(length)
                self.bias_table[length] = -(at[:, None] - at).abs().float()
            return x @ x.mT + self.bias_table[length]

    alibi = Alibi()
    return lambda step: alibi(torch.randn(1, 10 + step, 8)).sum().item()


@planted(GRAPH, words=("running", "nodes"))
def sum_of_losses_as_an_attribute():
    class Trainer(Training):
        running = 0.0

        def __call__(self):
            self.running += self.update(self.loss())

    return Trainer()


@planted(GRAPH, words=("losses",))
def losses_in_a_list_after_backward():
    training, losses = Training(), []
    return lambda: losses.append(training.update(training.loss()))


@planted(TENSORS, words=("by_name", "pins"))
def slices_of_arrays_of_tensors():
    net, by_name = network(), {}

    def step(i):
        with torch.no_grad():
            by_name[f"clip {i}"] = net(batch(64)).numpy()[:1].reshape(-1)

    return step


def serialized(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getvalue()


@planted(HEALTHY, WARM_UP, CACHE)
def the_four_best_checkpoints():
    training, best = Training(), []

    def step(i):
        loss = training.update(training.loss()).item()
        if i % 2 == 0:
            heapq.heappush(best, (-loss, i, serialized(training.model)))
            if len(best) > 4:
                heapq.heappop(best)

    return step


@planted(HOST, words=("saved",))
def every_checkpoint_as_bytes():
    class Checkpoints:
        def __init__(self):
            self.saved = {}

    training, checkpoints = Training(), Checkpoints()

    def step(i):
        training()
        checkpoints.saved[f"step {i}"] = serialized(training.model)

    return step


@planted(CACHE, WARM_UP, HEALTHY)
def pool_that_fills_late():
    random.seed(0)
    items, net = [], network()

    def step():
        fake = net(batch()).detach()
        if len(items) < 30:
            items.append(fake.clone())
        elif random.random() > 0.5:
            items[random.randrange(30)] = fake.clone()

    return step
