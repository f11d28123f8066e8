"""Which arguments `diagnose` refuses, which errors it survives, and what it leaves unchanged."""

import gc
import random
import subprocess
import sys
import threading
import tracemalloc
import uuid
from contextlib import suppress

import pytest
import torch
from planted import Training
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tfswa_lab.memory.leaks import diagnose
from tfswa_lab.memory.leaks.census import fills_up
from tfswa_lab.memory.leaks.traced_steps import FROZEN_BY_PYTHON, resting_gc


def lazy():
    yield torch.zeros(3)


async def asleep():
    torch.zeros(3)


def with_a_batch(batch):
    batch.sum()


@pytest.mark.parametrize(
    ("step", "options", "error", "message"),
    [
        (lazy, {}, ValueError, "nothing runs"),
        (lambda: lazy(), {}, ValueError, "nothing runs"),
        (asleep, {}, ValueError, "nothing runs"),
        (lambda x, y: None, {}, ValueError, "step needs x, y"),
        (nn.Linear(2, 2), {}, TypeError, "step is a network"),
        (torch.zeros(2), {}, TypeError, r"pass `lambda: train\(x\)`"),
        (print, {"steps": 3}, ValueError, "8 <= steps <= longest"),
        (print, {"steps": 12.0}, ValueError, "expected whole numbers"),
        (print, {"limit": True}, ValueError, "limit=True; expected bytes"),
        (print, {"steps": 50}, ValueError, "raise longest"),
        (print, {"model": "net"}, TypeError, "model='net'; expected a torch Module"),
        (print, {"optimizer": "adam"}, TypeError, "expected a torch Optimizer"),
        (print, {"limit": "8 GiB"}, ValueError, "expected bytes"),
        (print, {"limit": -1}, ValueError, "expected bytes"),
    ],
)
def test_bad_input_is_refused_in_words(step, options, error, message):
    with pytest.raises(error, match=message):
        diagnose(step, **options)


def test_a_step_that_wanted_a_batch_is_told_that_it_got_a_number():
    with pytest.raises(AttributeError) as raised:
        diagnose(with_a_batch)
    assert "its number, 0, as `batch`" in raised.value.__notes__[0]


def failing_at(step, error):
    calls = []

    def run():
        calls.append(1)
        if len(calls) > step:
            raise error
        torch.zeros(64)

    return run


def test_an_error_in_the_first_steps_is_raised():
    with pytest.raises(ZeroDivisionError):
        diagnose(failing_at(5, ZeroDivisionError()))


@pytest.mark.parametrize(
    ("error", "failed"),
    [(StopIteration(), False), (ValueError("odd"), True), (torch.OutOfMemoryError("all"), True)],
)
def test_an_error_in_later_steps_is_told(error, failed):
    found = diagnose(failing_at(14, error))
    assert f"step 14 ended with {type(error).__name__}" in found.evidence[-1]
    assert found.failed is failed
    assert not found.leaks


def test_a_cycle_is_found_though_the_data_end():
    def step(number):
        if number > 12:
            raise StopIteration
        circle = type("Circle", (), {})()
        circle.me, circle.data = circle, torch.zeros(100)

    assert diagnose(step).verdict == "reference cycle"


def test_more_than_the_limit_fails(assert_no_leak):
    step = failing_at(100, None)
    assert not assert_no_leak(step, limit=2**30).failed
    with pytest.raises(pytest.fail.Exception, match="activation peak"):
        assert_no_leak(step, limit=100)


def test_a_step_without_memory_fails(assert_no_leak):
    with pytest.raises(pytest.fail.Exception, match="step 0 ended with OutOfMemoryError"):
        assert_no_leak(failing_at(0, torch.OutOfMemoryError("all")))


def of_the_interpreter():
    flags = torch.backends.mkldnn
    return (
        *(gc.isenabled(), gc.get_freeze_count() > FROZEN_BY_PYTHON),
        *(gc.get_debug(), len(gc.garbage)),
        *(tracemalloc.is_tracing(), torch.is_grad_enabled()),
        *(flags.enabled, flags.deterministic, flags.allow_tf32),
    )


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", [Training(), lambda: None, failing_at(3, OSError()), interrupted])
def test_the_interpreter_is_as_it_was(step):
    before = of_the_interpreter()
    with suppress(OSError, KeyboardInterrupt):
        diagnose(step)
    assert of_the_interpreter() == before


@pytest.mark.parametrize(("frozen", "calls"), [(0, 1), (375, 1), (100_000, 0)])
def test_the_heap_is_frozen_unless_the_user_froze_it(monkeypatch, frozen, calls):
    """Python 3.12.1 starts with 375 frozen objects: no user's, or every step walks the heap."""
    counted = []
    monkeypatch.setattr(gc, "get_freeze_count", lambda: frozen)
    monkeypatch.setattr(gc, "freeze", lambda: counted.append("freeze"))
    monkeypatch.setattr(gc, "unfreeze", lambda: counted.append("unfreeze"))
    with resting_gc():
        assert counted == ["freeze"] * calls
    assert counted == ["freeze", "unfreeze"] * calls


AFTER_ASYNCIO = """
import asyncio, gc
from tfswa_lab.memory.leaks.referrers import untracked_containers

async def wait():
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, 1)
    await future

asyncio.run(wait())
for _ in range(3):
    untracked_containers((dict,))
    gc.collect()
print("done")
"""


def test_the_heap_of_a_notebook_can_be_looked_through():
    """Before Python 3.12.6, whoever asks what asyncio's module refers to never comes back."""
    command = [sys.executable, "-c", AFTER_ASYNCIO]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout == "done\n"


def test_tensors_that_an_export_left_behind_are_no_memory():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    left = mode.from_tensor(torch.zeros(3, 4, 5))  # with a formula for its size
    with mode:
        part = left[0, 0, 0]  # whose own size is known
    assert isinstance(part.untyped_storage().nbytes(), torch.SymInt)
    diagnosis = diagnose(Training())
    assert diagnosis.verdict == "healthy"
    assert "B" in str(diagnosis)


def test_garbage_that_others_keep_stays():
    gc.garbage.append("theirs")
    try:
        test_a_cycle_is_found_though_the_data_end()
        assert gc.garbage == ["theirs"]
    finally:
        gc.garbage.clear()


def test_it_works_in_a_thread():
    verdicts, kept = [], []
    steps = (Training(), lambda: kept.append(torch.zeros(64)))
    thread = threading.Thread(target=lambda: verdicts.extend(diagnose(s).verdict for s in steps))
    thread.start()
    thread.join()
    assert verdicts == ["healthy", "leak of tensors"]


class Keeper:
    limit = 1000

    def __init__(self):
        self.max_length, self.outputs = 10_000, []

    def __call__(self):
        self.outputs.append(torch.zeros(64))


by_step, by_chance, fast, sparse = {}, {}, [], []


def keyed_by_step_and_size(step):
    by_step[step, 64] = torch.zeros(64)


def new_keys_now_and_then():
    if random.random() < 0.5:
        by_chance[uuid.uuid4().hex] = torch.zeros(64)


def fast_at_first(step):
    fast.extend(torch.zeros(64) for _ in range(8 if step < 6 else 1))


def sparse_ones():
    sparse.append(torch.eye(100).to_sparse())


@pytest.mark.parametrize(
    "step",
    [Keeper(), keyed_by_step_and_size, new_keys_now_and_then, fast_at_first, sparse_ones],
)
def test_what_looks_bounded_and_is_not_is_a_leak(step):
    random.seed(0)
    assert diagnose(step).verdict == "leak of tensors"


def test_tensors_without_memory_are_no_leak():
    kept = []
    assert not diagnose(lambda: kept.append(torch.empty(1000, device="meta"))).leaks


@pytest.mark.parametrize("seed", range(5))
def test_a_cache_of_recurring_keys_is_told_from_new_keys_by_its_pace(seed):
    draw = random.Random(seed)
    told = {"recurring": 0, "new": 0}
    for _ in range(40):
        keys = [draw.randrange(30) for _ in range(40)]
        first = [step for step, key in enumerate(keys) if key not in keys[:step]]
        told["recurring"] += fills_up(first, 40)
        told["new"] += not fills_up([0, *(s for s in range(1, 40) if draw.random() < 0.5)], 40)
    assert told["recurring"] >= 36, "of 40"
    assert told["new"] >= 30


def test_a_large_leak_is_not_run_for_longer_than_a_gibibyte_allows():
    kept = []
    assert diagnose(lambda: kept.append(torch.empty(100 * 2**18))).verdict == "leak of tensors"
    assert 12 < len(kept) <= 12 + 10, "of 100 MiB each, whose pages are never touched"
