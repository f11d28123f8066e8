"""A user's word for a device, and the words that make no sense."""

import pytest
import torch

from tfswa_lab.device import pick_device


@pytest.fixture
def machine(monkeypatch):
    """Pretend that this machine has so many CUDA GPUs, and an Apple GPU or none."""

    def pretend(cuda: int, mps: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(("cuda", "mps", "best"), [(2, False, "cuda"), (0, False, "cpu")])
def test_auto_is_the_gpu_where_there_is_one(machine, cuda, mps, best):
    machine(cuda, mps)
    assert pick_device() == pick_device("auto") == torch.device(best)


def test_auto_leaves_an_apple_gpu_to_those_who_name_it(machine):
    machine(cuda=0, mps=True)
    assert pick_device("auto") == torch.device("cpu")
    assert pick_device("mps") == torch.device("mps")


@pytest.mark.parametrize(
    "name", ["auto", "cpu", "cpu:0", "cuda", "cuda:0", "cuda:1", "mps", "mps:0"]
)
def test_a_device_that_was_picked_can_be_picked_again(machine, name):
    machine(cuda=2, mps=True)
    once = pick_device(name)
    assert isinstance(once, torch.device)
    assert pick_device(once) == once
    assert name == "auto" or once == torch.device(name) == pick_device(torch.device(name))


def test_devices_as_torch_numbers_them_are_accepted(machine):
    machine(cuda=2, mps=True)
    for kind, number in (("cpu", 0), ("cuda", 0), ("cuda", 1), ("mps", 0)):
        assert pick_device(torch.device(kind, number)) == torch.device(kind, number)
    assert pick_device(torch.zeros(1).device) == torch.device("cpu")


@pytest.mark.parametrize(
    "name", ["gpu0", "cpu:1", "cuda:", "cuda:-1", "CPU", " cpu", "mps:1", "", None, 0, "meta"]
)
def test_a_misspelt_device_is_named(name):
    with pytest.raises(ValueError, match=f"device='{name}' is unknown; use auto, cpu, cuda"):
        pick_device(name)
    with pytest.raises(ValueError, match="device='meta' is unknown"):
        pick_device(torch.device("meta"))


def test_a_gpu_that_is_not_there_is_refused(machine):
    machine(cuda=0, mps=False)
    for name in ("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0)):
        with pytest.raises(ValueError, match=f"device='{name}', but torch finds no CUDA GPU"):
            pick_device(name)
    for name in ("mps", torch.device("mps", 0)):
        with pytest.raises(ValueError, match=f"device='{name}', but torch finds no Apple GPU"):
            pick_device(name)
    machine(cuda=2, mps=False)
    for name in ("cuda:2", "cuda:1000000"):  # torch itself knows no such number
        with pytest.raises(ValueError, match="no CUDA GPU of that number"):
            pick_device(name)
