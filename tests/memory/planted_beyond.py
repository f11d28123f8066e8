"""Planted scripts whose memory is beyond one thread or process, or is kept by what is known.

Children, threads, histories of optimizers, limits that bound nothing, autocast, nodes of graphs,
and two holders of the same blocks; each with sound ones that look alike.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import queue
import subprocess
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import torch
from planted import CACHE, GRAPH, HEALTHY, HOST, TENSORS, WARM_UP, batch, network, planter
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

BEYOND = []
planted = planter(BEYOND)

KEPT = []
FORK = "fork" if "fork" in multiprocessing.get_all_start_methods() else None


# Child processes ---------------------------------------------------------------------------------


def keep(size):
    KEPT.append(bytearray(size))


def compute(size):
    return sum(row.sum().item() for row in torch.randn(size, 100))


class WithPool:
    """Gives a function to a pool of processes, and takes the pool along when it goes."""

    def __init__(self, function, argument, workers=1):
        self.pool = multiprocessing.get_context(FORK).Pool(workers)
        self.function, self.arguments = function, [argument] * workers

    def __call__(self):
        self.pool.map(self.function, self.arguments, chunksize=1)

    def __del__(self):
        self.pool.terminate()


@planted(HOST, words=("1 of ", "grows", "multiprocessing worker"))
def worker_that_keeps_its_results():
    return WithPool(keep, 4 << 20)


@planted(HOST, words=("child process", "Pool"))
def worker_that_keeps_a_little():
    return WithPool(keep, 700 << 10)


@planted(HOST, words=("child process", "ProcessPoolExecutor"))
def executor_whose_worker_keeps():
    executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(FORK))
    return lambda: executor.submit(keep, 1 << 20).result()


class Rows(Dataset):
    def __init__(self, caches: bool):
        self.caches, self.rows = caches, []

    def __len__(self):
        return 100_000

    def __getitem__(self, at):
        if self.caches:
            self.rows.append(bytearray(500_000))
        return torch.full((32,), float(at))


def endless(loader):
    while True:
        yield from loader


@planted(HOST, words=("2 of ", "grow", "DataLoader worker"))
def dataset_that_caches_in_its_workers():
    stream = endless(DataLoader(Rows(caches=True), batch_size=8, num_workers=2))
    return lambda: next(stream).sum().item()


@planted(HOST, words=("never ended", "subprocess"))
def child_that_is_never_ended():
    command, children = [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], []
    return lambda: children.append(subprocess.Popen(command, stdin=subprocess.PIPE))


@planted(HEALTHY)
def children_that_end():
    command = [sys.executable, "-S", "-c", "pass"]
    return lambda: subprocess.run(command, check=True) and None


@planted(HEALTHY)
def workers_that_keep_nothing():
    return WithPool(compute, 50, workers=2)


@planted(HEALTHY)
def loader_with_persistent_workers():
    loader = DataLoader(Rows(caches=False), batch_size=8, num_workers=2, persistent_workers=True)
    stream, model = endless(loader), network()
    return lambda: model(next(stream)).square().mean().backward()


@planted(HEALTHY)
def loader_that_starts_its_workers_anew():
    data = TensorDataset(torch.randn(16, 32))
    loader = DataLoader(data, batch_size=8, num_workers=2)
    return lambda: sum(x.sum().item() for (x,) in loader)


# Threads -----------------------------------------------------------------------------------------


@planted(TENSORS, words=("`outputs`", "planted_beyond.py", "predict"))
def outputs_of_an_executor():
    executor, outputs, model = ThreadPoolExecutor(2), [], network()

    def predict():
        with torch.no_grad():
            return model(batch())

    return lambda: outputs.append(executor.submit(predict).result())


@planted(TENSORS, words=("batches.queue", "planted.py"))
def prefetching_that_is_never_stopped():
    batches = queue.Queue()

    def fetch():
        batches.put(batch())

    def step():
        thread = threading.Thread(target=fetch)
        thread.start()
        thread.join()

    return step


@planted(HEALTHY)
def layers_in_threads():
    executor, parts = ThreadPoolExecutor(2), nn.ModuleList([network(), network()])

    def step():
        x = batch()
        outputs = list(executor.map(lambda part: part(x), parts))
        sum(outputs).square().mean().backward()
        parts.zero_grad()

    return step


# Histories of optimizers -------------------------------------------------------------------------


def with_closure(optimizer, loss):
    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return lambda: optimizer.step(closure) and None


def curved(weight):
    return lambda: (weight**4).sum() + (weight[1:] * weight[:-1]).sum() ** 2


@planted(CACHE, words=("optimizer.state",))
def lbfgs_with_a_long_history():
    weight = nn.Parameter(torch.randn(512))
    optimizer = torch.optim.LBFGS([weight], lr=1e-2, max_iter=1, history_size=100)
    return with_closure(optimizer, curved(weight))


@planted(CACHE, HEALTHY)
def lbfgs_with_a_short_history():
    weight = nn.Parameter(torch.randn(512))
    optimizer = torch.optim.LBFGS([weight], lr=1e-2, max_iter=1, history_size=5)
    return with_closure(optimizer, curved(weight))


@planted(TENSORS, words=("['directions']",))
def lbfgs_that_keeps_its_directions():
    class Logging(torch.optim.LBFGS):
        def step(self, closure):
            loss = super().step(closure)
            state = self.state[self._params[0]]
            state.setdefault("directions", []).append(state["d"].clone())
            return loss

    weight = nn.Parameter(torch.randn(512))
    optimizer = Logging([weight], lr=1e-2, max_iter=1, history_size=100)
    return with_closure(optimizer, curved(weight))


class WithHistory(torch.optim.Optimizer):
    """Keeps gradients, and leaves it to what `make` gives to drop old ones."""

    def __init__(self, parameters, make, history_size=100):
        super().__init__(parameters, {"history_size": history_size})
        self.make = make

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                history = self.state[parameter].setdefault("gradients", self.make())
                history.append(parameter.grad.clone())
                parameter -= 1e-3 * sum(history) / len(history)


def trained_with_history(make):
    model = network()
    optimizer = WithHistory(model.parameters(), make)

    def step():
        optimizer.zero_grad()
        model(batch()).square().mean().backward()
        optimizer.step()

    return step


@planted(TENSORS, words=("optimizer.state", "gradients"))
def optimizer_that_only_names_its_history():
    return trained_with_history(list)


@planted(CACHE, words=("a deque of",))
def optimizer_with_a_deque():
    return trained_with_history(lambda: deque(maxlen=100))


# Limits ------------------------------------------------------------------------------------------


@planted(TENSORS, words=("`recent`",))
def deque_without_a_real_limit():
    recent = deque(maxlen=10**9)
    return lambda: recent.append(batch())


@planted(TENSORS, words=("`table`",))
def lru_cache_without_a_real_limit():
    @functools.lru_cache(maxsize=10**9)
    def table(step):
        return batch()

    return lambda step: table(step).sum().item()


# Autocast ----------------------------------------------------------------------------------------


@planted(TENSORS, words=("autocast's cache",))
def autocast_that_is_never_left():
    class Entered:
        def __init__(self):
            self.autocast = torch.autocast("cpu", torch.bfloat16)
            self.layers = [nn.Linear(32, 32) for _ in range(100)]
            self.autocast.__enter__()

        def __call__(self, step):
            self.layers[step](batch())

        def __del__(self):
            self.autocast.__exit__(None, None, None)

    return Entered()


@planted(HEALTHY)
def autocast_that_is_left():
    layers = [nn.Linear(32, 32) for _ in range(100)]

    def step(number):
        with torch.autocast("cpu", torch.bfloat16):
            layers[number](batch())

    return step


@planted(TENSORS, words=("`outputs`",))
def outputs_kept_under_autocast():
    outputs, model = [], network()

    @torch.no_grad()
    def step():
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(model(batch()))

    return step


# Nodes of graphs ---------------------------------------------------------------------------------


@planted(GRAPH, words=("`nodes`",))
def nodes_of_graphs():
    nodes, model = [], network()
    return lambda: nodes.append(model(batch()).sum().grad_fn)


@planted(GRAPH, words=("`nodes`", "nodes of autograd's graph", "planted_beyond.py"))
def nodes_of_graphs_after_backward():
    nodes, model = [], network()

    def step():
        loss = model(batch()).sum()
        loss.backward()
        nodes.append(loss.grad_fn)

    return step


@planted(HEALTHY, WARM_UP)
def last_node_of_a_graph():
    model, last = network(), {}

    def step():
        loss = model(batch()).sum()
        loss.backward()
        last["node"] = loss.grad_fn

    return step


# Two holders -------------------------------------------------------------------------------------


@planted(TENSORS, words=("`first`", "`second`", "also held by"))
def held_by_two_lists():
    first, second = [], []

    def step():
        x = batch()
        first.append(x)
        second.append({"x": x})

    return step


@planted(TENSORS, words=("held by `every`", "also held by `recent`"))
def held_by_a_list_and_a_deque():
    recent, every = deque(maxlen=100), []

    def step():
        x = batch()
        every.append(x)
        recent.append(x.detach())

    return step


@planted(TENSORS, words=("held by `every`", "also held by `table`"))
def held_by_a_list_and_a_bounded_lru_cache():
    every = []

    @functools.lru_cache(maxsize=100)
    def table(step):
        return batch()

    return lambda step: every.append(table(step))


@planted(CACHE, words=("a deque of", "also held by"))
def held_by_two_deques():
    few, many = deque(maxlen=100), deque(maxlen=200)

    def step():
        x = batch()
        few.append(x)
        many.append(x)

    return step


@planted(TENSORS, words=("`stream",))
def batches_in_a_cycle():
    stream = itertools.cycle(batch() for _ in range(10_000))
    return lambda: next(stream).sum().item()
