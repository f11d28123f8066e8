"""Planted scripts: tensors and graphs that pile up."""

from __future__ import annotations

import copy
import functools
import queue
from dataclasses import dataclass

import torch
from planted import DUPLICATED, GRAPH, HOOKS, TENSORS, Training, batch, network, planter
from torch import nn
from torch.nn import functional as F

TENSOR_LEAKS = []
planted = planter(TENSOR_LEAKS)
GLOBAL_OUTPUTS = []


@planted(GRAPH, words=("losses",))
def losses_kept():
    losses, training = [], Training()

    def step():
        losses.append(training.update(training.loss()))

    return step


@planted(TENSORS, words=("outputs",))
def detached_outputs_kept():
    outputs, training = [], Training()

    def step():
        y = training.model(batch())
        training.update(y.square().mean())
        outputs.append(y.detach())

    return step


@planted(TENSORS, words=("GLOBAL_OUTPUTS", "global"))
def outputs_kept_in_a_global():
    GLOBAL_OUTPUTS.clear()
    model = network()

    def step():
        with torch.no_grad():
            GLOBAL_OUTPUTS.append(model(batch()))

    return step


@planted(GRAPH, words=("val_losses",))
def validation_without_no_grad():
    val_losses, training = [], Training()

    def step(i):
        training()
        if i % 4 == 3:
            val_losses.append(training.loss())

    return step


@planted(GRAPH, words=("hidden",))
def hidden_state_not_detached():
    cell, hidden = nn.GRUCell(32, 32), torch.zeros(8, 32)

    def step():
        nonlocal hidden
        hidden = cell(batch(), hidden)
        hidden.mean().backward(retain_graph=True)

    return step


@planted(GRAPH, words=("kept",))
def retained_graph_with_its_loss():
    kept, training = [], Training()

    def step():
        loss = training.loss()
        loss.backward(retain_graph=True)
        kept.append(loss)

    return step


@planted(GRAPH, words=("total",))
def sum_of_losses_without_backward():
    model, total = network(), 0.0

    def step():
        nonlocal total
        total = total + model(batch()).square().mean()

    return step


@planted(GRAPH, words=("penalties",))
def gradient_penalty_kept():
    penalties, model = [], network()

    def step():
        x = batch().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
        penalties.append(grad.square().sum())

    return step


@planted(GRAPH, words=("grad",))
def gradients_with_graph_added_up():
    model = network()

    def step():
        model(batch()).square().mean().backward(create_graph=True)

    return step, {"model": model}


@planted(GRAPH, words=("total_loss", "graph"))
def total_loss_of_the_faq():
    training, total_loss = Training(), 0.0

    def step():
        nonlocal total_loss
        total_loss += training.update(training.loss())

    return step


@planted(TENSORS, words=("last_frames", "view"))
def view_pins_its_storage():
    last_frames = []

    def step():
        trajectory = torch.randn(50, 64)
        last_frames.append(trajectory[-1])

    return step


@planted(TENSORS, words=("features",))
def forward_hook_appends():
    features, training = [], Training()
    training.model[0].register_forward_hook(lambda m, x, y: features.append(y.detach()))
    return training


@planted(HOOKS, words=("hook",))
def hook_registered_in_each_step():
    training = Training()

    def step():
        x = batch()
        training.model[0].register_forward_hook(lambda module, args, y: y + 0 * x.sum())
        training()

    return step


@planted(HOOKS, words=("hook", "_forward_pre_hooks"))
def hook_that_holds_nothing():
    training = Training()

    def step():
        training.model[0].register_forward_pre_hook(lambda module, args: None)
        training()

    return step


@planted(HOOKS, words=("hook",))
def gradient_hook_registered_in_each_step():
    training = Training()

    def step():
        scale = torch.ones(64, 32)
        training.model[0].weight.register_hook(lambda grad: grad * scale)
        training()

    return step


@planted(HOOKS, TENSORS, words=("hook",))
def hook_on_a_tensor_that_captures_it():
    model = network()

    def step():
        y = model(batch())
        y.register_hook(lambda grad: grad * y.sum())
        y.sum().backward()

    return step


@planted(TENSORS, words=("encode", "cache"))
def lru_cache_on_tensors():
    training = Training()

    @functools.cache
    def encode(x):
        return x * 2

    def step():
        encode(batch())
        training()

    return step


@planted(DUPLICATED, words=("optimizers",))
def optimizer_made_anew_and_kept():
    optimizers, model = [], network()

    def step():
        optimizers.append(torch.optim.Adam(model.parameters(), lr=1e-3))
        optimizers[-1].zero_grad()
        model(batch()).mean().backward()
        optimizers[-1].step()

    return step


@planted(DUPLICATED, words=("optimizer",))
def parameter_group_added_in_each_step():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step():
        scale = nn.Parameter(torch.ones(32))
        optimizer.add_param_group({"params": [scale]})
        optimizer.zero_grad()
        (model(batch()) * scale).square().mean().backward()
        optimizer.step()

    return step, {"optimizer": optimizer}


@planted(DUPLICATED, TENSORS, words=("snapshots",))
def models_copied_and_kept():
    snapshots, training = [], Training()

    def step(i):
        training()
        if i % 3 == 0:
            snapshots.append(copy.deepcopy(training.model))

    return step


@planted(TENSORS, words=("checkpoints",))
def state_dicts_kept():
    checkpoints, training = {}, Training()

    def step(i):
        training()
        checkpoints[f"step_{i}"] = copy.deepcopy(training.model.state_dict())

    return step


@planted(TENSORS, words=("history",))
def concatenated_history():
    class Tracker:
        def __init__(self):
            self.history = torch.zeros(0, 32)

        def step(self):
            self.history = torch.cat([self.history, batch()])

    return Tracker().step


@planted(TENSORS, words=("arrays", "numpy"))
def numpy_views_kept():
    arrays, model = [], network()

    def step():
        with torch.no_grad():
            arrays.append(model(batch()).numpy())

    return step


@planted(TENSORS, words=("outbox",))
def queue_never_emptied():
    outbox, model = queue.Queue(), network()

    def step():
        with torch.no_grad():
            outbox.put(model(batch()))

    return step


@planted(TENSORS, words=("history",))
def leak_under_noise():
    """A scalar for each step beside a last output of any length."""

    class Trainer(Training):
        history, last = [], None

        def __call__(self):
            rows = int(torch.randint(4, 200, ()))
            self.last = self.model(batch(rows)).detach()
            self.history.append(self.update(self.loss(rows)).detach())

    return Trainer()


@planted(TENSORS, words=("predictions",))
def metric_object_without_reset():
    @dataclass(slots=True)
    class Accuracy:
        predictions: list

        def update(self, y):
            self.predictions.append(y.argmax(1))

    accuracy, training = Accuracy([]), Training()

    def step(i):
        training()
        if i % 5 == 4:
            with torch.no_grad():
                accuracy.update(training.model(batch()))

    return step


@planted(TENSORS, words=("log_probs",))
def attribute_of_a_module_grows():
    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.log_probs = []

        def forward(self, x):
            y = F.log_softmax(self.net(x), -1)
            self.log_probs.append(y.detach().max(-1).values)
            return y

    model = Policy()
    training = Training(model)
    return training, {"model": model}
