"""Pipelines of several models: equal outputs, nothing left, and the bytes that the plan says.

The GPU is played: a tensor counts as being on it when `moved` has copied it there, and weak
references count the bytes that are alive, so the count knows nothing of the pipeline.
"""

import functools
import gc
import logging
import random
import re
import threading
import weakref
from collections import UserDict
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from tfswa_lab.performance import placement, stage, staged
from tfswa_lab.performance.oom import process_in_chunks
from tfswa_lab.performance.plan import POLICIES, Plan, Room, StageSizes
from tfswa_lab.performance.staged import Stage, StagedPipeline

pytestmark = pytest.mark.usefixtures("new_objects_only")
GPU = torch.device("mps")  # a name that is not the CPU's; nothing is ever sent there
ALL = (*POLICIES, "auto")


class Ledger:
    """Bytes of the storages that are alive, now and at most."""

    def __init__(self):
        self.held = self.peak = 0
        self.storages = WeakIdKeyDictionary()

    def enter(self, tensor):
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        if storage not in self.storages:
            self.storages[storage] = True
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._leave, storage.nbytes())
        return tensor

    def _leave(self, size):
        self.held -= size

    def __contains__(self, tensor):
        return tensor.untyped_storage() in self.storages


@pytest.fixture
def gpu(monkeypatch):
    """The ledger of a played GPU that every pipeline of the test runs on."""
    ledger = Ledger()

    def on(tensor, device):
        return (tensor in ledger) == (device == GPU)

    def moved(thing, device):
        if isinstance(thing, nn.Module):
            for module in thing.modules():
                for parameter in module.parameters(recurse=False):
                    parameter.data = moved(parameter.data, device)
                for name, buffer in module._buffers.items():
                    module._buffers[name] = buffer if buffer is None else moved(buffer, device)
            return thing
        if on(thing, device):
            return thing
        copy = thing.clone()
        return ledger.enter(copy) if device == GPU else copy

    for where in (placement, stage, staged):
        monkeypatch.setattr(where, "moved", moved)
    monkeypatch.setattr(placement, "on", on)
    monkeypatch.setattr(staged, "pick_device", lambda device: GPU)
    monkeypatch.setattr(StagedPipeline, "_room", lambda self: self.room)
    StagedPipeline.room = Room(10**9, 0, 10**9)
    yield ledger
    del StagedPipeline.room


class Net(nn.Module):
    """Weights, a shared weight if there is one, and a buffer."""

    def __init__(self, size, device="cpu", shared=None):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), float(size), device=device))
        self.register_buffer("offset", torch.ones(2, device=device))
        self.shared = shared

    def total(self):
        extra = 0 if self.shared is None else self.shared.mean()
        return self.weight.mean() + self.offset.sum() + extra


@dataclass(eq=False)
class Part:
    """A stage of a random pipeline, without the pipeline: the plain chain calls `run`, too."""

    size: int  # of the weights, in numbers
    out: int
    temporary: int
    ledger: Ledger
    alive: weakref.WeakSet
    shared: nn.Parameter | None = None
    fails: int = 0
    kept: Net | None = None  # by us: `load` returns it each time

    def load(self):
        if self.kept is not None:
            return self.kept
        net = Net(self.size, shared=self.shared)
        self.alive.add(net)
        return net

    def draft(self, shared):
        return Net(self.size, "meta", shared)

    def run(self, net, value):
        output = torch.full((self.out,), float(value.mean() + net.total()))
        temporary = torch.zeros(self.temporary)
        if value in self.ledger:
            self.ledger.enter(output), self.ledger.enter(temporary)
        if self.fails:
            self.fails -= 1
            raise ZeroDivisionError("in a part")
        return output


class Chain:
    """Two to eight random parts in a row.

    Some share a parameter that we hold, some stages a module that we hold.
    """

    def __init__(self, rng, ledger):
        self.rng, self.ledger, self.alive = rng, ledger, weakref.WeakSet()
        self.bank = nn.Parameter(torch.full((rng.randint(1, 9),), 3.0))
        self.parts = [self._part() for _ in range(rng.randint(2, 8))]
        self.models = [
            self._kept(number) if rng.random() < 0.2 else part
            for number, part in enumerate(self.parts)
        ]
        self.value = torch.ones(rng.randint(1, 5))

    def _kept(self, number):
        """A part up to this one, whose module is held from now on."""
        part = self.rng.choice(self.parts[: number + 1])
        part.kept = part.load()
        return part

    @property
    def held(self):
        return {part.kept for part in self.parts if part.kept is not None}

    def _part(self):
        sizes = (self.rng.randint(1, 40), self.rng.randint(1, 9), self.rng.randint(1, 30))
        shared = self.bank if self.rng.random() < 0.3 else None
        return Part(*sizes, self.ledger, self.alive, shared)

    def plain(self):
        """The output without a pipeline."""
        value = self.value
        with torch.no_grad():
            for part, model in zip(self.parts, self.models, strict=True):
                value = part.run(model.load(), value)
        return value

    def stages(self):
        bank = nn.Parameter(torch.empty_like(self.bank, device="meta"))
        kept = {}
        for number, (part, model) in enumerate(zip(self.parts, self.models, strict=True)):
            draft = model.draft(None if model.shared is None else bank)
            draft = draft if model.kept is None else kept.setdefault(model, draft)
            sizes = {"activations": 4 * (part.out + part.temporary), "carries": 4 * part.out}
            yield Stage(f"s{number}", model.load, part.run, weights=draft, **sizes)


@pytest.mark.parametrize("group", range(10))
def test_random_pipelines(gpu, group):
    """Equal outputs, the planned peak, and nothing left; also after a stage has failed."""
    for seed in range(100 * group, 100 * group + 100):
        check_random_pipeline(random.Random(seed), gpu)
        assert gpu.held == 0


def check_random_pipeline(rng, gpu):
    chain, policy = Chain(rng, gpu), rng.choice(ALL)
    options = {"keep_all": rng.random() < 0.7, "keep_on_host": rng.random() < 0.3}
    pipeline = StagedPipeline(chain.stages(), policy=policy, **options)
    expected = chain.plain()
    pipeline._bytes.input = chain.value.nbytes
    if policy == "auto":
        plan = pipeline.plan()
        budget = rng.randint(plan.policy("sequential").peak, plan.policy("resident").peak)
        pipeline.room = Room(budget, 0, rng.choice([0, 10**9]))
    planned, gpu.peak = pipeline.plan().policy(policy).peak, 0
    for _ in range(2):
        assert torch.equal(pipeline.run(chain.value), expected)
    assert gpu.peak == planned
    if policy in ("sequential", "offload"):
        check_outputs_only(chain, pipeline)
    if rng.random() < 0.4:
        fail_and_resume(rng, chain, pipeline, expected)
    pipeline.cleanup()
    assert set(chain.alive) == chain.held
    check_outputs_only(chain, pipeline)


def check_outputs_only(chain, pipeline):
    """Nothing is on the GPU but the outputs."""
    outputs = [x for x in pipeline.outputs.values() if x in chain.ledger]
    assert chain.ledger.held == sum(x.nbytes for x in outputs)


def fail_and_resume(rng, chain, pipeline, expected):
    """A stage raises, somebody keeps the error, the run goes on from there, and another works."""
    number = rng.randrange(len(chain.parts))
    chain.parts[number].fails = 1
    with pytest.raises(ZeroDivisionError, match="in a part") as held:
        pipeline.run(chain.value)
    assert any(f"'s{number}'" in note for note in held.value.__notes__)
    assert stage_is_free(pipeline, number)
    if pipeline.keep_all:
        assert list(pipeline.outputs) == [f"s{k}" for k in range(number)]
    value = chain.value if number == 0 else None
    assert torch.equal(pipeline.run(value, resume=True), expected)
    assert torch.equal(pipeline.run(chain.value), expected)
    del held  # its traceback holds this function's variables, and they hold it


def stage_is_free(pipeline, number):
    return pipeline.status()[f"s{number}"].place == "not loaded"


# The plan ----------------------------------------------------------------------------------------


def apply(model, value):
    return model(value)


ROWS = [("a", 100, 30, 5), ("b", 400, 80, 20), ("c", 50, 10, 0)]


def planned(budget, **options):
    stages = [
        Stage(n, lambda: None, apply, weights=w, activations=a, carries=c) for n, w, a, c in ROWS
    ]
    return StagedPipeline(stages, "cpu", budget=budget, context=7, **options).plan()


def test_sums_by_hand():
    plan = planned(1000)
    assert [row.peak for row in plan.stages] == [137, 492, 92]
    assert [row.carried_in for row in plan.stages] == [0, 5, 25]
    rows = {row.name: row for row in plan.policies}
    assert rows["resident"].peak == 7 + 550 + 5 + 80
    assert rows["sequential"].peak == 492
    assert rows["sequential"].moved == 550
    assert rows["resident"].moved == 0


def test_the_last_output_alone_is_carried_where_only_that_is_kept():
    assert [row.carried_in for row in planned(1000, keep_all=False).stages] == [0, 5, 20]
    assert [row.carried_in for row in planned(1000, keep_on_host=True).stages] == [0, 5, 20]


def test_what_does_not_fit_is_named_with_what_would_help():
    with pytest.raises(ValueError, match="stage 'b' needs 492 B") as error:
        planned(491)
    for text in ("400 B of weights", "80 B of activations", "7 B of context", "budget is 491 B"):
        assert text in str(error.value)
    assert "float16 would need about 252 B, which fits" in str(error.value)  # half of 480, and 12
    assert "79 B of activations, 99%" in str(error.value)


def test_weights_that_alone_are_too_large():
    with pytest.raises(ValueError, match="weights alone are too large; layerwise=True") as error:
        planned(300)
    assert "smaller input cannot help" in str(error.value)
    with pytest.raises(ValueError, match="2 stages are too large: a, b"):
        planned(100)


def test_what_is_carried_in_may_be_too_large():
    stages = [
        Stage("a", nn.Identity, apply, weights=10, activations=500, carries=500),
        Stage("b", nn.Identity, apply, weights=10, activations=10, carries=10),
        Stage("c", nn.Identity, apply, weights=10, activations=10, carries=10),
    ]
    with pytest.raises(ValueError, match="stage 'c' needs 530 B") as error:
        StagedPipeline(stages, "cpu", budget=515).plan()
    assert (
        "keep_on_host=True takes 500 B of outputs off the device, 30 B remain, which fits"
        in str(error.value)
    )


def test_half_precision_is_not_advised_twice():
    stage = Stage("a", nn.Identity, apply, weights=100, activations=10, dtype=torch.float16)
    with pytest.raises(ValueError, match="needs 110 B") as error:
        StagedPipeline([stage], "cpu", budget=60).plan()
    assert "float16" not in str(error.value)


def test_resident_fails_where_its_weights_no_longer_fit():
    assert planned(549).policy("resident").fails_at == "loading c"
    assert planned(600).policy("resident").fails_at == "running b"
    assert planned(500).policy("lazy").fails_at == "running b"


def test_auto_keeps_what_is_used_most_often_then_the_largest():
    sizes = [
        StageSizes("large", {"L": 60}, 10),
        StageSizes("first", {"S": 20}, 10),
        StageSizes("second", {"S": 20}, 10),
        StageSizes("middle", {"M": 30}, 10),
    ]
    plan = Plan(tuple(sizes), Room(budget=95, host=1000))
    assert plan.modes == {
        "large": "offload",
        "first": "resident",
        "second": "resident",
        "middle": "offload",
    }
    tight = Plan(tuple(sizes), Room(budget=95, host=50))
    assert tight.modes["large"] == "sequential"
    everything = Plan(tuple(sizes), Room(budget=120, host=0))
    assert set(everything.modes.values()) == {"resident"}


def test_unknown_sizes_are_named_and_never_called_fitting():
    pipeline = StagedPipeline([Stage("a", nn.Identity, apply)], "cpu")
    plan = pipeline.plan()
    assert plan.unknown == ["weights of a", "activations of a"]
    assert {row.fits for row in plan.policies} == {None}
    assert "unknown, taken for 0: weights of a, activations of a" in str(plan)


def test_predicted_is_what_is_measured():
    """A prediction for CUDA and a measurement on the CPU, of layers that need no workspace."""
    make = [partial(nn.Linear, 64, 256), partial(nn.Linear, 256, 64)]
    stages = [Stage(str(i), each, apply, weights=each) for i, each in enumerate(make)]
    predicted = StagedPipeline(stages, "cpu").plan(torch.zeros(128, 64))
    measured = StagedPipeline(stages, "cpu").measure(torch.zeros(128, 64))
    assert predicted.stages == measured.stages
    assert predicted.stages[0].activations == 4 * 128 * 256


def test_what_cannot_be_predicted_is_named():
    stage = Stage("a", partial(nn.Linear, 2, 2), lambda model, x: x[x > model(x)])
    with pytest.raises(ValueError, match=r"stage 'a' cannot be predicted .* measure"):
        StagedPipeline([stage], "cpu").plan(torch.zeros(2))


def test_a_view_counts_by_its_storage_and_is_named():
    """A stage hands on ten numbers of ten thousand."""
    stages = [
        Stage("view", nn.Identity, lambda model, x: torch.zeros(10_000)[:10]),
        Stage("clone", nn.Identity, lambda model, x: torch.zeros(10_000)[:10].clone()),
        Stage("end", nn.Identity, apply),
    ]
    plan = StagedPipeline(stages, "cpu").measure(torch.zeros(1))
    assert [row.carried_in for row in plan.stages] == [0, 40_000, 40_040]
    assert "view: hands on 40 B that keep 39.06 KiB alive" in str(plan)
    assert "clone: hands on" not in str(plan)


def test_the_text_of_a_long_plan_is_short():
    rows = [Stage(f"s{i}", nn.Identity, apply, weights=1, activations=1) for i in range(40)]
    plan = StagedPipeline(rows, "cpu", budget=10**6).plan()
    assert len(str(plan).splitlines()) <= 25
    assert max(map(len, str(plan).splitlines())) < 120
    assert "… 29 more" in str(plan)
    assert repr(plan).startswith("Plan(40 of 40 stages resident")
    assert plan._repr_html_().count("<tr>") == 41 + 6


# A run -------------------------------------------------------------------------------------------


class Counted(nn.Module):
    alive = weakref.WeakSet()

    def __init__(self, number=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([number, number]))
        Counted.alive.add(self)

    def forward(self, value):
        return value + self.weight


def counted(*names, **options):
    return [Stage(name, Counted, apply, **options) for name in names]


def test_stages_may_return_the_same_module(gpu):
    module = Counted()
    stages = [Stage(name, lambda: module, apply, weights=module) for name in "ab"]
    pipeline = StagedPipeline(stages, policy="resident")
    assert pipeline.run(torch.zeros(2)).tolist() == [2.0, 2.0]
    assert gpu.held == 8
    assert pipeline.plan().policy("resident").peak == 8 + 8  # what the first hands on


def test_outputs_have_no_graph():
    """A graph would keep the weights alive."""
    output = StagedPipeline(counted("a"), "cpu", "sequential").run(torch.zeros(2))
    assert output.grad_fn is None
    assert not Counted.alive


@pytest.mark.parametrize("policy", ALL)
def test_ctrl_c_frees_everything(policy):
    def interrupted(model, value):
        raise KeyboardInterrupt

    stages = [*counted("a"), Stage("b", partial(Counted, 2.0), interrupted)]
    pipeline = StagedPipeline(stages, "cpu", policy)
    try:
        pipeline.run(torch.zeros(2))
    except KeyboardInterrupt as error:
        held = error
    assert not Counted.alive
    assert list(pipeline.outputs) == ["a"]
    assert "in stage 'b', while running" in held.__notes__


def test_a_load_that_raises_is_named_and_the_next_run_works():
    broken = [True]

    def load():
        if broken:
            raise FileNotFoundError("weights.safetensors")
        return Counted()

    pipeline = StagedPipeline([*counted("a"), Stage("b", load, apply)], "cpu", "sequential")
    with pytest.raises(FileNotFoundError) as error:
        pipeline.run(torch.zeros(2))
    assert error.value.__notes__ == ["in stage 'b', while loading"]
    broken.clear()
    assert pipeline.run(resume=True).tolist() == [2.0, 2.0]


def test_nothing_to_resume():
    pipeline = StagedPipeline(counted("a"), "cpu")
    pipeline.run(torch.zeros(2))
    with pytest.raises(ValueError, match="nothing to resume"):
        pipeline.run(resume=True)


def test_a_change_of_policy_and_a_second_clean_up(gpu):
    pipeline = StagedPipeline(counted("a", "b"), policy="resident")
    for policy in ("lazy", "offload", "sequential", "resident", "auto"):
        assert pipeline.run(torch.zeros(2))[0] == 2
        pipeline.policy = policy
        assert not Counted.alive
    pipeline.cleanup()
    pipeline.cleanup()
    with pytest.raises(ValueError, match="policy='all'; choose among resident, lazy"):
        pipeline.policy = "all"


def test_two_pipelines_over_one_module(gpu):
    """Ours holds the module: it goes back to the host, and each pipeline finds it there."""
    module = Counted()
    stages = [Stage("a", lambda: module, apply)]
    first = StagedPipeline(stages, policy="sequential")
    second = StagedPipeline(stages, policy="resident")
    for _ in range(2):
        assert first.run(torch.zeros(2)).tolist() == [1.0, 1.0]
        assert module.weight not in gpu
        assert second.run(torch.zeros(2)).tolist() == [1.0, 1.0]
        assert module.weight in gpu
    second.cleanup()
    assert module.weight not in gpu


def test_offload_copies_back_what_a_run_has_changed(gpu):
    """Such as the statistics of a batch norm; the weights are not copied."""

    class Counts(Counted):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, value):
            self.calls += 1
            return super().forward(value)

    module = Counts()
    pointers = module.weight.data_ptr(), module.calls.data_ptr()
    pipeline = StagedPipeline([Stage("a", lambda: module, apply)], policy="offload")
    for _ in range(3):
        pipeline.run(torch.zeros(2))
    assert module.calls.item() == 3
    assert (module.weight.data_ptr(), module.calls.data_ptr()) == pointers


def test_outputs_on_the_host(gpu):
    pipeline = StagedPipeline(counted("a", "b"), policy="sequential", keep_on_host=True)
    assert pipeline.run(torch.zeros(2)) not in gpu
    assert gpu.held == 0


def test_only_the_last_output():
    pipeline = StagedPipeline(counted("a", "b"), "cpu", keep_all=False)
    pipeline.run(torch.zeros(2))
    assert list(pipeline.outputs) == ["b"]


def test_values_may_be_nested(gpu):
    """A dictionary with a list and a dataclass in it reaches the stage on the device."""

    @dataclass
    class Pair:
        tensor: torch.Tensor
        name: str

    def run(model, value):
        assert value["list"][0] in gpu
        assert value["pair"].tensor in gpu
        return value["pair"].tensor + model.weight, value["pair"].name

    pipeline = StagedPipeline([Stage("a", Counted, run)], policy="sequential")
    value = {"list": [torch.ones(2), None], "pair": Pair(torch.ones(2), "x")}
    output, name = pipeline.run(value)
    assert (output.tolist(), name) == ([2.0, 2.0], "x")
    assert value["pair"].tensor not in gpu


def test_a_model_without_tensors_stays_where_it_is(gpu):
    stages = [Stage("f", lambda: torch.neg, lambda f, x: f(x)), *counted("a")]
    pipeline = StagedPipeline(stages, policy="sequential")
    assert pipeline.run(torch.ones(2)).tolist() == [0.0, 0.0]
    assert pipeline.plan().stages[0].weights == 0


def test_reload():
    pipeline = StagedPipeline(counted("a"), "cpu", "resident")
    for reload in (False, False, True):
        pipeline.run(torch.zeros(2), reload=reload)
    assert pipeline.status()["a"].loads == 2


def test_prefetch_loads_the_next_model_while_a_stage_runs():
    loaded = threading.Event()

    def load():
        loaded.set()
        return Counted()

    def wait(model, value):
        assert loaded.wait(60)
        return model(value)

    sizes = {"weights": 8, "activations": 8}
    stages = [Stage("a", Counted, wait, **sizes), Stage("b", load, apply, **sizes)]
    with StagedPipeline(stages, "cpu", "sequential", prefetch=True) as pipeline:
        assert pipeline.run(torch.zeros(2)).tolist() == [2.0, 2.0]
    assert not Counted.alive


def test_prefetch_without_room_loads_nothing_ahead():
    sizes = {"weights": 8, "activations": 8}
    most = [0]

    def watched(model, value):
        most[0] = max(most[0], len(Counted.alive))
        return model(value)

    stages = [Stage(name, partial(Counted), watched, **sizes) for name in "ab"]
    pipeline = StagedPipeline(stages, "cpu", "sequential", budget=23, prefetch=True, keep_all=False)
    pipeline.run(torch.zeros(2))
    assert most == [1]
    assert "not loaded ahead: there is no room" in str(pipeline.status())


def test_a_failed_load_ahead_is_told_in_its_own_stage():
    def load():
        raise OSError("the disk is gone")

    sizes = {"weights": 8, "activations": 8}
    stages = [*counted("a", **sizes), Stage("b", load, apply, **sizes)]
    pipeline = StagedPipeline(stages, "cpu", "sequential", prefetch=True)
    with pytest.raises(OSError, match="the disk is gone") as error:
        pipeline.run(torch.zeros(2))
    assert error.value.__notes__ == ["in stage 'b', while loading"]
    assert list(pipeline.outputs) == ["a"]


def test_a_stage_that_is_predicted_not_to_fit_is_warned_of(monkeypatch):
    said = []
    monkeypatch.setattr(staged.log, "warning", lambda text, *values: said.append(text % values))
    sizes = {"weights": 8, "activations": 8}
    pipeline = StagedPipeline(counted("a", **sizes), "cpu", "resident", budget=15)
    pipeline.run(torch.zeros(2))
    assert said == ["stage 'a' is predicted to need 16 B, and the budget is 15 B"]
    pipeline.policy = "auto"
    with pytest.raises(ValueError, match="stage 'a' needs 16 B"):
        pipeline.run(torch.zeros(2))


def test_status_says_no_zeros_for_what_is_unknown():
    pipeline = StagedPipeline(counted("a"), "cpu", "lazy")
    before = pipeline.status()["a"]
    assert (before.place, before.weights, before.peak) == ("not loaded", None, None)
    pipeline.run(torch.zeros(2))
    after = pipeline.status()
    assert (after["a"].place, after["a"].weights, after["a"].peak) == ("cpu", 8, None)
    assert (after["a"].loads, after["a"].runs) == (1, 1)
    assert repr(after) == "Status(a on cpu)"
    assert len(str(after).splitlines()) == 2


# Precision ---------------------------------------------------------------------------------------


def linear():
    torch.manual_seed(0)
    return nn.Linear(64, 64)


def test_half_precision_casts_weights_inputs_and_outputs():
    seen = []

    def run(model, value):
        seen.append((model.weight.dtype, value.dtype))
        return model(value)

    stages = [
        Stage("half", linear, run, dtype=torch.bfloat16, weights=linear),
        Stage("full", linear, run),
    ]
    pipeline = StagedPipeline(stages, "cpu", "lazy")
    assert pipeline.plan().stages[0].weights == 2 * 64 * 65
    output = pipeline.run(torch.randn(3, 64))
    assert seen == [(torch.bfloat16,) * 2, (torch.float32,) * 2]
    assert output.dtype == torch.float32
    assert pipeline.status()["half"].weights == 2 * 64 * 65


def test_a_stage_that_cannot_be_half_stays_float32_and_is_named(caplog):
    def run(model, value):
        return torch.fft.rfft(model(value)).abs()

    stage = Stage("stft", linear, run, dtype=torch.float16, weights=linear)
    pipeline = StagedPipeline([stage], "cpu", "sequential")
    value = torch.randn(3, 64)
    with caplog.at_level(logging.INFO):
        output = pipeline.run(value)
    assert torch.equal(output, run(linear(), value))
    assert "stft: stays float32: Unsupported dtype Half" in str(pipeline.status())
    pipeline.run(value)  # it is known now
    assert pipeline.status()["stft"].loads == 3
    planned = StagedPipeline([stage], "cpu").plan(value)
    assert "stft: stays float32" in str(planned)
    assert planned.stages[0].weights == 4 * 64 * 65


def test_int8_weights_and_what_they_change():
    stage = Stage("a", linear, apply, dtype=torch.int8, weights=linear)
    pipeline = StagedPipeline([stage], "cpu")
    planned = pipeline.plan().stages[0].weights
    plan = pipeline.measure(torch.randn(30, 64))
    assert plan.stages[0].weights == planned == pipeline.status()["a"].weights
    assert planned < 0.35 * 4 * 64 * 65
    change = float(re.search(r"an SNR of (\S+) dB", str(plan))[1])
    assert 35 < change < 60


def test_layer_by_layer_holds_the_largest_layer(gpu):
    def make():
        return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(4, 4))

    stage = Stage("a", make, apply, layerwise=True, weights=make)
    plan = StagedPipeline([stage]).plan(torch.zeros(1, 8))
    assert plan.stages[0].weights == 4 * 9 * 16
    assert plan.policy("resident").peak == plan.policy("sequential").peak
    assert plan.policy("resident").host == 4 * (9 * 16 + 17 * 4 + 5 * 4)


def test_layer_by_layer_on_a_cpu_holds_all():
    stage = Stage("a", linear, apply, layerwise=True, weights=linear)
    pipeline = StagedPipeline([stage], "cpu")
    value = torch.randn(3, 64)
    assert pipeline.plan(value).stages[0].weights == 4 * 64 * 65
    assert torch.equal(pipeline.run(value), linear()(value))
    pipeline.cleanup()
    assert pipeline.status()["a"].place == "not loaded"


# What cannot be ----------------------------------------------------------------------------------


def test_bad_stages_and_pipelines():
    with pytest.raises(ValueError, match=r"stages=\[\]: name one or more"):
        StagedPipeline([])
    with pytest.raises(ValueError, match="each once"):
        StagedPipeline(counted("a", "a"))
    with pytest.raises(ValueError, match="budget=-1 is no number of bytes"):
        StagedPipeline(counted("a"), budget=-1)
    with pytest.raises(ValueError, match="policy='fast'; choose among"):
        StagedPipeline(counted("a"), policy="fast")
    with pytest.raises(ValueError, match="stage 'a': weights=-5 is no number of bytes"):
        Stage("a", Counted, apply, weights=-5)
    with pytest.raises(ValueError, match=r"dtype=torch.float64; choose among"):
        Stage("a", Counted, apply, dtype=torch.float64)
    with pytest.raises(TypeError, match="run=None is no function"):
        Stage("a", Counted, None)
    with pytest.raises(ValueError, match="a stage's name is a text"):
        Stage("", Counted, apply)


# What an attack found ----------------------------------------------------------------------------


def in_a_generator(model, value):
    return sum(model(part) for part in value.split(1))


def in_a_lambda(model, value):
    return process_in_chunks(lambda part: model(part), value, 1)


def in_itself(model, value):
    def inner(depth):
        return inner(depth - 1) if depth else model(value)

    return inner(3)


def under_a_hook(model, value):
    model.register_forward_hook(lambda *of_hook: None)
    return model(value)


def from_another(model, value):
    try:
        return in_a_generator(model, value)
    except RuntimeError as error:
        raise ValueError("another") from error


def in_a_group(model, value):
    try:
        return in_a_generator(model, value)
    except RuntimeError as error:
        raise ExceptionGroup("all", [error, ValueError("more")]) from None


CAPTURING = (in_a_generator, in_a_lambda, in_itself, under_a_hook, from_another, in_a_group)


@pytest.mark.parametrize("run", CAPTURING)
def test_what_inner_functions_capture_is_freed_too(run):
    """Somebody keeps the error of a stage whose model a closure has captured."""
    pipeline = StagedPipeline([Stage("a", Counted, run)], "cpu", "sequential")
    try:
        pipeline.run(torch.ones(4, 3))
    except Exception as error:
        held = error
    assert held.__notes__ == ["in stage 'a', while running"]
    gc.collect()
    assert not Counted.alive


def test_a_function_of_the_user_keeps_what_it_has_captured():
    model = Counted()

    def inner(value):
        return model(value)

    stages = [Stage("a", lambda: model, lambda _, value: inner(value))]
    pipeline = StagedPipeline(stages, "cpu", "sequential")
    with pytest.raises(RuntimeError):
        pipeline.run(torch.ones(3))
    assert pipeline.run(torch.ones(2)).tolist() == [2.0, 2.0]


def test_pipelines_in_two_threads():
    """torch has one profiler for all threads, and crashes where two are started."""
    outputs = []

    def work():
        for _ in range(3):
            outputs.append(StagedPipeline(counted("a"), "cpu").run(torch.zeros(2)).tolist())

    threads = [threading.Thread(target=work) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert outputs == [[1.0, 1.0]] * 6


def test_a_plan_leaves_a_cached_loader_alone():
    load = functools.cache(partial(nn.Linear, 2, 2))
    pipeline = StagedPipeline([Stage("a", load, apply)], "cpu")
    pipeline.plan(torch.ones(1, 2))
    assert type(pipeline.run(torch.ones(1, 2))) is torch.Tensor


def test_a_loader_that_keeps_a_blank_model_is_refused():
    kept = []

    def load():
        kept[:] = kept or [nn.Linear(2, 2)]
        return kept[0]

    with pytest.raises(ValueError, match="its load keeps the model"):
        StagedPipeline([Stage("a", load, apply)], "cpu").plan(torch.ones(1, 2))


def test_a_model_that_is_there_is_counted_once():
    model = nn.Linear(1000, 1000)
    stage = Stage("a", lambda: model, apply, weights=model)
    plan = StagedPipeline([stage], "cpu").plan(torch.ones(1, 1000))
    assert plan.stages[0].activations == 4096  # 4000, rounded up as CUDA does
    assert model.weight.device.type == "cpu"


def test_offload_keeps_all_that_a_run_changes(gpu):
    """Batch norm does not tell of its changes, and a module may put new tensors in its buffers."""

    class Changing(nn.BatchNorm1d):
        def __init__(self):
            super().__init__(2)
            self.register_buffer("level", torch.zeros(1))
            self.register_buffer("longer", torch.zeros(1))
            self.register_buffer("gone", torch.zeros(1))

        def forward(self, value):
            self.level = self.level * 0.5 + value.mean()
            self.longer = torch.cat([self.longer, value.mean()[None]])
            self.gone = None
            return super().forward(value)

    changed, plain = Changing(), Changing()
    pipeline = StagedPipeline([Stage("a", lambda: changed, apply)], policy="offload")
    for value in torch.randn(3, 5, 2):
        pipeline.run(value)
        plain(value)
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, changed.get_buffer(name)), name
    assert changed.gone is None


def test_plain_attributes_leave_the_device(gpu):
    class Caching(Counted):
        def forward(self, value):
            self.cache = [gpu.enter(value * 2)]
            return value + self.weight

    model = Caching()
    for policy in ("offload", "sequential"):
        pipeline = StagedPipeline([Stage("a", lambda: model, apply)], policy=policy)
        pipeline.run(torch.ones(2))
        assert gpu.held == 0
        assert model.cache[0].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("output", ["label", torch.ones(0), None])
def test_what_cannot_be_compared_is_no_error(output):
    stage = Stage("a", linear, lambda model, value: output, dtype=torch.bfloat16)
    plan = StagedPipeline([stage], "cpu").measure(torch.ones(1, 64))
    assert "a: in torch.bfloat16" in str(plan)


def test_a_comparison_leaves_the_generators_alone():
    """A stage that draws noise runs twice where its dtype is compared, and draws the same."""
    noise = []

    def run(model, value):
        noise.append(torch.rand(1).item())
        return value

    for dtype in (None, torch.bfloat16):
        torch.manual_seed(0)
        stages = [Stage("a", linear, run, dtype=dtype), Stage("b", linear, run)]
        StagedPipeline(stages, "cpu").measure(torch.ones(1, 64))
    without, with_comparison = noise[:2], noise[2:]
    assert with_comparison == [without[0], without[0], without[1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_module_that_others_hold_keeps_its_dtype(dtype):
    model = nn.Linear(64, 64)
    pipeline = StagedPipeline([Stage("a", lambda: model, apply, dtype=dtype)], "cpu", "sequential")
    for _ in range(2):
        pipeline.run(torch.ones(1, 64))
    assert model.weight.dtype == torch.float32


def test_one_module_layer_by_layer_in_two_stages():
    model = linear()
    stages = [Stage(name, lambda: model, apply, layerwise=True) for name in "ab"]
    pipeline = StagedPipeline(stages, "cpu", "resident")
    value = torch.randn(1, 64)
    for _ in range(2):
        assert torch.equal(pipeline.run(value), model(model(value)))
    pipeline.cleanup()
    assert not model._forward_hooks


def test_sparse_outputs():
    stage = Stage("a", linear, lambda model, value: model(value).to_sparse())
    assert StagedPipeline([stage], "cpu").run(torch.ones(1, 64)).is_sparse


def test_values_are_copied_only_where_something_changes():
    @dataclass
    class Doubles:
        x: torch.Tensor

        def __post_init__(self):
            self.x = self.x * 2

    stages = [
        Stage("a", nn.Identity, lambda model, x: Doubles(x)),
        Stage("b", nn.Identity, apply),
        Stage("c", nn.Identity, lambda model, value: value.x),
    ]
    assert StagedPipeline(stages, "cpu").run(torch.ones(1)).tolist() == [2.0]


def test_namespaces_and_mappings_are_moved(gpu):
    def run(model, value):
        assert value.x in gpu
        assert value.more["y"] in gpu
        return value.x + value.more["y"]

    value = SimpleNamespace(x=torch.ones(1), more=UserDict(y=torch.ones(1)))
    pipeline = StagedPipeline([Stage("a", nn.Identity, run)], policy="sequential")
    assert pipeline.run(value).tolist() == [2.0]
    assert value.x not in gpu


def test_inference_mode(gpu):
    with torch.inference_mode():
        stage = Stage("a", lambda: nn.BatchNorm1d(2).eval(), apply)
        StagedPipeline([stage], policy="offload").run(torch.ones(3, 2))


def test_what_is_passed_on_counts_once():
    """Each stage adds a tensor to a dictionary: predicted and measured agree."""

    def run(model, value):
        return {**value, f"o{len(value)}": torch.zeros(1000)}

    stages = [Stage(str(i), nn.Identity, run) for i in range(5)]
    value = {"x": torch.zeros(1000)}
    predicted = StagedPipeline(stages, "cpu").plan(value)
    assert [row.carried_in for row in predicted.stages] == [0, 4000, 8000, 12000, 16000]
    measured = StagedPipeline(stages, "cpu").measure(value)
    assert [row.carried_in for row in measured.stages] == [0, 4000, 8000, 12000, 16000]


def test_nothing_has_finished():
    def fail(model, value):
        raise ZeroDivisionError

    pipeline = StagedPipeline([Stage("a", nn.Identity, fail)], "cpu")
    with pytest.raises(ZeroDivisionError):
        pipeline.run(torch.ones(1))
    with pytest.raises(ValueError, match="stage 'a' has not finished; give its input again"):
        pipeline.run(resume=True)


def test_models_inside_of_other_objects_are_refused():
    stage = Stage("a", lambda: ("a tokenizer", linear()), apply)
    with pytest.raises(TypeError, match="a tuple that holds a Linear; return the module"):
        StagedPipeline([stage], "cpu", "sequential").run(torch.ones(1, 64))


def test_int8_is_planned_for_linear_layers_alone():
    def make():
        return nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 8))

    stage = Stage("a", make, apply, weights=make, dtype=torch.int8)
    pipeline = StagedPipeline([stage], "cpu", "lazy")
    planned = pipeline.plan().stages[0].weights
    pipeline.run(torch.ones(1, dtype=torch.long))
    assert pipeline.status()["a"].weights == planned


def test_a_status_does_not_change_later():
    pipeline = StagedPipeline(counted("a"), "cpu")
    before = pipeline.status()
    pipeline.run(torch.zeros(2))
    assert before["a"].runs == 0


def test_half_precision_that_overflows_is_named():
    stage = Stage("a", linear, lambda model, value: value * 1e5, dtype=torch.float16)
    pipeline = StagedPipeline([stage], "cpu", "sequential")
    pipeline.run(torch.ones(1, 64))
    assert "has numbers that are not finite" in str(pipeline.status())


def test_the_host_holds_what_lives_there_or_what_is_loaded():
    sizes = [StageSizes(n, {n: w}, 10) for n, w in (("a", 100), ("b", 30), ("c", 150))]
    plan = Plan(tuple(sizes), Room(budget=260, host=170))
    assert plan.modes == {"a": "offload", "b": "offload", "c": "resident"}
    assert plan.policy("auto").host == 150


def test_a_run_compares_nothing():
    """Only `measure` runs a stage with a dtype twice."""
    runs = []
    stage = Stage("a", linear, lambda model, x: runs.append(1) or model(x), dtype=torch.bfloat16)
    StagedPipeline([stage], "cpu").run(torch.ones(1, 64))
    assert len(runs) == 1


def test_a_file_may_go_once_its_model_is_loaded(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(linear().state_dict(), path)
    pipeline = StagedPipeline([Stage("a", linear, apply, weights=path)], "cpu", "resident")
    pipeline.run(torch.ones(1, 64))
    path.unlink()
    pipeline.run(torch.ones(1, 64))


def test_a_missing_file_names_its_stage(tmp_path):
    stage = Stage("a", linear, apply, weights=tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError) as error:
        StagedPipeline([stage], "cpu").plan()
    assert error.value.__notes__ == ["in stage 'a', while its weights were counted"]
