"""A second set that was written after the first unseen one had been fixed."""

from __future__ import annotations

import ctypes
import io
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import torch
from planted import (
    CACHE,
    CYCLE,
    DUPLICATED,
    FRAMES,
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
from torch.utils.checkpoint import checkpoint

SECOND = []
planted = planter(SECOND)


@planted(TENSORS, words=("keys",))
def decoder_that_keeps_all_keys():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.keys = nn.Linear(32, 96), []

        @torch.inference_mode()
        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            self.keys.append(k)
            return nn.functional.scaled_dot_product_attention(q, torch.stack(self.keys).mean(0), v)

    model = Attention()
    return lambda: model(torch.randn(1, 2, 8, 32))


@planted(GRAPH, words=("curves",))
def checkpointed_losses_kept():
    model, curves = network(), {"train": [], "valid": []}

    def step():
        x = batch().requires_grad_()
        curves["valid"].append(checkpoint(model, x, use_reentrant=False).square().sum())

    return step


@planted(TENSORS, words=("futures",))
def futures_kept():
    pool, futures, model = ThreadPoolExecutor(1), [], network()

    def infer(x):
        with torch.no_grad():
            return model(x)

    def step():
        future = pool.submit(infer, batch())
        future.result()
        futures.append(future)

    return step


@planted(TENSORS, words=("cleanup",))
def callbacks_on_an_exit_stack():
    cleanup = ExitStack()

    def step():
        x = batch()
        cleanup.callback(x.zero_)

    return step


@planted(HEALTHY)
def gradients_captured_by_name():
    training, seen = Training(), {}
    for name, parameter in training.model.named_parameters():
        parameter.register_hook(lambda grad, name=name: seen.__setitem__(name, grad.clone()))
    return training


@planted(CACHE, HEALTHY, words=("cache",))
def own_lru_of_ten():
    cache = OrderedDict()

    def step(i):
        cache[i] = batch().mean(1)
        if len(cache) > 10:
            cache.popitem(last=False)

    return step


@planted(FRAMES, words=("__cause__",))
def errors_that_cause_each_other():
    failure = None

    def attempt():
        x = batch()
        raise ValueError(f"{tuple(x.shape)}") from failure

    def step():
        nonlocal failure
        try:
            attempt()
        except ValueError as error:
            failure = error

    return step


@planted(DUPLICATED, words=("prompts",))
def parameters_appended_to_a_model():
    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.prompts = network(), nn.ParameterList()

        def forward(self, x):
            self.prompts.append(nn.Parameter(torch.zeros(32)))
            return self.net(x + sum(self.prompts))

    model = Prompted()
    return lambda: model(batch()).sum().backward()


@planted(TENSORS, words=("rows",))
def rows_as_small_tensors():
    rows = []

    def step(i):
        rows.append(torch.tensor([float(i), 2.0 * i, 0.5]))

    return step


@planted(TENSORS, words=("seen",))
def tensors_as_keys():
    seen, training = set(), Training()

    def step():
        seen.add(training.update(training.loss()).detach())

    return step


@planted(HEALTHY)
def weak_set_of_activations():
    alive, training = weakref.WeakSet(), Training()

    def step():
        loss = training.loss()
        alive.add(loss)
        training.update(loss)

    return step


@planted(HOST, words=("planted_second.py",))
def log_in_memory():
    log, training = io.StringIO(), Training()

    def step(i):
        training()
        for name, value in training.model.state_dict().items():
            log.write(f"{i} {name} {value.tolist()}\n")

    return step


@planted(HOST)
def lost_by_c():
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]

    def step():
        size = 400_000
        ctypes.memset(libc.malloc(size), 1, size)
        batch().sum()

    return step


@planted(TENSORS, words=("embeddings",))
def every_tenth_step():
    embeddings, training = [], Training()

    def step(i):
        training()
        if i % 10 == 9:
            with torch.no_grad():
                embeddings.append(training.model(batch()))

    return step


@planted(HEALTHY, CACHE)
def context_reset_after_sixteen():
    context = torch.zeros(0, 32)

    def step(i):
        nonlocal context
        context = batch(1) if i % 16 == 0 else torch.cat([context, batch(1)])

    return step


@planted(GRAPH, TENSORS, words=("teacher",))
def exponential_average_with_graph():
    student, teacher = network(), {}

    def step():
        for name, weight in student.named_parameters():
            old = teacher.get(name, weight)
            teacher[name] = 0.9 * old + 0.1 * weight * weight.mean()
        student(batch()).sum().item()

    return step


@planted(CYCLE, words=("callback",))
def callback_bound_to_its_owner():
    class Loop:
        def __init__(self):
            self.data, self.callback = batch(64), self.finish

        def finish(self):
            return self.data.sum()

    return lambda: Loop().finish().item()


@planted(HEALTHY, WARM_UP)
def compiled_lazily():
    model = nn.Sequential(nn.LazyLinear(64), nn.ReLU(), nn.LazyLinear(32))
    model(batch())
    return Training(model)


@planted(PEAK)
def everything_in_one_batch():
    model = network()

    def step():
        model(batch(20_000)).square().mean().backward()
        model.zero_grad()

    return step


@planted(HEALTHY)
def second_order_without_keeping():
    model = network()

    def step():
        x = batch().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (model(x).mean() + grad.square().mean()).backward()
        model.zero_grad()

    return step
