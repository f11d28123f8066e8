"""Statistics of planted runs, bytes that are known, and the one definition of real time."""

import pytest
import torch

from tfswa_lab.performance import timing as room
from tfswa_lab.performance.timing import Timing, benchmark, peak_bytes, real_time_factor

MIB = 2**20


def test_statistics_of_known_runs():
    timing = Timing((3.0, 1.0, 2.0, 5.0, 4.0), 3 * MIB)
    assert (timing.median, timing.least, timing.most, timing.spread) == (3, 1, 5, 2)
    assert str(timing) == "median 3.00 s · least 1.00 s · spread 2.00 s · 5 runs · peak 3.00 MiB"
    assert repr(timing) == "Timing(3.00 s, 5 runs)"
    assert Timing((1.0,), 0).spread == 0


def test_real_time_counts_the_batch_and_only_new_audio():
    assert Timing((0.5,), 0).real_time_factor(hop_seconds=3.0, batch=4) == 24
    # Two minutes in segments of 6 s every 4.5 s: as many seconds per second as the whole song.
    calls, seconds = 20, 0.3
    song = calls * 4.5
    assert real_time_factor(seconds, hop_seconds=4.5) == pytest.approx(song / (calls * seconds))
    for values in ((0.0, 1.0, 1), (1.0, -1.0, 1), (1.0, 1.0, 0), (float("nan"), 1.0, 1)):
        with pytest.raises(ValueError, match="must be above 0"):
            real_time_factor(*values)


def test_runs_until_the_time_is_used_but_at_least_a_few(monkeypatch):
    calls = []
    monkeypatch.setattr(room, "seconds_of", lambda fn: fn() or 0.4)
    timing = benchmark(lambda: calls.append(1), seconds=2.0, at_least=3, warm_up=4)
    assert len(timing.runs) == 5
    assert len(calls) == 4 + 1 + 5  # warm-up, memory, runs
    assert len(benchmark(lambda: None, seconds=0.1, at_least=3).runs) == 3
    with pytest.raises(ValueError, match="at_least=0"):
        benchmark(lambda: None, at_least=0)


def test_peak_bytes_are_those_alive_at_once():
    held = torch.ones(MIB)

    def work():
        first = torch.ones(MIB)  # 4 MiB
        second = first + held  # 8
        del first
        return second * 2  # 8

    assert peak_bytes(work) == pytest.approx(8 * MIB, rel=0.01)
    assert peak_bytes(lambda: held.neg_()) < MIB


def test_an_error_comes_out():
    with pytest.raises(KeyError):
        benchmark(lambda: {}["mine"])


@pytest.mark.gpu
def test_a_gpus_peak_is_beyond_what_was_there():
    held = torch.ones(MIB, device="cuda")
    timing = benchmark(lambda: held + 1, seconds=0)
    assert 4 * MIB <= timing.peak_bytes <= 6 * MIB
