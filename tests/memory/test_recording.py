"""Recording on CUDA, without one: refused in words, and with torch's side played by the test."""

import copy
import subprocess
import sys

import pytest
import torch

from tfswa_lab.memory import snapshot
from tfswa_lab.memory.snapshot import recording
from tfswa_lab.memory.snapshot.emit import as_snapshot
from tfswa_lab.memory.trace import trace
from tfswa_lab.memory.trace.timeline import Block, Timeline

MIB = 2**20
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")


@pytest.fixture
def cuda(monkeypatch):
    """A torch that says it has CUDA, and a log of what is asked of it."""
    calls, observers = [], []
    raw = as_snapshot(Timeline([Block(5 * MIB, 5 * MIB, 1)], 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", observers.clear)  # as a real allocator's start does
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda *a, **k: calls.append((a, k))
    )
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: copy.deepcopy(raw))
    name = "_cuda_attach_out_of_memory_observer"
    monkeypatch.setattr(torch._C, name, observers.append, raising=False)
    return calls, observers


@without_cuda
def test_without_cuda_everything_says_so(tmp_path):
    path = tmp_path / "x.pickle"
    with pytest.raises(RuntimeError, match="no CUDA"), snapshot.record():
        pass
    with pytest.raises(RuntimeError, match="no CUDA"):
        snapshot.dump(path)
    with pytest.raises(RuntimeError, match="no CUDA"):
        snapshot.dump_on_oom(path)
    assert not path.exists()


def test_a_recording_ends_when_its_body_fails(cuda):
    calls, _ = cuda
    with pytest.raises(KeyError), snapshot.record(max_entries=7):
        raise KeyError
    assert calls[0] == (("all",), {"context": "all", "stacks": "python", "max_entries": 7})
    assert calls[1] == ((None,), {})


@pytest.mark.parametrize("started", [False, True])
def test_a_trace_beside_a_gpu_keeps_what_the_allocator_wrote(cuda, monkeypatch, started):
    calls, _ = cuda
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_isHistoryEnabled", lambda: started, raising=False)
    with trace() as seen:
        torch.zeros(3)
    assert snapshot.read(seen.allocator).fragmentation().allocated == 5 * MIB
    assert seen.timeline("cpu").peak().allocated == 12
    assert len(calls) == (0 if started else 2), "what others have started goes on"


def test_a_dump_is_read_again(cuda, tmp_path):
    path = snapshot.dump(tmp_path / "new" / "now.pickle")
    assert snapshot.read(path).fragmentation().allocated == 5 * MIB
    assert [file.name for file in path.parent.iterdir()] == ["now.pickle"]


def test_one_failure_makes_one_file_however_often_cudnn_tries(cuda, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(recording.time, "monotonic", lambda: now[0])
    with snapshot.dump_on_oom(tmp_path / "oom.pickle", most=2) as hook:
        (observe,) = cuda[1]
        for seconds in (0.0, 0.3, 0.9, 1.7, 60.0, 60.1, 600.0):  # three failures, two files
            now[0] = seconds
            observe(0, 1, 2, 3)
    names = ["oom.pickle", "oom-2.pickle"]
    assert [path.name for path in hook.written] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_hook_that_was_closed_is_silent(cuda, tmp_path):
    with snapshot.dump_on_oom(tmp_path / "oom.pickle") as hook:
        pass
    cuda[1][0](0, 1, 2, 3)
    assert hook.written == []
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_raised_inside_of_the_allocator(cuda, tmp_path):
    (tmp_path / "file").write_text("in the way")
    hook = snapshot.dump_on_oom(tmp_path / "file" / "oom.pickle")
    cuda[1][0](0, 1, 2, 3)
    assert hook.written == []
    assert len(hook.failures) == 1


@pytest.mark.gpu
def test_the_allocator_and_a_trace_agree_on_a_gpu():
    torch.cuda.init()
    with trace() as seen:
        kept = torch.zeros(5 * MIB, dtype=torch.uint8, device="cuda")
    assert seen.timeline("cuda:0").peak().allocated == kept.nbytes
    assert kept.nbytes in {b.size for b in snapshot.read(seen.allocator).timeline().blocks}


@pytest.mark.gpu
def test_a_real_recording_agrees_with_torchs_counters(tmp_path):
    torch.cuda.empty_cache()
    with snapshot.record(max_entries=10_000):
        kept = [torch.empty(n * MIB, dtype=torch.uint8, device="cuda") for n in (1, 3, 11, 30)]
        del kept[1]
        path = snapshot.dump(tmp_path / "real.pickle")
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    there = snapshot.read(path)
    curves = there.over_time()
    assert curves.allocated[-1] == there.fragmentation().allocated == allocated
    assert curves.reserved[-1] == there.fragmentation().reserved == reserved
    assert any("test_recording.py" in site.line for site in there.allocation_sites())


@pytest.mark.gpu
def test_a_real_failure_is_dumped_and_explained(tmp_path):
    total = torch.cuda.get_device_properties(0).total_memory
    with (
        snapshot.record(),
        snapshot.dump_on_oom(tmp_path / "oom.pickle") as hook,
        pytest.raises(torch.OutOfMemoryError),
    ):
        torch.empty(2 * total, dtype=torch.uint8, device="cuda")
    assert hook.failures == []
    report = snapshot.read(hook.written[0]).oom_report()
    assert report.requested == 2 * total
    assert not report.is_fragmentation


@pytest.mark.gpu
def test_a_failure_is_dumped_by_a_process_that_has_not_used_the_gpu_before(tmp_path):
    code = (
        "import sys, torch\n"
        "from tfswa_lab.memory import snapshot\n"
        "with snapshot.record(), snapshot.dump_on_oom(sys.argv[1]) as dumped:\n"
        "    try: torch.empty(2**50, dtype=torch.uint8, device='cuda')\n"
        "    except torch.OutOfMemoryError: pass\n"
        "print(len(dumped.written), dumped.failures)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "oom.pickle")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "1 []\n"
    assert snapshot.read(tmp_path / "oom.pickle").oom_report().requested == 2**50
