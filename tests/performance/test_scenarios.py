"""Scenarios from public bug reports, on a pretend card; they are not part of the project.

`../shared/cases/performance/scenarios.py` beside the checkout, or in TFSWA_LAB_CASES, holds them.
"""

import importlib
import os
import sys
from pathlib import Path

import pytest

from tfswa_lab.memory.out_of_memory import is_out_of_memory
from tfswa_lab.performance.batch_size import find_batch_size, knee
from tfswa_lab.performance.oom import process_in_chunks, train_step

BESIDE = Path(__file__).resolve().parents[3] / "shared" / "cases" / "performance"
FOLDER = Path(os.environ.get("TFSWA_LAB_CASES", BESIDE))
# Pipelines of several models come later: then `Adapter` gets a method `pipeline`.
LEFT_OUT = {"check_sequential_frees", "check_one_at_a_time", "check_stage_that_raises"}

pytestmark = pytest.mark.usefixtures("new_objects_only")


class Adapter:
    """What the scenarios call."""

    def find(self, step, *, state, maximum=None, validate=None):
        return find_batch_size(step, state=state, maximum=maximum, validate=validate).value

    def train(self, loss_of, batch, optimizer, *, floor=1):
        train_step(loss_of, batch, optimizer, floor=floor)

    def is_oom(self, exception, free_fraction):
        return is_out_of_memory(exception, free_fraction)

    def chunks(self, fn, items, size):
        return process_in_chunks(fn, items, size)

    def knee(self, rows):
        return knee(rows)


def checks():
    """All checks, by name; without the folder, one that says what is missing."""
    if not (FOLDER / "scenarios.py").is_file():
        missing = pytest.mark.skip(reason=f"no scenarios in {FOLDER}; set TFSWA_LAB_CASES")
        return [pytest.param(None, id="scenarios", marks=missing)]
    sys.path.insert(0, str(FOLDER))
    scenarios = importlib.import_module("scenarios")
    sys.path.remove(str(FOLDER))
    names = {name for name in vars(scenarios) if name.startswith("check_")}
    assert names >= LEFT_OUT
    return [pytest.param(getattr(scenarios, name), id=name) for name in sorted(names - LEFT_OUT)]


@pytest.mark.parametrize("check", checks())
def test_scenario(check):
    check(Adapter())
