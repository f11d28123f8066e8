"""After `restore`, everything is as it was: bit for bit, the same objects, the same next steps."""
# ruff: noqa: NPY002 (programs draw from the global generator, so it must be restored)

import gc
import random
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel

from tfswa_lab.performance.training_state import TrainingState
from tfswa_lab.training.config import TrainingConfig
from tfswa_lab.training.launch import launch


def bits(value):
    """Nested state as bytes and texts, which differ where a bit differs."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), value.requires_grad, raw
    if isinstance(value, dict):
        return [(str(name), bits(entry)) for name, entry in value.items()]
    if isinstance(value, list | tuple):
        return [bits(part) for part in value]
    return repr(value)


def generators():
    python, numpy, own = random.getstate(), np.random.get_state(), torch.get_rng_state()
    return repr(python), repr(numpy[1].tolist()), numpy[2:], bits(own), torch.is_grad_enabled()


def look(*modules):
    """What `state_dict` does not say: objects, modes, gradients, buffers that are not saved."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return (
        [id(tensor) for tensor in tensors],
        [(tensor.data_ptr(), bits(tensor)) for tensor in tensors],
        [None if tensor.grad is None else bits(tensor.grad) for tensor in tensors],
        [part.training for m in modules for part in m.modules()],
    )


class Odd(nn.Module):
    """Everything that a module can keep beside its weights."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.tied, self.head = nn.Linear(4, 3, bias=False), nn.Linear(3, 1)
        self.tied.weight = nn.Parameter(self.inner[0].weight.detach().T.contiguous())
        self.again = self.tied
        self.register_buffer("average", torch.zeros(3), persistent=False)
        self.register_buffer("repeated", torch.tensor([-0.0, torch.nan])[:, None].expand(2, 3))
        self.register_buffer("absent", None)
        self.calls, self.history, self.secret = 0, [torch.zeros(2)], {"seen": 0}

    def get_extra_state(self):
        return {"seen": torch.tensor(self.secret["seen"])}

    def set_extra_state(self, state):
        self.secret["seen"] = state["seen"].item()

    def forward(self, x):
        self.calls += 1
        self.secret["seen"] += 1
        self.history[0] += 1
        self.history.append(x.mean())
        self.average = 0.9 * self.average + 0.1 * x.mean(0)  # another tensor each time
        self.absent = x.detach()
        self.new = x
        return self.head(self.tied(self.inner(x)))


class Rate:
    """A rate that is an object with a state."""

    def __init__(self):
        self.asked = 0

    def __call__(self, epoch):
        self.asked += 1
        return 1 / (1 + epoch + self.asked)


SCHEDULES = {
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, Rate()),
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=50),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0),
    "in a row": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt), lr_scheduler.ExponentialLR(opt, 0.9)], [2]
    ),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True),
    "tensor rate": lambda p: torch.optim.Adam(p, torch.tensor(0.1)),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=2),
}


class World:
    """A training with all kinds of state; `step` draws from all generators."""

    def __init__(self, optimizer="adam", schedule="lambda", scaled=False):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        self.net = Odd()
        self.net.inner[1].eval()  # frozen on purpose: modes are per module
        self.net.head.weight.requires_grad_(False)
        self.own = torch.Generator().manual_seed(3)
        self.loose = nn.Parameter(torch.ones(()))  # only the optimizer knows it
        learnt = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = OPTIMIZERS[optimizer]([*learnt, self.loose])
        self.scheduler = SCHEDULES[schedule](self.optimizer)
        self.average = AveragedModel(nn.Linear(3, 1), use_buffers=True)
        self.scaler = GradScaler("cpu", enabled=scaled)
        self.objects = (
            *(self.net, self.optimizer, self.scheduler, self.average, self.scaler, self.own),
        )

    def loss(self):
        self.optimizer.zero_grad()
        x = torch.rand(5, 3) + torch.rand(5, 3, generator=self.own) + random.random()
        loss = self.net(x * np.random.rand()).square().mean() + self.loose.square()
        self.scaler.scale(loss).backward()
        return loss

    def step(self, *_):
        loss = self.loss()
        if isinstance(self.optimizer, torch.optim.LBFGS):
            self.optimizer.step(self.loss)
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        plateau = isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau)
        self.scheduler.step(*[loss.item()] * plateau)
        self.average.update_parameters(self.net.head)

    def everything(self):
        states = [bits(each.state_dict()) for each in self.objects[:-1]]
        plain = (self.net.calls, self.net.secret, bits(self.net.history), bits(self.net.absent))
        loose = None if self.loose.grad is None else bits(self.loose.grad)
        return (
            *(states, plain, loose, hasattr(self.net, "new"), generators()),
            *(bits(self.own.get_state()), look(self.net, self.average)),
            bits(getattr(self.scaler, "_scale", None)),
        )


def spoil(world):
    """What a broken step may leave behind."""
    world.loss()
    if world.scaler.is_enabled():
        world.scaler.unscale_(world.optimizer)  # and out of memory before `update`
    world.net.train()
    world.net.requires_grad_(True)
    world.net.head.weight.data = world.net.head.weight.data.double()
    world.net.tied.weight = nn.Parameter(torch.zeros(3, 4))
    world.optimizer.param_groups[0]["weight_decay"] = 7
    world.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    torch.set_grad_enabled(False)


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize(
    ("optimizer", "schedule", "scaled"),
    [
        ("adam", "lambda", True),
        ("sgd", "one cycle", False),
        ("tensor rate", "plateau", True),
        ("lbfgs", "in a row", False),
    ],
)
def test_everything_is_as_it_was(optimizer, schedule, scaled, steps_before):
    world, twin = (World(optimizer, schedule, scaled) for _ in range(2))
    after = []
    for each in (twin, world):  # one after the other: they share the global generators
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        for _ in range(steps_before):
            each.step()
        if each is world:
            before, state = world.everything(), TrainingState(world.objects)
            for times in (1, 2):
                for _ in range(times):
                    world.step()
                spoil(world)
                state.restore()
                assert world.everything() == before
        for _ in range(3):
            each.step()
        after.append(bits(each.net.state_dict()))
    assert after[0] == after[1]


def test_a_gradient_keeps_its_object_where_it_is_alive_and_no_memory_where_not():
    net = nn.Linear(2, 2)
    net(torch.ones(1, 2)).sum().backward()
    held, dropped = net.weight.grad, weakref.ref(net.bias.grad)
    bias = net.bias.grad.clone()
    state = TrainingState(net)
    net.zero_grad()
    gc.collect()
    assert dropped() is None  # a step's zero_grad frees it
    held += 1
    state.restore()
    assert net.weight.grad is held
    assert torch.equal(held, torch.ones(2, 2))
    assert torch.equal(net.bias.grad, bias)


@pytest.mark.parametrize("form", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_sparse_tensors_and_gradients(form):
    net = nn.Embedding(3, 2, sparse=True)
    net.register_buffer("mask", form(torch.eye(3)))
    net(torch.tensor([0, 2, 2])).sum().backward()
    kept = net.weight.grad, net.mask  # alive, so the same objects have to get their values back
    before = [tensor.to_dense() for tensor in kept]
    state = TrainingState(net)
    for tensor in kept:
        tensor.mul_(2)
    state.restore()
    assert net.weight.grad is kept[0]
    assert net.mask is kept[1]
    for tensor, values in zip(kept, before, strict=True):
        assert torch.equal(tensor.to_dense(), values)


def test_a_wrapped_model_and_optimizer():
    fabric = launch("cpu")
    net = nn.Linear(2, 1)
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters()))
    before = look(net), bits(optimizer.optimizer.state_dict())
    state = TrainingState((model, optimizer))
    fabric.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    state.restore()
    assert (look(net), bits(optimizer.optimizer.state_dict())) == before
    assert not optimizer.optimizer.state


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_torchscript_keeps_its_tensors_elsewhere():
    net = torch.jit.trace(nn.BatchNorm1d(2), torch.ones(3, 2)).eval()
    before = [bits(tensor) for tensor in net.state_dict().values()]
    state = TrainingState(net)
    net.train()
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.add_(1)
    state.restore()
    assert [bits(tensor) for tensor in net.state_dict().values()] == before
    assert not net.training


def test_a_learner_in_the_middle_of_a_run(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "training")
    from toy_run import ToySongs, toy_trainer

    def run(disturbed):
        trainer = toy_trainer(norm="batch", dropout=0.5)
        learner, songs = trainer.learner, ToySongs()
        items = [torch.utils.data.default_collate([songs[k] for k in range(4)])]
        torch.manual_seed(1)
        learner.step(items)
        if disturbed:
            learner.separator.model.layers[1].eval()
            before = look(learner.separator, learner.ema), bits(learner.state_dict())
            state = TrainingState(learner)
            learner.separator.train()
            learner.step(items)
            state.restore()
            assert (look(learner.separator, learner.ema), bits(learner.state_dict())) == before
            learner.separator.train()
        learner.step(items)
        return bits(learner.state_dict())

    assert run(disturbed=True) == run(disturbed=False)


class Loader:
    """Anything else: its `load_state_dict` keeps what it is given."""

    def __init__(self):
        self.state = {"read": [0], "order": torch.arange(3), "pair": (1, torch.ones(1))}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_any_other_object_gets_a_copy_of_its_state_each_time():
    loader = Loader()
    before, state = bits(loader.state), TrainingState([loader])
    for _ in range(2):
        loader.state["read"].append(1)
        loader.state["order"] += 1
        loader.state["pair"][1].zero_()
        state.restore()
        assert bits(loader.state) == before


@pytest.mark.parametrize(
    ("state", "named"),
    [
        (3, "a int"),
        ([nn.Linear(1, 1), "net"], "a str"),
        ({"net": nn.Linear(1, 1)}, "a dict"),
        (nn.Linear, "Linear"),
        (F.relu, "relu"),
        (TrainingConfig(), "a TrainingConfig"),
        (nn.LazyLinear(2), "LazyLinear is lazy"),
    ],
)
def test_what_cannot_be_restored_is_refused_by_name(state, named):
    with pytest.raises(ValueError, match=named):
        TrainingState(state)
