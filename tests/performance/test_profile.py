"""Planted steps have known verdicts; counts are those of arithmetic, trees those of the program."""

import gzip
import itertools
import json
import time
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile as torch_profile
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

import tfswa_lab.performance.profile
from tfswa_lab.performance import rates
from tfswa_lab.performance.events import DATA, MODULE, STEP, loading, marked_loaders, read, record
from tfswa_lab.performance.profile import OUTSIDE, profile
from tfswa_lab.performance.rates import Work, bytes_of
from tfswa_lab.performance.timing import benchmark

room = tfswa_lab.performance.profile

pytestmark = pytest.mark.usefixtures("one_thread")


class Sleeping(Dataset):
    """Its items take 20 ms each, in which nothing computes."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        time.sleep(0.02)
        return torch.ones(4)


def sleeping_loader():
    batches = iter(DataLoader(Sleeping(), batch_size=1))
    return lambda: next(batches) + 1


def tiny_kernels():
    one = torch.ones(1)

    def step():
        for _ in range(2000):
            one.neg_()

    return step


def large_copy():
    source, target = torch.ones(2**25), torch.zeros(2**25)
    return lambda: target.copy_(source)


def large_product():
    left, right = torch.ones(1024, 1024), torch.ones(1024, 1024)
    return lambda: left @ right


@pytest.mark.parametrize(
    ("make", "verdict", "part"),
    [
        (sleeping_loader, "Data-bound", "waiting"),
        (tiny_kernels, "Launch-bound", "host"),
        (large_copy, "Memory-bound", "kernels"),
        (large_product, "Compute-bound", "kernels"),
    ],
)
def test_four_planted_steps_give_the_four_hints(make, verdict, part):
    rates._gemm_rate.cache_clear()  # another program may have begun or ended since
    rates._copy_rate.cache_clear()
    found = profile(make(), steps=3, warm_up=1)
    assert sum(found.shares) == pytest.approx(1)
    assert getattr(found.shares, part) > 0.5
    assert found.hints()[0].startswith(verdict)
    assert f"{getattr(found.shares, part):.0%}" in found.hints()[0]
    assert len(found.hints()) <= 3


def test_batches_that_nobody_marks_are_seen_asleep():
    batches = iter(lambda: time.sleep(0.02) or torch.ones(4), None)
    hint = profile(lambda: next(batches) + 1, steps=2, warm_up=0).hints()[0]
    assert hint.startswith("Data-bound, it seems")
    assert "loading(batches)" in hint


def test_work_in_python_is_no_launch():
    x = torch.ones(1)
    found = profile(lambda: x.neg_().add_(sum(range(200_000))), steps=2, warm_up=0)
    assert found.hints()[0].startswith("Host-bound")


def test_batches_that_no_loader_makes_are_data_too():
    batches = loading(iter(lambda: time.sleep(0.02) or torch.ones(4), None))
    assert profile(lambda: next(batches) + 1, steps=2, warm_up=0).shares.waiting > 0.6


def test_what_a_dataset_computes_is_neither_kernel_nor_work():
    class Computing(Sleeping):
        def __getitem__(self, index):
            return torch.ones(200, 200) @ torch.ones(200, 200)

    batches = iter(DataLoader(Computing(), batch_size=1))
    found = profile(lambda: next(batches).neg_(), steps=2, warm_up=0)
    assert [row.name for row in found.operators] == ["aten::neg_"]
    assert found.flops == 0
    assert found.bytes == 2 * 4 * 200 * 200
    assert found.launches == 1


# Modules -----------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A module that is used twice and has two names, one that calls itself, and one that fails."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Linear(8, 8)
        self.again = self.twice
        self.nested = Nested()
        self.fails = Fails()

    def forward(self, x):
        x = self.again(self.twice(x))
        try:
            self.fails(x)
        except ValueError:
            x = x.cos()
        return self.nested(x, 3)


class Nested(nn.Module):
    def forward(self, x, depth):
        return self(x.sin(), depth - 1) if depth else x


class Fails(nn.Module):
    def forward(self, x):
        raise ValueError(x.tan().shape)


def test_modules_used_twice_recursion_and_exceptions():
    net, x = Odd(), torch.ones(4, 8)
    before = nn.Module.__call__, DataLoader.__iter__
    found = profile(lambda: net(x).sum().backward(), steps=2, warm_up=1)
    assert (nn.Module.__call__, DataLoader.__iter__) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    rows = {row.name: row for row in found.modules}
    calls = {name: row.calls for name, row in rows.items()}
    assert calls == {"Odd": 1, "twice": 2, "nested": 4, "fails": 1, OUTSIDE: 0}
    assert rows["nested"].seconds == pytest.approx(rows["nested"].own_seconds)  # counted once
    own = sum(row.own_seconds for row in rows.values())
    assert own == pytest.approx(rows["Odd"].seconds + rows[OUTSIDE].seconds)
    forward = (event for event in found._recording.events if not event.is_backward)
    places = {event.name: event.modules[-1:] for event in forward}
    assert places["aten::tan"] == ("fails",)
    assert places["aten::cos"] == ("Odd",)
    assert places["aten::sin"] == ("nested",)


def test_a_backward_pass_belongs_to_the_modules_that_made_its_nodes():
    net = nn.Sequential(nn.Conv1d(2, 2, 3), nn.Tanh(), nn.Sequential(nn.Linear(6, 1), nn.Sigmoid()))
    x = torch.ones(1, 2, 8)
    events = record(lambda: net(x).square().sum().backward(), 2).events
    places = {e.name: e.modules for e in events if e.is_backward}
    assert places["aten::convolution_backward"] == ("Sequential", "0")
    assert places["aten::tanh_backward"] == ("Sequential", "1")
    assert places["aten::sigmoid_backward"] == ("Sequential", "2", "2.1")
    assert places["PowBackward0"] == ()


def test_a_compiled_step_is_compiled_without_the_marks():
    net = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), backend="eager")
    found = profile(lambda: net(torch.ones(2, 4)), steps=2, warm_up=1)
    assert {row.name: row.calls for row in found.modules} == {"OptimizedModule": 1, OUTSIDE: 0}
    assert found.flops == 2 * 2 * 4 * 4


def test_an_error_of_the_step_comes_out_and_leaves_nothing():
    before = nn.Module.__call__, DataLoader.__iter__
    net = Fails()
    with pytest.raises(ValueError, match="Size"):
        profile(lambda: net(torch.ones(3)))
    calls = itertools.count()

    def fails_later():
        if next(calls) == 5:  # under the profiler
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        profile(fails_later, steps=2, warm_up=1)
    assert (nn.Module.__call__, DataLoader.__iter__) == before
    profile(lambda: torch.ones(2) + 1, steps=1, warm_up=0)  # the profiler was stopped


def test_refuses_too_few_steps_and_too_little_data():
    for call in (profile, room):  # the module is called where its name was imported
        with pytest.raises(ValueError, match="steps=0"):
            call(lambda: None, steps=0)
    batches = iter(DataLoader(torch.ones(3, 2)))
    with pytest.raises(ValueError, match=r"ran out of data .* calls it 7 times"):
        profile(lambda: next(batches) + 1, steps=2, warm_up=1)


def test_refuses_to_share_torchs_profiler():
    """Two at once would both lose their events."""

    def profiled():
        with torch_profile():
            torch.ones(2) + 1

    with pytest.raises(RuntimeError, match="the step runs torch's profiler itself"):
        profile(profiled, steps=1, warm_up=0)
    for measure in (lambda: profile(lambda: torch.ones(2) + 1, steps=1), lambda: benchmark(int)):
        with torch_profile() as profiler:
            torch.ones(2) + 1
            with pytest.raises(RuntimeError, match="profiler is running"):
                measure()
        assert "aten::add" in {row.key for row in profiler.key_averages()}


def test_refuses_a_device_that_it_does_not_know(monkeypatch):
    class Played(Work):
        def _count(self, *_):
            self.devices.add("mps")

    monkeypatch.setattr(room, "Work", Played)
    with pytest.raises(ValueError, match="tensors on mps; a profile knows cpu and cuda"):
        profile(lambda: torch.ones(2) + 1, steps=1, warm_up=0)


def test_a_step_that_does_nothing():
    found = profile(lambda: None, steps=1, warm_up=0)
    assert found.operators == []
    assert found.bytes_per_second == found.flops_per_second == 0
    assert found.hints()[0].startswith("Host-bound")


# Counting ----------------------------------------------------------------------------------------


def test_bytes_by_hand():
    a, b = torch.ones(10, 20), torch.ones(20)
    with Work() as work:
        c = a + b  # 800 + 80 in, 800 out
        c.mul_(a)  # 800 + 800 in, 800 out
        c.copy_(a)  # 800 in, 800 out
        c.zero_()  # 800 out
        c.view(20, 10).t().unsqueeze(0)  # views
        torch.empty_like(a)
        c.t().reshape(-1)  # a copy: 800 in, 800 out
    assert {name: size for name, size in work.bytes.items() if size} == {
        "aten::add": 1680,
        "aten::mul_": 2400,
        "aten::copy_": 1600,
        "aten::zero_": 800,
        "aten::clone": 1600,
    }
    assert bytes_of(torch.zeros(0, 3).expand(5, 0, 3)) == 0
    assert bytes_of(torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])) == 72


def test_flops_are_torchs_and_those_of_fused_attention_are_of_its_formula():
    net = nn.Sequential(nn.Conv1d(3, 4, 5, padding=2), nn.Linear(16, 8))
    x = torch.ones(2, 3, 16)
    with Work() as work, FlopCounterMode(display=False) as torchs:
        net(x).sum().backward()
    assert work.flops.total() == torchs.get_total_flops() > 0
    q, k, v = (torch.ones(2, 3, 7, 8, requires_grad=True) for _ in range(3))
    counts = []
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(kernel), Work() as work:
            nn.functional.scaled_dot_product_attention(q, k, v)
        counts.append(work.flops.total())
    assert counts == [2 * 2 * (2 * 3) * 7 * 7 * 8] * 2


def test_flops_count_by_dtype_also_without_gradients():
    x = torch.ones(6, 5)
    with Work() as work, torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        nn.functional.linear(x, torch.ones(4, 5))
    assert work.flops == {("aten::mm", torch.bfloat16): 2 * 6 * 5 * 4}


def test_the_length_of_intervals_is_that_of_a_grid():
    random = np.random.default_rng(0)
    for _ in range(50):
        starts = random.integers(0, 100, size=8)
        intervals = [(start, start + random.integers(0, 30)) for start in starts.tolist()]
        covered = {second for start, stop in intervals for second in range(start, stop)}
        assert room._length(intervals) == len(covered)


# A GPU that is played ----------------------------------------------------------------------------


def played(name, start, stop, kind="user_annotation", thread=1, **known):
    """An event as torch's profiler returns them, times in seconds."""
    values = {
        "name": name,
        "start_ns": start * 10**9,
        "end_ns": stop * 10**9,
        "duration_ns": (stop - start) * 10**9,
        "activity_type": kind,
        "start_thread_id": thread,
        "end_thread_id": thread,
        "sequence_nr": -1,
        "fwd_thread_id": 0,
        "correlation_id": 0,
        "linked_correlation_id": 0,
    } | known
    return SimpleNamespace(**{key: lambda value=value: value for key, value in values.items()})


def played_step(at):
    """100 s: 20 wait for data, 5 of them while a kernel runs; kernels run for 35, 5 of them twice.

    The backward pass is on a thread of its own, as on CUDA.
    """
    return [
        played(STEP, at, at + 100),
        played(DATA, at + 10, at + 30),
        played("aten::mm", at + 11, at + 12, "cpu_op", correlation_id=at + 9),  # the loader's
        played(MODULE + "a", at + 40, at + 50),
        played("aten::mm", at + 41, at + 42, "cpu_op", correlation_id=at + 1, sequence_nr=at),
        played(
            "autograd::engine::evaluate_function: MmBackward0",
            *(at + 50, at + 60, "cpu_op", 2),
            **{"sequence_nr": at, "fwd_thread_id": 1},
        ),
        played("aten::bmm", at + 51, at + 52, "cpu_op", 2, correlation_id=at + 2),
        played("cudaLaunchKernel", at + 51, at + 52, "cuda_runtime", 2),
        played("k1", at + 25, at + 45, "kernel", 7, linked_correlation_id=at + 1),
        played("k2", at + 60, at + 75, "kernel", 7, linked_correlation_id=at + 2),
        played("k3", at + 70, at + 75, "gpu_memcpy", 8, linked_correlation_id=at + 2),
        played(STEP, at, at + 100, "gpu_user_annotation", 7),
    ]


def test_a_gpus_kernels_belong_to_operators_and_modules(monkeypatch):
    events = [event for at in (0, 100, 200) for event in played_step(at)]
    results = SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events))
    recording = read(SimpleNamespace(profiler=results))
    assert len(recording.steps) == 2
    assert [end - start for start, end in recording.kernels] == [20, 15, 5] * 2
    monkeypatch.setattr(room, "measured_costs", lambda: room.Costs(0.5, 0.0, 0.0))
    monkeypatch.setattr(room, "measured_rates", lambda *_: SimpleNamespace(bytes=1.0, flops=1.0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    work = Work()
    work.calls.update({"aten::mm": 1, "aten::bmm": 2})  # bmm ran once: what it did is unknown
    work.bytes.update({"aten::mm": 40, "aten::bmm": 1000})
    work.flops.update({("aten::mm", torch.float32): 60, ("aten::bmm", torch.float16): 1000})
    work.devices = {"cuda"}
    found = room._evaluate(recording, work, 100.0, 100.0)
    assert found.shares == pytest.approx((0.15, 0.50, 0.35))
    assert (found.kernel_seconds, found.counted) == (20, 0.5)
    assert (found.bytes_per_second, found.flops_per_second, found.dtype) == (2, 3, torch.float32)
    operators = {row.name: (row.seconds, row.calls) for row in found.operators}
    assert operators == {"aten::mm": (20, 1), "aten::bmm": (20, 1)}
    modules = {row.name: (row.seconds, row.own_seconds) for row in found.modules}
    assert modules == {"a": (40, 40), OUTSIDE: (0, 0)}
    assert found.device == "a GPU"
    tree = room.flame_tree(recording, on_gpu=True)
    assert tree.inside["backward"].inside["a"].milliseconds == 20_000


def test_a_gpu_whose_kernels_nobody_sees_is_an_error():
    recording = record(lambda: torch.ones(2) + 1, 1)
    work = Work()
    work.devices = {"cuda", "cpu"}
    with pytest.raises(RuntimeError, match="saw no kernel"):
        room._evaluate(recording, work, 1.0, 1.0)


# What is shown and written -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(12)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    batches = loading(itertools.cycle(DataLoader(torch.ones(8, 16), batch_size=4)))

    def step():
        optimizer.zero_grad()
        net(next(batches)).square().mean().backward()
        optimizer.step()

    return profile(step, steps=2, warm_up=1)


def test_a_profile_is_short(trained):
    text = str(trained)
    assert len(text.splitlines()) <= 25
    assert max(map(len, text.splitlines()[3:17])) <= 100
    assert "\n" not in repr(trained)
    assert "aten::addmm" in text
    assert "times as long" in text
    html = trained._repr_html_()
    assert html.count("<table>") == 2
    assert "<li>" in html
    assert trained.overhead > 0
    assert {row.name for row in trained.modules} >= {"Optimizer.step", "Optimizer.zero_grad", "11"}


def test_the_flame_chart_is_as_wide_as_the_step(trained):
    fig, ax = plt.subplots()
    assert trained.flame(ax) == (fig, ax)
    assert "(ms)" in ax.get_xlabel()
    lowest = [bar for bar in ax.patches if bar.get_y() == -0.5]
    whole = ax.get_xlim()[1]
    assert 0 < sum(bar.get_width() for bar in lowest) <= whole * 1.0001
    names = {text.get_text() for text in ax.texts}
    assert any(name and "backward".startswith(name) for name in names)
    assert any(name and "Sequential".startswith(name) for name in names)
    plt.close(fig)


def test_the_trace_is_whole_or_absent(trained, tmp_path, monkeypatch):
    path = trained.chrome_trace(tmp_path / "trace.json")
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert {"aten::addmm", f"{MODULE}11", DATA} <= names
    packed = trained.chrome_trace(tmp_path / "trace.json.gz")
    assert gzip.decompress(packed.read_bytes()) == path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        trained.chrome_trace(path)
    monkeypatch.undo()
    assert json.loads(path.read_text())
    assert len(list(tmp_path.iterdir())) == 2


def test_loaders_are_as_before():
    with marked_loaders():
        assert len(list(DataLoader(torch.ones(4, 1)))) == 4
    assert DataLoader.__iter__.__name__ == "__iter__"


@pytest.mark.gpu
def test_planted_steps_on_a_gpu():
    left = torch.ones(4096, 4096, device="cuda")
    one, large = torch.ones(1, device="cuda"), torch.ones(2**28, device="cuda")
    target = torch.empty_like(large)
    steps = {
        "Compute-bound": lambda: left @ left,
        "Memory-bound": lambda: target.copy_(large),
        "Launch-bound": lambda: [one.neg_() for _ in range(2000)],
    }
    for verdict, step in steps.items():
        found = profile(step, steps=3)
        assert found.hints()[0].startswith(verdict)
        assert found.device == torch.cuda.get_device_name()
        assert sum(found.shares) == pytest.approx(1)
