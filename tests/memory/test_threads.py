"""What threads and forked children do under a trace: the table of one thread, and nothing stays."""

import gc
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from queue import Queue

import pytest
import torch
from planted import batch, network
from test_tracer import Net, table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from tfswa_lab.memory.leaks import diagnose
from tfswa_lab.memory.trace import trace


class Subclass(threading.Thread):
    """As prefetching threads are written."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def run(self):
        self.result = self.function()


def in_subclass(function):
    thread = Subclass(function)
    thread.start()
    thread.join()
    return thread.result


def in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def in_new_executor(function):
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function).result()


def in_main(function):
    return function()


EXECUTOR, POOL = ThreadPoolExecutor(1), ThreadPool(1)  # older than any trace


def teardown_module():
    EXECUTOR.shutdown()
    POOL.terminate()


WAYS = {
    "a thread": in_thread,
    "a subclass": in_subclass,
    "a new executor": in_new_executor,
    "an older executor": lambda function: EXECUTOR.submit(function).result(),
    "map of an executor": lambda function: next(EXECUTOR.map(lambda _: function(), [0])),
    "a pool": lambda function: POOL.apply(function),
    "map of a pool": lambda function: POOL.map(lambda _: function(), [0])[0],
    "imap of a pool": lambda function: next(POOL.imap(lambda _: function(), [0])),
}


def training(run):
    """A step whose layers, loss and update run wherever `run` runs a function."""
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), foreach=False)

    def step(x):
        hidden = run(lambda: net.wide(x).relu())
        loss = run(lambda: net.narrow(hidden).square().mean())
        loss.backward()
        run(lambda: optimizer.step())
        optimizer.zero_grad()

    with trace(net, optimizer) as seen:
        for _ in range(3):
            seen.step()
            step(run(lambda: torch.randn(64, 32)))
    return table(seen.timeline())


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_threads_give_the_table_of_one_thread(way):
    assert training(way) == training(in_main)


def replicas(run_all):
    """Two replicas of a network, as `nn.DataParallel` runs them, and a loss of both."""
    torch.manual_seed(0)
    nets = nn.ModuleList([Net(), nn.Sequential(nn.Linear(32, 32), nn.Tanh())])
    x = torch.randn(8, 32)
    with trace(nets, inputs=[x]) as seen:
        for _ in range(2):
            seen.step()
            y = run_all([lambda net=net: net(x) for net in nets])
            (y[0] * y[1]).sum().backward()
    return table(seen.timeline())


def at_once(functions):
    results, start = [None] * len(functions), threading.Barrier(len(functions))

    def work(at):
        start.wait()
        results[at] = functions[at]()

    threads = [threading.Thread(target=work, args=(at,)) for at in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_replicas_in_threads_at_once_have_their_own_modules_and_lines():
    assert replicas(at_once) == replicas(lambda functions: [each() for each in functions])


def test_many_threads_lose_no_block():
    def work():
        for _ in range(200):
            torch.zeros(100).add(1)

    with trace() as seen:
        at_once([work] * 4)
    timeline = seen.timeline()
    assert len(timeline.blocks) == 4 * 200 * 2
    assert all(block.died for block in timeline.blocks)
    assert timeline.allocated()[-1] == 0
    assert len({block.born for block in timeline.blocks}) == len(timeline.blocks)


def modes_there(way):
    return way(lambda: len(_get_current_dispatch_mode_stack()))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_no_mode_stays_in_a_thread(way):
    with trace():
        assert modes_there(way) == 1
    assert modes_there(way) == 0


def test_no_mode_stays_in_pools_that_began_under_the_trace():
    with trace():
        executor, pool = ThreadPoolExecutor(1), ThreadPool(1)
        executor.submit(torch.zeros, 3).result()
        pool.apply(torch.zeros, (3,))
    with executor, pool:
        assert modes_there(lambda function: executor.submit(function).result()) == 0
        assert modes_there(lambda function: pool.apply(function)) == 0


def test_a_thread_that_outlives_its_trace_is_not_recorded():
    orders, answers = Queue(), Queue()

    def work():
        while orders.get():
            answers.put(torch.zeros(1000))

    thread = threading.Thread(target=work, daemon=True)
    with trace() as seen:
        thread.start()
        orders.put(True)
        answers.get()
    orders.put(True)
    answers.get()
    orders.put(False)
    thread.join()
    assert [block.size for block in seen.timeline().blocks] == [4000]


def test_threads_are_as_before():
    before = threading.Thread.start, ThreadPool.imap, ThreadPool.apply_async
    with trace():
        assert threading.Thread.start is not before[0]
        thread = threading.Thread(target=torch.zeros, args=(3,))
        thread.start()
        thread.join()
        assert "run" not in vars(thread)
    assert (threading.Thread.start, ThreadPool.imap, ThreadPool.apply_async) == before


def test_inside_of_another_mode_threads_are_left_alone():
    class Other(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **kwargs or {})

    with Other(), trace():
        assert modes_there(in_thread) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_has_neither_trace_nor_diagnosis():
    context, told = multiprocessing.get_context("fork"), []
    call = nn.Module.__call__

    def report(pipe):
        modes = len(_get_current_dispatch_mode_stack())
        pipe.send((modes, nn.Module.__call__ is call, gc.isenabled()))

    def step():
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=report, args=(sender,))
        child.start()
        told.append(receiver.recv())
        child.join()

    diagnose(step)
    assert set(told) == {(0, True, True)}


PREFETCHED = []


def test_the_line_of_a_tensor_that_a_thread_made_is_named():
    def prefetch(waiting):
        waiting.put(batch())

    def step():
        waiting = Queue()
        threading.Thread(target=prefetch, args=(waiting,)).start()
        PREFETCHED.append(waiting.get())

    found = diagnose(step)
    assert found.verdict == "leak of tensors"
    assert "planted.py" in found.cause, "where `batch` is"
    assert "`PREFETCHED`" in found.cause
    net, kept = network(), []
    found = diagnose(lambda: kept.append(EXECUTOR.submit(net, batch()).result()))
    assert "unknown line" not in found.cause
    assert found.verdict == "leak of graph"
