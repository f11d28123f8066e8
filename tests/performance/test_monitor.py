"""The gauges of speed by arithmetic, and a file that outlives its process."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from tfswa_lab.performance import monitor as room
from tfswa_lab.performance.monitor import Monitor, append_line, gpu_percent


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(room.time, "monotonic", lambda: now.seconds)
    return now


def test_items_and_audio_per_second(clock):
    monitor = Monitor(shown=False)
    assert monitor.readings[-1].items_per_second is None
    monitor.count(3, audio_seconds=9.0)
    monitor.count(1)
    clock.seconds += 2
    monitor.update()
    assert monitor.readings[-1].items_per_second == 2
    assert monitor.readings[-1].real_time_factor == 4.5
    assert "2 items/s · 4.5 s of audio per s" in str(monitor.readings[-1])
    clock.seconds += 2
    monitor.update()  # nothing was counted since
    assert monitor.readings[-1].items_per_second is None
    assert "items" not in str(monitor.readings[-1])


def test_the_last_reading_counts_what_was_done_and_the_first_what_came_after_the_start(clock):
    monitor = Monitor(interval_seconds=1000, shown=False)
    clock.seconds += 50  # before the run
    with monitor:
        monitor.count(10)
        clock.seconds += 5
    assert monitor.readings[-1].items_per_second == 2


def test_a_step_of_a_trainer_counts_its_batches(clock):
    monitor = Monitor(shown=False)
    trainer = SimpleNamespace(separator=SimpleNamespace(sample_rate=100))
    batches = [{"mixture": torch.zeros(b, 2, s)} for b, s in ((3, 200), (2, 100))]
    monitor.after_step(trainer, batches)
    clock.seconds += 4
    monitor.update()
    assert monitor.readings[-1].items_per_second == 5 / 4
    assert monitor.readings[-1].real_time_factor == (3 * 2 + 2 * 1) / 4


def test_cpu_percent_is_of_the_time_between_two_readings(monkeypatch):
    times = iter([(10.0, 100.0), (25.0, 120.0), (25.0, 120.0)])
    monkeypatch.setattr(room, "_cpu_seconds", lambda: next(times))
    monitor = Monitor(shown=False)
    monitor.update()
    monitor.update()
    assert [reading.cpu_percent for reading in monitor.readings] == [None, 75.0, None]


def test_busy_seconds_are_a_part_of_all():
    busy, total = room._cpu_seconds()
    assert 0 < busy < total
    assert total == pytest.approx(sum(psutil.cpu_times()), rel=0.01)


def test_without_a_gpu_its_use_is_unknown_and_not_zero():
    if not torch.cuda.is_available():
        assert gpu_percent() is None
        assert Monitor(shown=False).readings[0].gpu_percent is None


class PlayedError(Exception):
    """As NVML's: no RuntimeError."""


@pytest.mark.parametrize("failure", [None, PlayedError(), RuntimeError(), ModuleNotFoundError()])
def test_a_played_gpu_tells_its_use_or_none(monkeypatch, failure):
    def utilization(_device):
        if failure is not None:
            raise failure
        return 20

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(NVMLError=PlayedError))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    assert gpu_percent() == (20.0 if failure is None else None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_percent() is None


def test_a_log_needs_no_widgets_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    path = tmp_path / "run.jsonl"
    for _ in range(2):
        monitor = Monitor(log=path, shown=False)
        monitor.update()
    lines = lines_of(path)
    assert len(lines) == 4
    assert lines[-1]["status"]["host_rss"] == monitor.readings[-1].status.host_rss
    assert lines[-1]["gpu_percent"] is None or torch.cuda.is_available()
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


def test_a_line_without_an_end_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    append_line(path, {"a": 2})
    append_line(path, {"a": 3})
    assert path.read_text() == '{"a": 1}\n{"a": \n{"a": 2}\n{"a": 3}\n'


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(room.os, "write", lambda _descriptor, line: len(line) - 1)
    with pytest.raises(OSError, match="disk is full"):
        append_line(tmp_path / "run.jsonl", {"a": 1})


KILLED = """
import os, signal, sys
from tfswa_lab.performance.monitor import Monitor
monitor = Monitor(interval_seconds=0.001, log=sys.argv[1], shown=False).start()
while len(monitor.readings) < 20:
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_log_of_a_killed_process_is_whole(tmp_path):
    path = tmp_path / "run.jsonl"
    ended = subprocess.run([sys.executable, "-c", KILLED, path], capture_output=True, check=False)
    assert ended.returncode == -9, ended.stderr
    assert len(lines_of(path)) >= 19  # the last may be under way


@pytest.mark.gpu
def test_a_gpus_use_is_a_percentage():
    pytest.importorskip("pynvml")
    assert 0 <= gpu_percent() <= 100
