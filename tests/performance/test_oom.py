"""Steps and chunks survive an out-of-memory: same items, same weights, nothing kept."""

import copy
import gc
import logging
import os
import random
import subprocess
import sys
import traceback
import warnings
import weakref
from collections import deque, namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from tfswa_lab.memory.out_of_memory import log
from tfswa_lab.performance.oom import part_size, process_in_chunks, train_step

ERRORS = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    lambda: RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: not enough memory"
    ),
    MemoryError,
]


class InBackward(torch.autograd.Function):
    """An identity whose gradient needs more memory than there is."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, _gradient):
        raise ctx.error()


class Bench:
    """A network, an optimizer, and a loss that runs out of memory when it is told to.

    `place` is the item whose part fails, and where: "before", "after" or in "backward".
    """

    def __init__(self, between=nn.Tanh):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), between(), nn.Linear(8, 1)).double()
        self.optimizer = torch.optim.AdamW(self.net.parameters(), 0.05)
        self.place, self.error, self.failures = None, ERRORS[0], 0
        self.steps, self.parts, self.tensors = 0, [], []
        self.optimizer.register_step_post_hook(self.count)

    def count(self, *_):
        self.steps += 1

    def loss_of(self, part):
        self.parts.append(part[:, 0].tolist())
        item, where = self.place or (None, None)
        fails = item in self.parts[-1]
        if fails:
            self.place, self.failures = None, self.failures + 1
            assert not any(reference() is not None for reference in self.tensors)
        big = torch.ones(1000)
        self.tensors = [weakref.ref(big)] if fails else []
        if fails and where == "before":
            raise self.error()
        loss = (self.net(part) - 1).square().mean()
        if fails and where == "after":
            raise self.error()
        return InBackward.apply(loss, self.error) if fails else loss


def by_hand(bench, batches):
    """The weights of the same network after ordinary steps over whole batches."""
    net = copy.deepcopy(bench.net)
    optimizer = torch.optim.AdamW(net.parameters(), 0.05)
    for batch in batches:
        optimizer.zero_grad()
        (net(batch) - 1).square().mean().backward()
        optimizer.step()
    return net


def items(count, size=13):
    """Batches whose first column numbers their items."""
    generator = torch.Generator().manual_seed(1)
    batches = torch.rand(count, size, 3, generator=generator, dtype=torch.float64)
    batches[..., 0] = torch.arange(size)
    return batches


def distance(first, second):
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max((a - b).abs().max() for a, b in pairs)


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Old objects are frozen: each failure collects garbage, which need not search them."""
    train_step(Bench().loss_of, items(1)[0], Bench().optimizer)  # imports a lot
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def without_gc():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_gc")
def test_sixty_times_out_of_memory_in_two_hundred_steps_change_nothing():
    bench, batches, chance = Bench(), items(200), random.Random(0)
    expected, failing, kept = by_hand(bench, batches), set(chance.sample(range(200), 60)), []
    for step, batch in enumerate(batches):
        if step in failing:
            bench.place = chance.randrange(13), chance.choice(["before", "after", "backward"])
            bench.error = chance.choice(ERRORS)
        bench.parts.clear()
        train_step(bench.loss_of, batch, bench.optimizer, on_retreat=lambda *x: kept.append(x))
        used = [item for part in bench.parts for item in part]
        assert used[-13:] == list(range(13)), "the same items, in their order"
    assert (bench.failures, bench.steps, part_size(bench.optimizer)) == (60, 200, 1)
    assert distance(bench.net, expected) <= 1e-9
    assert [size for size, _ in kept] == [6, 3, *[1] * 58]
    assert not any(reference() is not None for reference in bench.tensors)
    assert "in loss_of" in "".join(traceback.format_exception(kept[0][1])), "kept, but empty"


def test_they_leave_nothing_in_memory(assert_no_leak, monkeypatch):
    monkeypatch.setattr(log, "disabled", True)  # pytest keeps all that is logged
    bench, (batch,) = Bench(), items(1)
    train_step(bench.loss_of, batch, bench.optimizer)

    def step():
        bench.place = 3, "backward"
        bench.parts.clear()
        train_step(bench.loss_of, batch, bench.optimizer)

    assert_no_leak(step)
    assert bench.failures >= 12


def test_without_an_out_of_memory_it_is_the_ordinary_step_to_the_bit():
    bench, batches = Bench(), items(5)
    expected = by_hand(bench, batches)
    for batch in batches:
        train_step(bench.loss_of, batch, bench.optimizer)
    assert distance(bench.net, expected) == 0
    assert part_size(bench.optimizer) is None


def test_the_smaller_size_is_kept_logged_and_said(caplog):
    bench, (batch,) = Bench(), items(1)

    def small(part):
        if len(part) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried …\nmore lines")
        return bench.loss_of(part)

    with caplog.at_level(logging.WARNING, "tfswa_lab"):
        loss = train_step(small, batch, bench.optimizer)
    logged = [record.getMessage() for record in caplog.records]
    assert logged == [
        f"memory ran out; trying again with at most {size} at once: CUDA out of memory. Tried …"
        for size in (6, 3)
    ]
    assert not loss.requires_grad
    train_step(small, batch[:2], bench.optimizer)
    train_step(small, batch, bench.optimizer)
    assert [len(part) for part in bench.parts] == [*[3] * 4, 1, 2, *[3] * 4, 1]
    assert part_size(bench.optimizer) == 3
    assert part_size(Bench().optimizer) is None, "each optimizer has its own"


def test_the_loss_is_the_mean_of_the_batch_and_inputs_and_targets_are_cut_together():
    bench, (batch,) = Bench(), items(1)
    pairs = TensorDataset(batch, batch.sum(1, keepdim=True))

    def loss_of(part):
        inputs, targets = part
        if len(inputs) > 5:
            raise MemoryError
        return (bench.net(inputs) - targets).square().mean()

    with torch.no_grad():
        expected = (bench.net(batch) - pairs.tensors[1]).square().mean()
    torch.testing.assert_close(train_step(loss_of, pairs, bench.optimizer), expected)


@pytest.mark.parametrize("floor", [1, 4, 100])
def test_at_the_floor_the_error_itself_comes_out_and_no_gradient_stays(floor):
    bench, (batch,) = Bench(), items(1)
    before, errors = copy.deepcopy(bench.net), []

    def loss_of(part):
        loss = bench.loss_of(part)
        if 12 in bench.parts[-1]:  # others have left their gradients
            errors.append(MemoryError("the last part"))
            raise errors[-1]
        return loss

    with pytest.raises(MemoryError, match="the last part") as raised:
        train_step(loss_of, batch, bench.optimizer, floor=floor)
    assert raised.value is errors[-1]
    tried = {1: [13, 6, 3, 1], 4: [13, 6, 4], 100: [13]}[floor]
    assert raised.value.__notes__ == [
        f"memory ran out with each of these sizes: {tried}; floor={floor}"
    ]
    assert distance(bench.net, before) == bench.steps == 0
    assert all(weight.grad is None for weight in bench.net.parameters())


def test_a_size_that_has_fitted_is_tried_again_but_not_for_ever():
    bench, (batch,), tries = Bench(), items(1), []
    train_step(bench.loss_of, batch, bench.optimizer)

    def never(part):
        tries.append(len(part))
        raise MemoryError

    with pytest.raises(MemoryError):
        train_step(never, batch, bench.optimizer)
    assert tries == [13, 6, 3, 1, 1, 1, 1]


def test_other_errors_come_out_at_once_without_half_a_gradient():
    bench, (batch,) = Bench(), items(1)

    def loss_of(part):
        bench.loss_of(part).backward()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train_step(loss_of, batch, bench.optimizer)
    assert len(bench.parts) == 1
    assert all(weight.grad is None for weight in bench.net.parameters())


def test_an_error_in_the_optimizers_step_is_never_repeated():
    bench, (batch,), calls = Bench(), items(1), []

    def step():
        calls.append([weight.grad.clone() for weight in bench.net.parameters()])
        raise torch.OutOfMemoryError("CUDA out of memory in Adam's state")

    with pytest.raises(torch.OutOfMemoryError) as raised:
        train_step(bench.loss_of, batch, bench.optimizer, step=step)
    assert not hasattr(raised.value, "__notes__")
    assert len(calls) == len(bench.parts) == 1


def test_a_step_that_is_tried_again_draws_the_same_dropout():
    steady, shaken = (Bench(nn.Dropout) for _ in range(2))
    ends = []
    for bench in (steady, shaken):
        torch.manual_seed(3)
        for batch in items(5):
            bench.place = None if bench is steady or not bench.steps else (2, "after")
            train_step(bench.loss_of, batch, bench.optimizer, floor=13)
        ends.append(torch.rand(1).item())
    assert shaken.failures == 4
    assert distance(steady.net, shaken.net) == 0
    assert ends[0] == ends[1]


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_in_training_mode_warns_once(training):
    bench = Bench(lambda: nn.BatchNorm1d(8))
    bench.net.train(training)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in items(3):
            bench.place = (0, "after") if bench.steps < 2 else None
            train_step(bench.loss_of, batch[:12], bench.optimizer)
    assert all(warning.filename == __file__ for warning in caught)
    said = [str(warning.message) for warning in caught]
    assert len(said) == training
    assert all(
        text.startswith("BatchNorm1d in training mode: the statistics of parts") for text in said
    )


def test_a_scaler_and_clipping_find_the_whole_gradient():
    ends = []
    for fails in (False, True):
        bench, (batch,) = Bench(), items(1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        bench.place = (7, "backward") if fails else None

        def step(bench=bench, scaler=scaler):
            scaler.unscale_(bench.optimizer)
            norm = nn.utils.clip_grad_norm_(bench.net.parameters(), 0.01)
            scaler.step(bench.optimizer)
            scaler.update()
            ends.append(norm)

        def backward(loss, scaler=scaler):
            scaler.scale(loss).backward()

        train_step(bench.loss_of, batch, bench.optimizer, backward=backward, step=step, size=8)
        assert bench.steps == 1
        assert bench.failures == fails
        ends.append(bench.net)
    torch.testing.assert_close(ends[0], ends[2])
    assert distance(ends[1], ends[3]) <= 1e-9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": []}, "the batch is empty"),
        ({"batch": {"mixture": torch.zeros(4)}}, r"a dictionary of \['mixture'\], which has no"),
        (
            {"batch": (torch.zeros(4, 2), torch.zeros(4))},
            "a tuple of 2 tensors",
        ),
        ({"floor": 0}, "floor=0 must be a whole number"),
        ({"size": 2.0}, "size=2.0 must be a whole number"),
    ],
)
def test_what_makes_no_step_is_refused(change, message):
    bench = Bench()
    with pytest.raises(ValueError, match=message):
        train_step(**{"loss_of": None, "batch": [1], "optimizer": bench.optimizer, **change})


PROCESS = """
import sys, torch
from torch import distributed, nn
from tfswa_lab.performance.oom import train_step

rank = int(sys.argv[1])
distributed.init_process_group("gloo", f"file://{sys.argv[2]}", rank=rank, world_size=2)
net = nn.parallel.DistributedDataParallel(nn.Linear(1, 1))
optimizer = torch.optim.SGD(net.parameters(), 0.1)
for name in ("all_reduce", "broadcast", "all_gather", "barrier", "all_gather_object"):
    setattr(distributed, name, None)  # whoever calls it fails

def loss_of(part):
    print("computed")
    if rank == 1:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return net(part).mean()

train_step(loss_of, torch.ones(4, 1), optimizer)
"""


def test_two_processes_are_both_refused_before_one_waits_for_the_other(tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), tmp_path / "meet"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in started:
        out, said = process.communicate(timeout=600)  # only against a hang
        assert process.returncode == 1
        assert not out, "nothing was computed"
        assert "is for one process, and here are 2: while one repeats its backward pass" in said


# Chunks ------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "twice more")


def nested(rows):
    return {"pair": Pair(2 * rows, (rows.sum(1),)), "same": rows}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("room", [1, 2, 50])
@pytest.mark.parametrize("kind", [torch.clone, list, iter, deque])
def test_chunks_give_what_all_items_give(size, room, kind):
    rows = torch.rand(7, 2)

    def fn(chunk):
        if len(chunk) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return nested(chunk if isinstance(chunk, torch.Tensor) else torch.stack(chunk))

    found, expected = process_in_chunks(fn, kind(rows), size), nested(rows)
    assert isinstance(found["pair"], Pair)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_chunk_too_large_is_halved_and_the_size_stays():
    sizes = []

    def fn(chunk):
        sizes.append(len(chunk))
        if len(chunk) > 3:
            raise MemoryError
        return chunk

    process_in_chunks(fn, torch.zeros(20), 16)
    assert sizes == [16, 8, 4, *[2] * 10]


def test_an_iterable_is_read_as_it_is_needed_and_its_items_are_let_go():
    read, alive = [], []

    def rows():
        for k in range(9):
            row = torch.full((2,), float(k))
            alive.append(weakref.ref(row))
            read.append(k)
            yield row
            del row

    def fn(chunk):
        assert len(read) <= chunk[-1][0] + 2
        assert sum(reference() is not None for reference in alive) <= 4
        return torch.stack(chunk)

    assert process_in_chunks(fn, rows(), 2)[:, 0].tolist() == list(range(9))


def test_no_graph_is_kept_and_results_own_their_memory():
    net, buffer = nn.Linear(2, 100), torch.empty(2, 1)

    def fn(chunk):
        with torch.enable_grad():
            wide = net(chunk)
        return {"view": wide[:, :1], "again": buffer[: len(chunk)].copy_(chunk[:, :1])}

    rows = torch.rand(5, 2)
    found = process_in_chunks(fn, rows, 2)
    assert not any(tensor.requires_grad for tensor in found.values())
    assert torch.equal(found["again"], rows[:, :1])
    net(found["view"].expand(5, 2)).sum().backward()  # not an inference tensor
    assert found["view"].untyped_storage().nbytes() == 5 * 4


def test_nothing_at_all():
    shapes = process_in_chunks(nested, torch.zeros(0, 3), 4)
    assert shapes["pair"].twice.shape == (0, 3)
    assert shapes["pair"].more[0].shape == (0,)
    for empty in ([], iter([])):
        assert process_in_chunks(torch.stack, empty, 4).shape == (0,)


@pytest.mark.parametrize("wrong", [torch.sum, lambda x: x[:1], lambda x: x.tolist(), lambda x: 3])
def test_results_that_depend_on_the_chunk_are_refused(wrong):
    with pytest.raises(ValueError, match=r"fn returned .* for 2 items: it must return tensors"):
        process_in_chunks(wrong, torch.zeros(4, 2), 2)


def test_there_is_no_room_for_one_item():
    def fn(chunk):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError) as raised:
        process_in_chunks(fn, torch.zeros(4), 3)
    assert "[3, 1]" in raised.value.__notes__[0]
    with pytest.raises(ZeroDivisionError):
        process_in_chunks(lambda x: 1 / 0, torch.zeros(4), 3)
    with pytest.raises(ValueError, match="size=0 must be"):
        process_in_chunks(nested, torch.zeros(4), 0)


@pytest.mark.parametrize("items", [{"a": torch.ones(2)}, (torch.ones(2), torch.ones(2))])
def test_chunks_of_several_inputs_are_refused(items):
    with pytest.raises(ValueError, match=r"items is a (dictionary|tuple)"):
        process_in_chunks(lambda x: x, items, 1)
