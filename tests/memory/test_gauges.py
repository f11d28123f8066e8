"""Gauges: the process's own size, no invented zeros, and a monitor that ends."""

import gc
import mmap
import sys
import threading
import time

import psutil
import pytest
import torch

from tfswa_lab.memory.gauges import Status, status
from tfswa_lab.performance.monitor import Monitor

MIB = 2**20
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")


@without_cuda
def test_without_cuda_there_are_no_zeros():
    now = status()
    assert (now.device, now.allocated, now.reserved, now.device_used) == (None,) * 4
    assert str(now).startswith("no CUDA · host RSS ")
    assert "0 B" not in str(now)


@without_cuda
def test_a_named_gpu_that_is_not_there_is_an_error():
    for device in ("cuda", "cuda:0", 0, "cpu", torch.device("cuda", 3)):
        with pytest.raises(ValueError, match="not one of the 0 CUDA GPUs"):
            status(device)


def test_the_host_grows_by_what_is_touched():
    gc.collect()  # what others left behind must not go away meanwhile
    before = status().host_rss
    with mmap.mmap(-1, 64 * MIB) as held:  # never memory that the process had before
        held.write(bytes(64 * MIB))
        assert 56 * MIB < status().host_rss - before < 144 * MIB
    assert abs(status().host_rss - psutil.Process().memory_info().rss) < 8 * MIB


def test_a_status_says_which_is_which():
    told = str(Status(3 * MIB, "cuda:0", 512, 20 * MIB, 2**30, 2**33))
    assert told == (
        "cuda:0: allocated 512 B · reserved 20.00 MiB · device 1.00 GiB of 8.00 GiB · "
        "host RSS 3.00 MiB"
    )


def test_a_monitor_reads_until_it_is_stopped():
    pytest.importorskip("ipywidgets")
    threads = threading.active_count()
    with Monitor(interval_seconds=0.005) as monitor:
        until = time.monotonic() + 10
        while len(monitor.readings) < 4 and time.monotonic() < until:
            time.sleep(0.005)
    count = len(monitor.readings)
    assert count >= 4
    assert threading.active_count() == threads
    time.sleep(0.03)
    assert len(monitor.readings) == count
    assert "host RSS" in monitor.widget.value
    assert monitor.widget.value.count("<polyline") == (4 if torch.cuda.is_available() else 1)


def test_a_monitor_starts_again_and_keeps_what_it_may():
    pytest.importorskip("ipywidgets")
    monitor = Monitor(interval_seconds=60, keep=3)
    assert monitor.start() is monitor.start()
    monitor.stop()
    monitor.stop()
    for _ in range(5):
        monitor.update()
    assert len(monitor.readings) == 3


def test_a_monitor_without_widgets_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ModuleNotFoundError, match=r"tfswa-lab\[lab\]"):
        Monitor()
    for never in (0, float("inf")):
        with pytest.raises(ValueError, match=f"interval_seconds={never}"):
            Monitor(interval_seconds=never)


@pytest.mark.gpu
def test_on_cuda_the_gauges_are_torchs():
    held = torch.empty(32 * MIB, dtype=torch.uint8, device="cuda")
    now = status()
    assert now.allocated == torch.cuda.memory_allocated()
    assert now.reserved == torch.cuda.memory_reserved()
    assert now.allocated <= now.reserved <= now.device_used <= now.device_total
    del held
