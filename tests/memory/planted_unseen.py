"""Planted scripts that were written when the rules were finished, to try these on."""

from __future__ import annotations

import collections
import functools
import itertools
import random
import sys
import types

import numpy as np
import torch
from planted import (
    CACHE,
    CYCLE,
    DUPLICATED,
    FRAMES,
    GRAPH,
    HEALTHY,
    HOOKS,
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

UNSEEN = []
planted = planter(UNSEEN)


@planted(TENSORS, words=("tape",))
def script_in_a_namespace():
    code = """
import torch
model = torch.nn.Linear(32, 4)
tape = {}
def step(i):
    with torch.no_grad():
        tape[i, "logits"] = model(torch.randn(8, 32))
"""
    space = {"__name__": "script"}
    exec(compile(code, "script.py", "exec"), space)
    return space["step"]


@planted(GRAPH, words=("rewards",))
def policy_gradient_over_all_episodes():
    class Agent:
        def __init__(self):
            self.policy, self.rewards = network(), collections.defaultdict(list)

        def act(self):
            probs = self.policy(batch(1)).softmax(-1)
            self.rewards["log_p"].append(probs[0, int(probs.argmax())].log())

    agent = Agent()
    return agent.act


@planted(TENSORS, words=("args",))
def partial_with_a_list():
    confusion = []

    def evaluate(model, matrix):
        with torch.inference_mode():
            matrix.append(torch.bincount(model(batch(64)).argmax(1), minlength=32))

    return functools.partial(evaluate, network(), confusion)


@planted(TENSORS, words=("registry",))
def class_level_registry():
    class Feature:
        registry = {}

        def __init__(self, value):
            self.value = value
            Feature.registry[id(self)] = self

    def step():
        Feature(batch().mean(0))

    return step


@planted(TENSORS, words=("buffer",))
def buffer_that_is_concatenated():
    class Streaming(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("buffer", torch.zeros(1, 0, 32))

        def forward(self, x):
            self.buffer = torch.cat((self.buffer, x[None]), 1)
            return self.buffer.mean()

    model = Streaming()

    def step():
        with torch.no_grad():
            model(batch())

    return step, {"model": model}


@planted(GRAPH, words=("state",))
def truncated_backprop_forgot_to_detach():
    lstm, head = nn.LSTM(32, 16), nn.Linear(16, 1)
    state = None

    def step():
        nonlocal state
        y, state = lstm(torch.randn(4, 2, 32), state)
        return head(y).mean().item()

    return step


@planted(FRAMES, words=("last_value",))
def interpreter_keeps_the_last_error():
    model = network()

    def step():
        try:
            y = model(batch(128))
            y.reshape(7, -1)
        except RuntimeError as error:
            sys.last_value = error

    return step


@planted(HOOKS, words=("hook",))
def optimizer_hook_in_each_epoch():
    training = Training(optimizer=torch.optim.Adam)

    def step(epoch):
        if epoch % 2 == 0:
            rate = torch.full((16,), 0.1)
            training.optimizer.register_step_post_hook(lambda opt, args, kw: rate.mul_(0.9))
        training()

    return step, {"model": training.model, "optimizer": training.optimizer}


@planted(CYCLE, words=("owner",))
def blocks_that_know_their_model():
    class Block:
        def __init__(self, owner):
            self.owner, self.scale = owner, torch.ones(64)

    class Model:
        def __init__(self):
            self.blocks = {name: Block(self) for name in "ab"}

    def step(i):
        if i % 2:
            Model()

    return step


@planted(HOST, words=("events",))
def events_logged_as_dictionaries():
    events, training = collections.deque(), Training()

    def step(i):
        training()
        for name in training.model.state_dict():
            events.append({"name": f"{name}@{i}", "values": [random.random() for _ in range(30)]})

    return step


@planted(GRAPH, words=("running", "graph"))
def running_mean_of_losses():
    class Meter:
        running = 0.0

        def update(self, value):
            self.running = 0.99 * self.running + 0.01 * value

    meter, training = Meter(), Training()
    return lambda: meter.update(training.update(training.loss()))


@planted(CACHE, words=("masks",))
def masks_by_shape():
    masks, model = {}, network()

    def step():
        x = batch(random.randrange(2, 60))
        if x.shape not in masks:
            masks[x.shape] = torch.ones(x.shape[0], x.shape[0]).tril()
        with torch.no_grad():
            return (masks[x.shape] @ model(x)).sum().item()

    random.seed(1)
    return step


@planted(CACHE, HEALTHY, words=("best",))
def best_three_checkpoints():
    best, model = [], network()

    def step(i):
        score = random.random()
        best.append((score, {k: v.clone() for k, v in model.state_dict().items()}))
        best.sort(key=lambda pair: -pair[0])
        del best[3:]

    random.seed(2)
    return step


@planted(WARM_UP)
def layers_built_on_first_uses():
    layers = {}

    def step(i):
        size = min(i, 2)
        if size not in layers:
            layers[size] = nn.Linear(32, 8 * (size + 1))
        with torch.no_grad():
            layers[size](batch())

    return step


@planted(HEALTHY)
def amp_and_scheduler_and_clipping():
    training = Training(optimizer=torch.optim.AdamW)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(training.optimizer, 100)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = training.loss()
        training.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
        training.optimizer.step()
        schedule.step()

    return step


@planted(HEALTHY)
def loader_with_epochs():
    data = torch.utils.data.TensorDataset(torch.randn(40, 32))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    training = Training()

    def batches():
        while True:
            yield from loader

    stream = batches()

    def step():
        (x,) = next(stream)
        training.update(training.model(x).square().mean())

    return step


@planted(HEALTHY)
def longer_and_longer_clips():
    class Curriculum(Training):
        def __call__(self, i):
            self.prediction = self.model(batch(8 + 4 * i)).detach()

    return Curriculum()


@planted(HEALTHY)
def average_of_weights():
    training = Training()
    average = torch.optim.swa_utils.AveragedModel(training.model)

    def step():
        training()
        average.update_parameters(training.model)

    return step


@planted(PEAK)
def limit_that_is_too_low():
    training = Training()
    return lambda: training.update(training.loss(2_000)), {"limit": 500_000}


@planted(DUPLICATED, words=("ensemble",))
def networks_trained_and_collected():
    ensemble = types.SimpleNamespace(members=[])

    def step(i):
        if i % 2:
            training = Training(optimizer=functools.partial(torch.optim.SGD, momentum=0.9))
            training()
            ensemble.members.append(training.model)

    return step


@planted(TENSORS, words=("columns",))
def columns_of_a_large_matrix():
    columns = {}

    def step(i):
        spectrum = torch.stft(torch.randn(4_000), 256, window=torch.ones(256), return_complex=True)
        columns[f"frame {i}"] = spectrum[:, 3].numpy()

    return step


@planted(FRAMES, words=("pending", "keep"))
def coroutines_that_never_end():
    pending = []

    @types.coroutine
    def suspended():
        yield

    async def keep(x):
        await suspended()
        return x

    def step():
        coroutine = keep(batch())
        coroutine.send(None)
        pending.append(coroutine)

    return step


@planted(TENSORS, words=("tee",))
def tee_that_runs_ahead():
    def stream():
        while True:
            yield batch()

    first, second = itertools.tee(stream())

    def step():
        next(first)
        return second

    return step


@planted(HOST, words=("planted_unseen.py",))
def features_stacked_in_numpy():
    class Store:
        table = np.zeros((0, 256))

    def step(i):
        Store.table = np.vstack([Store.table, np.full((4, 256), float(i))])

    return step
