"""Advice fits the cause; what is said of a holder is true of the holder; names of notebooks."""

import asyncio
import contextvars
import functools
import itertools
import logging
import queue
import sys
import threading
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from planted import batch, network
from torch import nn

from tfswa_lab.memory.gauges import host_total
from tfswa_lab.memory.leaks import diagnose
from tfswa_lab.memory.sizes import format_bytes

LOCAL, HISTORY = threading.local(), contextvars.ContextVar("history")


def cycle():
    stream = itertools.cycle(iter(batch, None))
    return lambda: next(stream).sum().item()


def tee():
    ahead, behind = itertools.tee(iter(batch, None))
    return lambda: next(ahead) is behind


def cached():
    @functools.cache
    def table(step):
        return batch()

    return lambda step: table(step).sum().item()


def metric():
    metric = pytest.importorskip("torchmetrics").CatMetric()
    return lambda: metric.update(batch())


def figure():
    pytest.importorskip("matplotlib").use("agg")
    from matplotlib import pyplot

    def step():
        pyplot.figure().gca().plot(torch.randn(5000))

    step.leave = lambda: pyplot.close("all")
    pyplot.rcParams["figure.max_open_warning"] = 0
    return step


def hook():
    model, outputs = network(), []
    model[0].register_forward_hook(lambda module, x, y: outputs.append(y.detach()))
    return lambda: model(batch()) is None


def key_value_cache():
    cache = pytest.importorskip("transformers").DynamicCache()
    return lambda: cache.update(torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64), 0) is None


def named_key_value_cache():
    class Decoder:
        past_key_values = None

        def __call__(self):
            new = torch.randn(1, 2, 1, 64)
            past = self.past_key_values
            self.past_key_values = new if past is None else torch.cat([past, new], 2)

    return Decoder()


def futures():
    executor, futures = ThreadPoolExecutor(1), []

    def step():
        futures.append(executor.submit(batch))
        futures[-1].result()

    return step


def tasks():
    loop, tasks = asyncio.new_event_loop(), []

    async def work():
        return batch()

    async def main():
        tasks.append(asyncio.ensure_future(work()))
        await tasks[-1]

    return lambda: loop.run_until_complete(main())


def queued():
    waiting = queue.Queue()
    return lambda: waiting.put(batch())


def simply_queued():
    waiting = queue.SimpleQueue()
    return lambda: waiting.put(batch())


def of_a_thread():
    LOCAL.kept = []
    return lambda: LOCAL.kept.append(batch())


def threads():
    class Worker(threading.Thread):
        def run(self):
            self.result = batch()

    workers = []

    def step():
        workers.append(Worker())
        workers[-1].start()
        workers[-1].join()

    return step


def in_a_context():
    HISTORY.set([])
    return lambda: HISTORY.get().append(batch())


def logged():
    class Collecting(logging.Handler):
        def __init__(self):
            super().__init__()
            self.records = []

        def emit(self, record):
            self.records.append(record)

    logger = logging.Logger("training")
    logger.addHandler(Collecting())
    return lambda: logger.info("loss %s", batch())


def warned():
    class Odd(UserWarning):
        def __init__(self):
            self.data = batch()

    stack = warnings.catch_warnings(record=True)
    caught = stack.__enter__()
    warnings.simplefilter("always")

    def step():
        warnings.warn(Odd(), stacklevel=1)
        return caught and None

    step.leave = lambda: stack.__exit__(None, None, None)
    return step


def last_error():
    def step():
        try:
            batch().no_such_attribute  # noqa: B018
        except AttributeError as error:
            sys.last_value = error

    step.leave = lambda: delattr(sys, "last_value")
    return step


ADVICE = {
    cycle: "while True: yield from loader",
    tee: "advance both",
    cached: "cache_clear()",
    metric: "metric.reset()",
    figure: "plt.close(figure)",
    hook: "handle.remove()",
    key_value_cache: "cache.crop",
    named_key_value_cache: "cache.crop",
    futures: "drop the futures",
    tasks: "drop the futures",
    queued: "maxsize",
    simply_queued: "maxsize",
    of_a_thread: "delete it when a task ends",
    threads: "join()",
    in_a_context: "variable.reset(token)",
    logged: "empty handlers",
    warned: "catch_warnings",
    last_error: "sys.last_exc = sys.last_value = sys.last_traceback = None",
}


@pytest.mark.parametrize("make", ADVICE, ids=lambda make: make.__name__)
def test_advice_fits_the_cause(make):
    step = make()
    try:
        assert ADVICE[make] in diagnose(step).suggestion
    finally:
        getattr(step, "leave", lambda: None)()


def test_far_above_the_holder_nothing_is_said():
    class Trainer(threading.Thread):
        def __init__(self):
            super().__init__()
            self.parts = {"log": {"outputs": {"all": {"kept": []}}}}

        def __call__(self):
            self.parts["log"]["outputs"]["all"]["kept"].append(batch())

    assert "thread" not in diagnose(Trainer()).suggestion


def test_autocast_that_is_not_left_has_its_own_advice():
    layers = [nn.Linear(32, 32) for _ in range(50)]
    with torch.autocast("cpu", torch.bfloat16):
        found = diagnose(lambda step: layers[step](batch()) is None)
    assert "autocast's cache" in found.cause
    assert "leave autocast in each step" in found.suggestion
    assert "cache_enabled=False" in found.suggestion


def test_a_cache_that_autocast_does_not_grow_is_healthy():
    model = network()
    with torch.autocast("cpu", torch.bfloat16):
        assert diagnose(lambda: model(batch()) is None).verdict == "healthy"


# Limits ------------------------------------------------------------------------------------------


def test_a_bound_says_how_much_that_is():
    recent = deque(maxlen=100)
    found = diagnose(lambda: recent.append(torch.zeros(8192)))
    assert found.verdict == "bounded cache"
    assert "it holds at most 100 elements, 3.12 MiB (maxlen = 100)" in found.evidence[0]


@pytest.mark.parametrize(("part", "leaks"), [(0.9, False), (1.1, True)])
def test_a_bound_counts_up_to_the_memory_of_this_machine(part, leaks):
    recent = deque(maxlen=int(part * host_total() / 4096))
    found = diagnose(lambda: recent.append(torch.zeros(1024)))
    assert found.leaks is leaks
    if leaks:
        assert found.verdict == "leak of tensors"
        assert f"bounds nothing: this machine has {format_bytes(host_total())}" in str(found)


def test_the_history_of_lbfgs_is_named():
    weight = nn.Parameter(torch.randn(512))
    optimizer = torch.optim.LBFGS([weight], lr=1e-2, max_iter=1, history_size=77)

    def closure():
        optimizer.zero_grad()
        loss = (weight**4).sum()
        loss.backward()
        return loss

    found = diagnose(lambda: optimizer.step(closure) and None)
    assert found.verdict == "bounded cache"
    assert "history_size = 77" in str(found)


# What is said of a holder ------------------------------------------------------------------------


class Registry:
    kept = []
    deep = {"inner": {"list": []}}


class Trainer:
    def __init__(self):
        self.parts = {"log": []}


def test_where_a_holder_is_reached_from():
    trainer, kept = Trainer(), []

    def through_an_object():
        trainer.parts["log"].append(batch())

    def direct():
        kept.append(batch())

    closed = "closed over by `test_where_a_holder_is_reached_from.<locals>"
    for step, told in (
        (through_an_object, f"reached from `trainer`, {closed}.through_an_object`)"),
        (direct, f"(a list of 40, {closed}.direct`)"),
        (lambda: Registry.kept.append(batch()), "(a list of 40, attribute of a class)"),
        (
            lambda: Registry.deep["inner"]["list"].append(batch()),
            "(a list of 40, reached from `Registry`, a class)",
        ),
    ):
        assert told in diagnose(step).cause


def test_two_holders_are_both_named_and_one_is_not():
    first, second = [], {}

    def step(number):
        x = batch()
        first.append(x)
        second[number] = x.detach()

    found = diagnose(step).cause
    assert "`first`" in found
    assert "`second`" in found
    assert "also held by" in found
    assert "also held by" not in diagnose(lambda: first.append(batch())).cause


def test_one_holder_with_two_names_is_one():
    kept = []
    again = {"same": kept}
    assert "also held by" not in diagnose(lambda: again["same"].append(batch())).cause
    assert kept


# IPython -----------------------------------------------------------------------------------------


@pytest.fixture
def shell():
    shells = pytest.importorskip("IPython.core.interactiveshell")
    before = sys.modules["__main__"], sys.displayhook, sys.excepthook
    shell = shells.InteractiveShell()
    yield shell
    shell.reset()
    sys.modules["__main__"], sys.displayhook, sys.excepthook = before


def run(shell, source):
    from IPython.utils.capture import capture_output

    with capture_output():
        shell.run_cell(source, store_history=True)


def test_outputs_of_a_notebook_have_their_names(shell):
    run(shell, "import torch")
    found = diagnose(lambda: run(shell, "torch.randn(8, 32)"))
    assert found.verdict == "leak of tensors"
    assert "held by `Out`" in found.cause
    assert "`Out[21]`" in found.cause
    assert "`_oh`" in found.cause
    for cure in ("`;`", "%reset out", "cache_size = 0"):
        assert cure in found.suggestion


def test_a_users_variable_in_a_notebook_keeps_its_name(shell):
    run(shell, "import torch; kept = []")
    found = diagnose(lambda: run(shell, "kept.append(torch.randn(8, 32)); kept[-1];"))
    assert "held by `kept`" in found.cause
    assert "IPython" not in found.suggestion
