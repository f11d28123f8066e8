"""The fixture for others' test suites: it is found without an import, and fails what leaks."""

from importlib.metadata import entry_points

import pytest
import torch
from planted import Training

from tfswa_lab.memory.leaks import pytest_plugin as pytest_leaks


def test_pytest_finds_it_wherever_the_package_is_installed():
    (plugin,) = (each for each in entry_points(group="pytest11") if each.name == "tfswa-lab")
    assert plugin.load() is pytest_leaks


def test_a_sound_step_passes_and_is_diagnosed(assert_no_leak):
    assert assert_no_leak(Training()).verdict in ("healthy", "warm-up only")


def test_a_leak_fails_with_its_cause(assert_no_leak):
    outputs = []
    with pytest.raises(pytest.fail.Exception, match="held by `outputs`"):
        assert_no_leak(lambda: outputs.append(torch.zeros(64)))
