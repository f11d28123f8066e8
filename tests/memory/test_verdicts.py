"""The rules that need a GPU, on findings made by hand; and the order of the rules."""

import pytest

from tfswa_lab.memory.gauges import DeviceSignals
from tfswa_lab.memory.leaks.children import Children
from tfswa_lab.memory.leaks.host_steps import HostGrowth
from tfswa_lab.memory.leaks.verdicts import Findings, judge

MIB, STEPS = 2**20, 12


def on_a_gpu(reserved, used=None, peak=100 * MIB, retries=0):
    """Findings of steps that all need the same, while the GPU says something else."""
    used = used or [each + 500 * MIB for each in reserved]
    signals = [
        DeviceSignals(peak, r, u, retries * at)
        for at, (r, u) in enumerate(zip(reserved, used, strict=True))
    ]
    return Findings(STEPS, [50 * MIB] * STEPS, [peak] * STEPS, device=signals)


def test_a_gpu_at_rest_is_healthy():
    assert judge(on_a_gpu([120 * MIB] * STEPS)).verdict == "healthy"


def test_more_is_reserved_with_each_step_though_none_needs_more():
    found = judge(on_a_gpu([(120 + 40 * step) * MIB for step in range(STEPS)]))
    assert found.verdict == "fragmentation"
    assert found.growth_per_step == 40 * MIB
    assert not found.leaks
    assert "expandable_segments" in found.suggestion


def test_the_allocator_emptied_its_cache_to_find_room():
    assert judge(on_a_gpu([180 * MIB] * STEPS, retries=1)).verdict == "fragmentation"


def test_an_early_peak_left_a_large_cache():
    found = judge(on_a_gpu([900 * MIB] * STEPS))
    assert found.verdict == "reserved cache"
    assert "900.00 MiB are reserved" in found.cause


def test_the_gpu_fills_beyond_what_is_reserved():
    reserved = [120 * MIB] * STEPS
    found = judge(on_a_gpu(reserved, [(500 + 20 * step) * MIB for step in range(STEPS)]))
    assert found.verdict == "outside the allocator"
    assert found.leaks
    assert found.growth_per_step == 20 * MIB


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [("nodes", "leak of graph"), ("python", "host memory"), ("process", "host memory")],
)
def test_what_grows_on_the_host_has_a_name(kind, verdict):
    host = HostGrowth(kind, 1.0, 100.0, holder="rows", where="global of train.py")
    found = judge(Findings(STEPS, [0] * STEPS, [0] * STEPS, host=host))
    assert found.verdict == verdict
    assert found.leaks
    assert "held by `rows`" in found.cause


@pytest.mark.parametrize(
    ("kind", "started", "advice"),
    [
        ("DataLoader worker, `Process-1`", False, "persistent_workers=False"),
        ("multiprocessing worker of a Pool", False, "maxtasksperchild"),
        ("program that subprocess started", True, "join()"),
    ],
)
def test_children_that_grow_are_named_with_advice(kind, started, advice):
    children = Children(alive=3, grown=2, started=started, pid=4242, kind=kind)
    host = HostGrowth("children", 4.0 * MIB, 4.0 * MIB, children=children)
    found = judge(Findings(STEPS, [0] * STEPS, [0] * STEPS, host=host))
    assert found.verdict == "host memory"
    assert found.growth_per_step == 4 * MIB
    assert f"pid 4242, a {kind}" in found.cause
    assert advice in found.suggestion
