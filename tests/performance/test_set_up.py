"""`diagnose`: every setting has a line, and everything that was tried is restored."""

import time

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

import tfswa_lab.performance.set_up
from tfswa_lab.performance.set_up import (
    attention_kernel,
    cudnn_benchmark,
    diagnose,
    float32_precision,
    mixed_precision_ratio,
    read_rate,
    spoken,
)

room = tfswa_lab.performance.set_up
CPU = torch.device("cpu")


@pytest.fixture
def one_core(monkeypatch, one_thread):
    """No second thread is tried, which a busy machine takes long for."""
    monkeypatch.setattr(room, "_cores", lambda: 1)


def state():
    return (
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.benchmark,
        torch.is_autocast_enabled("cpu"),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.get_rng_state().tolist(),
    )


def test_every_setting_has_a_line_and_is_as_before(one_core, tmp_path):
    (tmp_path / "songs").mkdir()
    (tmp_path / "songs" / "a.wav").write_bytes(bytes(3 * 2**20))
    loader = DataLoader(torch.ones(40, 2), batch_size=4)
    model, weights, steps = nn.Linear(2, 2), torch.ones(64, 64), []
    before = state()
    found = diagnose(lambda: steps.append(weights @ weights), loader, model, tmp_path, "cpu")
    assert state() == before
    assert {x.dtype for x in steps} == {torch.float32, torch.bfloat16}
    assert {setting.name for setting in found.settings} == {
        *("device", "dtype", "threads", "float32 products", "cudnn.benchmark", "attention"),
        *("torch.compile", "num_workers", "pin_memory", "disk", "RAM"),
    }
    assert all(setting.now and setting.change for setting in found.settings)
    assert "mixed precision" in found["dtype"].change
    assert "3.00 MiB" in found["disk"].now
    assert found["torch.compile"].now == "not compiled"
    assert found["num_workers"].now.startswith("0: ")
    assert "2 workers: " in found["num_workers"].change
    assert len(str(found).splitlines()) <= 25
    assert "\n" not in repr(found)
    assert found._repr_html_().count("<tr>") == 12


def test_what_is_not_given_is_not_measured(one_core):
    step = torch.ones(4).neg_
    before = torch.get_rng_state()
    found = diagnose(step, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("DataLoader", "disk", "torch.compile", "threads", "cudnn.benchmark"):
        assert found[name].change.startswith("not measured")


def test_the_probe_reads_which_kernel_ran():
    assert attention_kernel(CPU, torch.float32, mask=True) == "flash_attention_for_cpu"
    with sdpa_kernel(SDPBackend.MATH):
        assert attention_kernel(CPU, torch.float32, mask=False) == "attention_math"


def test_mixed_precision_runs_the_step_under_autocast(one_thread):
    seen = []

    def step():
        on = torch.is_autocast_enabled("cpu")
        seen.append(on)
        time.sleep(0.01 if on else 0.001)

    assert mixed_precision_ratio("cpu", step) > 2
    assert seen == sorted(seen)
    assert {seen.count(False), seen.count(True)} <= {2, 3, 4}  # a busy machine tries fewer
    with pytest.raises(ValueError, match="device='tpu'"):
        mixed_precision_ratio("tpu")
    before = torch.get_rng_state()
    room.block_step(CPU)()
    assert torch.equal(torch.get_rng_state(), before)


def test_ratios_in_words():
    assert spoken(2.8) == "2.8 times slower"
    assert spoken(0.25) == "4.0 times faster"
    assert spoken(0.95).startswith("makes no difference")


def test_a_setting_is_restored_after_an_error():
    before = torch.get_float32_matmul_precision()
    with float32_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
    with pytest.raises(KeyError), float32_precision("high"), cudnn_benchmark(True):
        raise KeyError
    assert not torch.backends.cudnn.benchmark
    assert torch.get_float32_matmul_precision() == before


class Broken(torch.utils.data.Dataset):
    """Fails in workers only."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if torch.utils.data.get_worker_info():
            raise OSError("no file handle in a worker")
        return torch.ones(2)


def test_a_data_set_that_workers_break_is_a_finding():
    now, change = room._workers(DataLoader(Broken(), batch_size=4))
    assert now.startswith("0: ")
    assert change.startswith("2 workers fail: OSError")


def test_one_batch_or_slow_ones_are_not_fetched_again(monkeypatch):
    assert "not measured" in room._workers(DataLoader(torch.ones(4, 2), batch_size=4))[1]
    monkeypatch.setattr(room, "LONG_FETCH", 0.0)
    assert "not measured" in room._workers(DataLoader(torch.ones(40, 2), batch_size=4))[1]


def test_a_compiled_part_is_seen():
    plain, inside = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    inside[1].compile()
    assert room._compiled(plain)[0] == "not compiled"
    assert room._compiled(inside)[0] == "compiled"
    assert room._compiled(torch.compile(plain))[0] == "compiled"


def test_reading_stops_at_enough_and_refuses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "READ", 1000)
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(bytes(600))
    assert read_rate(tmp_path)[0] == 1000
    with pytest.raises(FileNotFoundError, match="has no files"):
        read_rate(tmp_path / "absent")


@pytest.mark.gpu
def test_on_a_gpu_all_changes_are_tried():
    before = state()
    found = diagnose(loader=DataLoader(torch.ones(40, 2), batch_size=4), device="cuda")
    assert state() == before
    for name in ("dtype", "float32 products", "cudnn.benchmark", "attention", "pin_memory"):
        assert "not measured" not in found[name].change
