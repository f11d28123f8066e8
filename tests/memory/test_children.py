"""Child processes: bytes as the child was told to keep, what it is, and children that end."""

import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import psutil
import pytest
from planted_beyond import FORK, Rows, WithPool, endless, keep
from torch.utils.data import DataLoader

from tfswa_lab.memory import gauges
from tfswa_lab.memory.gauges import children_memory
from tfswa_lab.memory.leaks import diagnose
from tfswa_lab.memory.leaks.children import children_of, kind_of

MIB = 2**20
SLEEPING = [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"]
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture
def others():
    """Child processes that other tests have left, such as trackers of shared memory."""
    return set(children_memory())


@pytest.fixture
def sleeping(others):
    child = subprocess.Popen(SLEEPING, stdin=subprocess.PIPE)
    yield child
    child.kill()
    child.wait()
    child.stdin.close()


@pytest.mark.parametrize("size", [MIB, 4 * MIB, 12 * MIB])
def test_the_growth_is_what_the_worker_keeps(size):
    found = diagnose(WithPool(keep, size))
    assert found.verdict == "host memory"
    assert found.growth_per_step == pytest.approx(size, rel=0.04)
    assert "maxtasksperchild" in found.suggestion


def test_the_worker_that_grows_is_named():
    step = WithPool(keep, MIB)
    (worker,) = step.pool._pool
    found = diagnose(step)
    assert f"pid {worker.pid}, a multiprocessing worker of a Pool, `{worker.name}`" in found.cause


def test_of_two_workers_only_one_grows():
    context = multiprocessing.get_context(FORK)
    with context.Pool(1) as sound, context.Pool(1) as keeping:
        found = diagnose(lambda: sound.apply(abs, (1,)) and keeping.apply(keep, (MIB,)))
        assert re.search(rf"1 of \d+ processes grows, pid {keeping._pool[0].pid}", found.cause)


def test_advice_for_a_dataloader_names_copied_pages():
    stream = endless(DataLoader(Rows(caches=True), batch_size=8, num_workers=1))
    found = diagnose(lambda: next(stream).sum().item())
    assert "a DataLoader worker" in found.cause
    assert "pytorch issue 13246" in found.suggestion
    assert "persistent_workers=False" in found.suggestion


def test_children_that_are_never_ended_are_counted(others):
    children = []
    found = diagnose(lambda: children.append(subprocess.Popen(SLEEPING, stdin=subprocess.PIPE)))
    alive = int(re.search(r"(\d+) are alive, which were started and never ended", found.cause)[1])
    assert alive == len(children) + len(others)
    assert f"pid {children[-1].pid}" in found.cause
    assert "join()" in found.suggestion
    assert found.leaks
    for child in children:
        child.communicate()


def test_a_growing_parent_is_named_before_children_that_grow_less():
    rows, in_child = [], WithPool(keep, MIB // 4)

    def step():
        in_child()
        rows.append(bytearray(MIB))

    found = diagnose(step)
    assert "held by `rows`" in found.cause
    rows.clear()


def test_a_childs_memory_is_read(sleeping, others):
    read = children_memory()
    assert set(read) - others == {sleeping.pid}
    info = psutil.Process(sleeping.pid).memory_full_info()
    assert 0 < read[sleeping.pid] <= info.rss


def test_grandchildren_count(others):
    code = f"import subprocess; subprocess.run({SLEEPING!r}); print()"
    command = [sys.executable, "-c", f"print(flush=True); {code}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        while not psutil.Process(child.pid).children():
            pass  # until it has started its own child
        (grandchild,) = psutil.Process(child.pid).children()
        assert {child.pid, grandchild.pid} == set(children_memory()) - others
        child.stdin.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no zombies")
def test_a_child_that_ended_has_no_memory(others):
    child = subprocess.Popen([sys.executable, "-S", "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it ended, and stays a zombie
    assert child.pid not in children_memory()
    child.wait()


@pytest.mark.parametrize("error", [psutil.NoSuchProcess, psutil.ZombieProcess])
def test_children_that_end_between_two_reads_are_left_out(monkeypatch, sleeping, error):
    def ended(child):
        raise error(child.pid)

    monkeypatch.setattr(gauges, "_unshared", ended)
    assert children_memory() == {}


def test_other_systems_know_less(monkeypatch, sleeping):
    def forbidden(child):
        raise psutil.AccessDenied(child.pid)

    monkeypatch.setattr(gauges.Path, "exists", lambda path: False)
    for known, size in ((SimpleNamespace(uss=5, rss=9), 5), (SimpleNamespace(rss=9), 9)):
        monkeypatch.setattr(psutil.Process, "memory_full_info", lambda child, known=known: known)
        assert children_memory()[sleeping.pid] == size
    monkeypatch.setattr(psutil.Process, "memory_full_info", forbidden)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda child: SimpleNamespace(rss=7))
    assert children_memory()[sleeping.pid] == 7


def test_kinds_of_children(sleeping):
    assert kind_of(sleeping.pid) == "program that subprocess started"
    context = multiprocessing.get_context(FORK)
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        assert "ProcessPoolExecutor" in kind_of(executor.submit(os.getpid).result())
    assert kind_of(os.getppid()).startswith("program `")
    assert kind_of(2**22 + 1) == "program that has ended"


def test_which_children_grew():
    first, last = {1: 100, 2: 100}, {1: 140, 2: 101, 3: 5}
    grown = children_of(first, last, added=False)
    assert (grown.alive, grown.grown, grown.pid) == (3, 2, 1)
    added = children_of(first, last, added=True)
    assert (added.alive, added.grown, added.pid) == (3, 1, 3)
