"""Planted scripts that are sound, or whose growth ends."""

from __future__ import annotations

import collections
import copy
import functools
import weakref

import torch
from planted import CACHE, HEALTHY, PEAK, WARM_UP, Training, batch, network, planter
from torch import nn
from torch.utils.checkpoint import checkpoint

SOUND = []
planted = planter(SOUND)


@planted(HEALTHY)
def plain_training():
    return Training()


@planted(HEALTHY)
def training_with_adam():
    return Training(optimizer=torch.optim.Adam)


@planted(HEALTHY)
def losses_as_numbers():
    losses, training = [], Training(optimizer=torch.optim.AdamW)

    def step():
        losses.append(training.update(training.loss()).item())

    return step


@planted(HEALTHY)
def history_of_numbers():
    history, training = [], Training()

    def step(i):
        loss = training.update(training.loss()).item()
        history.append({"step": i, "loss": loss, "rate": 1e-3, "time": i * 0.1})

    return step


@planted(HEALTHY)
def any_length():
    training = Training()
    return lambda: training.update(training.loss(int(torch.randint(4, 200, ()))))


@planted(HEALTHY)
def last_output_of_any_length():
    class Recorder(Training):
        def __call__(self):
            self.last = self.model(batch(int(torch.randint(4, 200, ()))))

    return Recorder()


@planted(HEALTHY, WARM_UP)
def gradients_accumulated():
    training = Training(optimizer=torch.optim.Adam)

    def step(i):
        (training.loss() / 4).backward()
        if i % 4 == 3:
            training.optimizer.step()
            training.optimizer.zero_grad()

    return step


@planted(HEALTHY)
def checkpointed():
    model = network()

    def step():
        checkpoint(model, batch().requires_grad_(), use_reentrant=False).sum().backward()

    return step


@planted(HEALTHY)
def evaluation_without_no_grad():
    model = network()
    return lambda: model(batch()).mean().item()


@planted(HEALTHY)
def hidden_state_detached():
    cell, hidden = nn.GRUCell(32, 32), torch.zeros(8, 32)

    def step():
        nonlocal hidden
        hidden = cell(batch(), hidden.detach())
        hidden.mean().backward()

    return step


@planted(HEALTHY)
def weak_references():
    kept, model = weakref.WeakValueDictionary(), network()

    def step(i):
        kept[i] = model(batch())

    return step


@planted(HEALTHY)
def exceptions_as_text():
    errors, model = [], network()

    def step():
        try:
            raise RuntimeError(tuple(model(batch()).shape))
        except RuntimeError as error:
            errors.append(str(error))

    return step


@planted(HEALTHY)
def hooks_removed():
    training = Training()

    def step():
        handle = training.model[0].register_forward_hook(lambda m, x, y: None)
        training()
        handle.remove()

    return step


@planted(HEALTHY)
def best_checkpoint_kept():
    training, best, lowest = Training(), None, float("inf")

    def step():
        nonlocal best, lowest
        loss = training.update(training.loss()).item()
        if loss < lowest:
            best, lowest = copy.deepcopy(training.model.state_dict()), loss
        return best

    return step


@planted(HEALTHY)
def recurrent_training():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.norm = nn.LSTM(32, 32, batch_first=True), nn.BatchNorm1d(32)

        def forward(self, x):
            y, _ = self.lstm(x.view(2, -1, 32))
            return self.norm(y.flatten(0, 1))

    return Training(Net(), torch.optim.Adam)


@planted(HEALTHY)
def attention_and_dropout():
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True)
    return Training(nn.Sequential(nn.Unflatten(0, (2, -1)), layer), torch.optim.AdamW)


@planted(HEALTHY)
def spectra():
    window = torch.hann_window(64)

    def step():
        x = torch.randn(2, 1024, requires_grad=True)
        z = torch.stft(x, 64, 16, window=window, return_complex=True)
        torch.istft(z * 0.5, 64, 16, window=window, length=1024).abs().mean().backward()

    return step


@planted(HEALTHY)
def losses_added_as_detached_tensor():
    training, total = Training(), torch.zeros(())

    def step():
        nonlocal total
        total = total + training.update(training.loss()).detach()

    return step


@planted(HEALTHY, CACHE)
def list_emptied_after_each_epoch():
    outputs, model = [], network()

    def step(i):
        with torch.no_grad():
            outputs.append(model(batch()))
        if i % 8 == 7:
            outputs.clear()

    return step


@planted(WARM_UP)
def average_made_at_step_3():
    training, average = Training(), {}

    def step(i):
        training()
        if i == 3:
            average.update(copy.deepcopy(training.model.state_dict()))
        for name, value in average.items():
            value.lerp_(training.model.state_dict()[name], 0.1)

    return step


@planted(WARM_UP, HEALTHY)
def momentum_from_step_2():
    training = Training(optimizer=torch.optim.Adam)

    def step(i):
        loss = training.loss()
        loss.backward()
        if i >= 2:
            training.optimizer.step()
        training.optimizer.zero_grad()

    return step


@planted(CACHE, HEALTHY, words=("recent",))
def last_five_outputs():
    recent, model = collections.deque(maxlen=5), network()

    def step():
        with torch.no_grad():
            recent.append(model(batch()))

    return step


@planted(CACHE, words=("recent",))
def last_hundred_outputs():
    recent, model = collections.deque(maxlen=100), network()

    def step():
        with torch.no_grad():
            recent.append(model(batch()))

    return step


@planted(CACHE, words=("windows",))
def windows_by_length():
    windows = {}
    generator = torch.Generator().manual_seed(0)

    def step():
        length = 64 * int(torch.randint(1, 17, (), generator=generator))
        if length not in windows:
            windows[length] = torch.hann_window(length)
        return (torch.randn(length) * windows[length]).sum().item()

    return step


@planted(CACHE, words=("positions",))
def positions_by_length():
    @functools.cache
    def positions(length):
        return torch.arange(length).float().sin()

    generator = torch.Generator().manual_seed(1)
    return lambda: positions(int(torch.randint(10, 70, (), generator=generator))).sum().item()


@planted(CACHE, words=("replay",))
def replay_of_twenty():
    replay = []

    def step():
        replay.append(batch())
        if len(replay) > 20:
            replay.pop(0)

    return step


@planted(PEAK, words=("planted_healthy.py",))
def scores_of_attention():
    project = nn.Linear(32, 32)

    def step():
        x = project(torch.randn(1500, 32))
        (x @ x.T).softmax(-1).matmul(x).mean().backward()

    return step
