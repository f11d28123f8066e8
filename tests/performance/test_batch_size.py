"""The finder against brute force on a pretend GPU, and on a pretend machine without one."""

import gc
import itertools
import json
import math
import random
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from pretend_gpu import PretendGpu
from torch import nn

from tfswa_lab.memory import gauges
from tfswa_lab.performance import batch_size
from tfswa_lab.performance.batch_size import (
    BatchSize,
    Trial,
    _time_smaller,
    _Trials,
    find_batch_size,
    knee,
)
from tfswa_lab.performance.training_state import TrainingState

# Each out-of-memory error has all objects collected.
pytestmark = pytest.mark.usefixtures("new_objects_only")


class Training:
    """Adam on a pretend GPU: its state, and every third batch is a little longer."""

    def __init__(self, size, each=7, fixed=0, state=0, longer=0, **more):
        self.gpu, self.each, self.fixed = PretendGpu(size), each, fixed
        self.state, self.longer, self.sizes = state, longer, []
        self.net = nn.Linear(1, 1)
        self.optimizer = torch.optim.Adam(self.net.parameters())

    def step(self, n):
        self.sizes.append(n)
        longer = self.longer * (len(self.sizes) % 3 == 0)
        state = self.state if self.optimizer.state else 0
        with self.gpu.holding(self.fixed + state + n * (self.each + longer)):
            self.optimizer.zero_grad()
            self.net(torch.ones(1, 1)).sum().backward()
            self.optimizer.step()

    def find(self, **more):
        return find_batch_size(self.step, state=(self.net, self.optimizer), **more)


def true_maximum(training, up_to=10_000):
    """The largest size up to which all run, by formula and one by one."""
    each, most = training.each + training.longer, 0
    for n in range(1, up_to + 1):
        if training.fixed + training.state + n * each > training.gpu.size:
            break
        most = n
    return most


def searches(count=25):
    """Limits that are no powers of two, of all magnitudes."""
    draw = random.Random(0)
    for _ in range(count):
        each, most = draw.randrange(1, 500), int(2 ** draw.uniform(0, 12))
        fixed, state = draw.randrange(2000), draw.randrange(2000)
        size = fixed + state + most * each + draw.randrange(each)
        yield {"size": size, "each": each, "fixed": fixed, "state": state}


@pytest.mark.parametrize("numbers", list(searches()), ids=lambda numbers: numbers["size"])
def test_the_largest_is_that_of_brute_force_and_no_later_step_runs_out(numbers):
    training = Training(**numbers)
    found = training.find()
    assert found.largest == true_maximum(training)
    assert found.largest - found.value == math.floor(0.05 * found.largest)
    assert 1 <= found.knee <= found.value
    assert found.stopped_by == "memory"
    assert not training.optimizer.state
    failures = training.gpu.failures
    for _ in range(200):
        training.step(found.value)
    assert training.gpu.failures == failures


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_the_longest_batch_may_come_third(steps):
    training = Training(1000, each=10, longer=5)
    found = training.find(steps=steps)
    expected = 66 if steps > 2 else found.largest  # fewer steps may miss it: a trial has two
    assert found.largest == expected
    assert all(training.sizes.count(trial.size) >= 2 for trial in found.tried if trial.fits)


@pytest.mark.parametrize(
    ("minimum", "maximum"), list(itertools.product((1, 3, 37), (37, 64, 100, None)))
)
def test_no_try_leaves_the_range(minimum, maximum):
    training = Training(7 * 70)
    found = training.find(minimum=minimum, maximum=maximum)
    assert found.largest == min(70, maximum or 70)
    assert found.stopped_by == ("maximum" if maximum in (37, 64) else "memory")
    assert found.value == (found.largest if found.stopped_by == "maximum" else max(minimum, 67))
    assert min(training.sizes) == minimum
    assert max(training.sizes) <= (maximum or math.inf)


def test_a_search_that_nothing_stops_ends(monkeypatch):
    monkeypatch.setattr(batch_size, "LIMIT", 1000)
    training = Training(10**9)
    found = training.find()
    assert (found.value, found.stopped_by) == (1000, "maximum")
    assert len(found.tried) <= 11


@pytest.mark.parametrize("predicted", [0, 1, 2, 30, 66, 67, 70, 71, 90, 5000, "fails"])
def test_a_prediction_only_guides(monkeypatch, predicted):
    """Whatever it says, the answer is the same; a good one saves tries."""

    def prediction(make_step, budget, slack):
        random.random(), torch.rand(1)
        assert budget > 0
        if predicted == "fails":
            raise NotImplementedError("a kernel\nthat is not known")
        return predicted

    monkeypatch.setattr(batch_size, "max_batch_size", prediction)
    training = Training(7 * 70)
    before = random.getstate(), torch.get_rng_state()
    found = training.find(make_step=lambda n: None)
    assert (found.largest, found.value) == (70, 67)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert ("no prediction" in found.notes[0]) == (predicted == "fails")
    plain = Training(7 * 70).find()
    if predicted in (67, 70, 71):
        assert len(found.tried) < len(plain.tried)


def test_a_real_prediction():
    net = nn.Linear(100, 100)

    def make_step(n):
        inner = nn.Linear(100, 100)
        return lambda: inner(torch.ones(n, 100)).sum().backward()

    found = find_batch_size(
        lambda n: net(torch.ones(n, 100)), state=net, make_step=make_step, maximum=4
    )
    assert (found.value, found.stopped_by) == (4, "maximum")
    assert found.notes[0].startswith("predicted to fit in")


def test_more_memory_for_a_smaller_size_is_found_out_by_a_trial():
    """As when a library chooses a hungrier algorithm: 100 fits, 91 to 95 do not."""
    gpu, net = PretendGpu(100), nn.Linear(1, 1)

    def step(n):
        with gpu.holding(101 if 91 <= n <= 95 else n):
            pass

    found = find_batch_size(step, state=net)
    assert found.largest == 100
    assert found.value == 87  # 95, 91 and 87
    assert {trial.size: trial.fits for trial in found.tried}[found.value]


@pytest.mark.parametrize("place", ["step", "validate"])
@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt(), SystemExit(3)])
def test_other_errors_come_out_unchanged_and_leave_no_trace(place, error):
    training = Training(10**6, state=3)
    training.net.eval()

    def fails(n):
        training.net.train(), torch.rand(1), random.random()
        training.step(n)
        if n == 4:
            raise error

    before = random.getstate(), torch.get_rng_state(), training.net.weight.clone()
    with pytest.raises(type(error)) as caught:
        find_batch_size(
            fails if place == "step" else training.step,
            state=(training.net, training.optimizer),
            validate=fails if place == "validate" else None,
        )
    assert caught.value is error
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert torch.equal(training.net.weight, before[2])
    assert not training.net.training
    assert training.net.weight.grad is None
    assert not training.optimizer.state


def test_validation_counts():
    training = Training(1000, each=10)

    def validate(n):
        training.net.eval()
        with training.gpu.holding(n * 25):
            pass

    found = training.find(validate=validate)
    assert (found.largest, found.value) == (40, 38)
    assert training.net.training


def test_failed_steps_are_dead_before_the_next_try():
    net, made = nn.Linear(1, 1), []

    def step(n):
        assert all(tensor() is None for tensor in made)
        big = torch.zeros(10)
        if n > 5:
            made.append(weakref.ref(big))
            raise torch.OutOfMemoryError("CUDA out of memory")

    gc.disable()
    try:
        assert find_batch_size(step, state=net).largest == 5
    finally:
        gc.enable()
    assert made


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 "
            "GiB of which 3.25 MiB is free.",
            "batch of 2 fits: it asked for 20.00 MiB, and 3.25 MiB were free",
        ),
        (
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000000000000 bytes",
            r"batch of 2 fits: it asked for 8000000000000 bytes, and [\d.]+ \w+ were free",
        ),
        ("cuFFT error: CUFFT_ALLOC_FAILED", r"more memory than there was \(cuFFT error"),
    ],
)
def test_nothing_fits(text, said):
    made = []

    def step(n):
        big = torch.zeros(10)
        made.append(weakref.ref(big))
        raise RuntimeError(text)

    with pytest.raises(RuntimeError, match=said) as caught:
        find_batch_size(step, state=nn.Linear(1, 1), minimum=2)
    assert str(caught.value.__cause__) == text
    assert [tensor() for tensor in made] == [None]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"minimum": value} for value in (0, -1, True, 1.5, "2", 2**21)),
        *({"maximum": value} for value in (0, False, 2.0)),
        *({"steps": value} for value in (0, True, 1.5)),
        *({"margin": value} for value in (-0.1, 1, 1.5, True, "5%", math.nan)),
        {"minimum": 8, "maximum": 7},
        {"state": [3]},
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_named(wrong):
    (name,) = wrong.keys() - {"maximum" if len(wrong) > 1 else ""}
    tried = []
    with pytest.raises(ValueError, match=name):
        find_batch_size(tried.append, **{"state": nn.Linear(1, 1), **wrong})
    assert not tried


# Without a GPU -----------------------------------------------------------------------------------


class Ram:
    """A pretend machine without a GPU, which kills a process that takes all of its RAM."""

    def __init__(self, size, each, fixed=1000, library=0):
        self.size, self.each, self.fixed, self.library = size, each, fixed, library
        self.used = self.peak = fixed

    def step(self, n):
        need = self.fixed + self.library + n * self.each
        assert need < self.size, f"killed at {n}"
        self.peak = max(need, self.peak)

    def install(self, monkeypatch):
        monkeypatch.setattr(gauges, "process_rss", lambda: self.used)
        monkeypatch.setattr(gauges, "process_peak", lambda: self.peak)
        monkeypatch.setattr(gauges, "host_available", lambda: self.size - self.used)
        monkeypatch.setattr(batch_size, "_left_in_cgroups", list)
        monkeypatch.setattr(batch_size, "_reset_peak", self.reset)
        monkeypatch.setattr(batch_size, "_uses_cuda", lambda: False)

    def reset(self):
        self.peak = self.used


@pytest.mark.parametrize("library", [0, 5_000])
@pytest.mark.parametrize("predicted", [None, 3, 5000])
def test_without_a_gpu_no_size_is_run_that_would_end_the_process(monkeypatch, library, predicted):
    ram = Ram(100_000, each=77, library=library)
    ram.install(monkeypatch)
    monkeypatch.setattr(batch_size, "max_batch_size", lambda make_step, budget, slack: predicted)
    make_step = predicted and (lambda n: None)
    found = find_batch_size(ram.step, state=nn.Linear(1, 1), make_step=make_step)
    fits = (0.9 * (ram.size - ram.used) - library) // ram.each
    assert abs(found.largest - fits) <= 1
    assert found.stopped_by == "memory"
    assert found.not_run
    assert not {trial.size for trial in found.tried if trial.fits} & set(found.not_run)
    assert "not run" in str(found)


def test_a_containers_limit_counts(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert batch_size._left_in_cgroups(tmp_path) == [450]
    (tmp_path / "memory.max").write_text("max\n")
    assert batch_size._left_in_cgroups(tmp_path) == []
    old = tmp_path / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("2000\n")
    (old / "memory.usage_in_bytes").write_text("700\n")
    (old / "memory.stat").write_text("total_inactive_file 100\n")
    assert batch_size._left_in_cgroups(tmp_path) == [1400]
    mine = tmp_path / "slice/job"
    mine.mkdir(parents=True)
    for name, text in {"max": "900\n", "current": "500\n", "stat": "inactive_file 0\n"}.items():
        (mine / f"memory.{name}").write_text(text)
    process = tmp_path / "process"
    process.write_text("4:memory:/\n0::/slice/job\n")
    assert sorted(batch_size._left_in_cgroups(tmp_path, process)) == [400, 1400]


# The result --------------------------------------------------------------------------------------


def test_the_knee():
    def seconds(n):
        return 0.010 + 0.001 * min(n, 32) + 0.003 * max(0, n - 32)

    sizes = [1, 2, 4, 8, 16, 32, 64, 128]
    assert knee([(n, seconds(n)) for n in sizes]) == 32
    assert knee([(n, seconds(n), "more") for n in reversed(sizes)]) == 32
    assert knee([(7, 1.0)]) == 7
    assert knee([(n, 1.0) for n in sizes]) == 128
    assert knee([(n, n / 100) for n in sizes]) == 1
    for wrong in ([], [(1, 0.0)], [(0, 1.0)]):
        with pytest.raises(ValueError, match=r"above 0|no rows"):
            knee(wrong)


def test_sizes_that_a_prediction_leapt_over_are_timed_down_to_the_knee(monkeypatch):
    """Seconds of a clock that only the steps move: the knee is near 16, far below the largest."""
    now, training = [0.0], Training(7 * 105)

    def seconds(n):
        return 0.010 + 0.001 * min(n, 16) + 0.003 * max(0, n - 16)

    def step(n):
        training.step(n)
        now[0] += seconds(n)

    monkeypatch.setattr(batch_size.time, "perf_counter", lambda: now[0])
    state = (training.net, training.optimizer)
    found = find_batch_size(step, state=state, minimum=5)
    assert found.largest == 105
    assert found.knee == 20  # of 5, 10, 20, 40, 80 and those near 100
    trials = _Trials(step, None, 2, TrainingState(state))
    trials.run_first(5)
    assert trials.fits(100)
    _time_smaller(trials, 5, 100)
    assert sorted(trials.done) == [5, 6, 12, 25, 50, 100]


def test_the_result_prints_as_a_table():
    tried = [Trial(n, n <= 900, n / 1000 if n <= 900 else None, n * 2**20) for n in range(1, 1000)]
    found = BatchSize(900, 855, 1, tuple(tried), "memory", (901,), ("a note",) * 9)
    lines = str(found).splitlines()
    assert len(lines) <= 25
    assert "batch size 855" in lines[0]
    assert max(map(len, lines)) <= 110
    for size, outcome in ((1, "fits"), (855, "fits"), (900, "fits"), (901, "not run")):
        assert any(line.split()[:2] == [str(size), outcome.split()[0]] for line in lines), size
    assert "855.00 MiB" in str(found)
    assert repr(found) == "BatchSize(value=855, knee=1, largest=900, stopped_by='memory')"
    assert found._repr_html_().count("<tr>") == 1000


# Several processes -------------------------------------------------------------------------------


def test_two_processes_get_the_smaller_answer_or_both_an_error(tmp_path):
    script = Path(__file__).with_name("gloo_batch_size.py")
    commands = [[sys.executable, script, tmp_path, str(rank)] for rank in (0, 1)]
    ranks = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=600) for process in ranks] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert "all_ranks=True" in first["alone"] == second["alone"]
    assert first["together"] == second["together"] == [100, 95, "memory"]
    assert second["error"].startswith("ZeroDivisionError")
    assert "failed on rank 1 (ZeroDivisionError" in first["error"]
    assert "not even a batch of 1 fits: it asked for 9000 bytes" in second["nothing"]
    assert second["nothing"].split(": ", 1)[1] in first["nothing"]
    assert second["number"].startswith("ValueError: minimum=0")
    assert "failed on rank 1 (ValueError" in first["number"]
