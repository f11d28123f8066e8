"""Scenarios from public bug reports, on a pretend card; they are not part of the project.

`../shared/cases/performance/scenarios.py` beside the checkout, or in TFSWA_LAB_CASES, holds them.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest

from tfswa_lab.memory.out_of_memory import is_out_of_memory
from tfswa_lab.performance.batch_size import find_batch_size, knee
from tfswa_lab.performance.oom import process_in_chunks, train_step
from tfswa_lab.performance.staged import Stage, StagedPipeline

BESIDE = Path(__file__).resolve().parents[3] / "shared" / "cases" / "performance"
FOLDER = Path(os.environ.get("TFSWA_LAB_CASES", BESIDE))

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

    def pipeline(self, stages, policy, budget):
        return StagedPipeline([Stage(*stage) for stage in stages], "cpu", policy, budget)


def checks():
    """All checks, by name; without the folder, one that says what is missing."""
    if not (FOLDER / "scenarios.py").is_file():
        missing = pytest.mark.skip(reason=f"no scenarios in {FOLDER}; set TFSWA_LAB_CASES")
        return [pytest.param(None, id="scenarios", marks=missing)]
    sys.path.insert(0, str(FOLDER))
    scenarios = importlib.import_module("scenarios")
    sys.path.remove(str(FOLDER))
    names = sorted(name for name in vars(scenarios) if name.startswith("check_"))
    return [pytest.param(getattr(scenarios, name), id=name) for name in names]


@pytest.mark.parametrize("check", checks())
def test_scenario(check):
    check(Adapter())


def test_plan_of_eight_stages():
    """A public pipeline, whose sums were done by hand."""
    if not (path := FOLDER / "plan_eight_stages.json").is_file():
        pytest.skip(f"no {path}; set TFSWA_LAB_CASES")
    case, gb = json.loads(path.read_text("utf-8")), 10**9
    expected = case["expect"]
    stages = [
        Stage(
            each["name"],
            load=object,
            run=lambda model, value: value,
            weights=each["weights"] * gb,
            activations=each["activations"] * gb,
            carries=each["carries"] * gb,
        )
        for each in case["stages"]
    ]

    def plan(budget):
        pipeline = StagedPipeline(stages, "cpu", budget=budget * gb, context=case["context"] * gb)
        return pipeline.plan()

    found = plan(expected["budget"])
    assert [row.peak / gb for row in found.stages] == pytest.approx(expected["sequential_each"])
    rows = {row.name: row for row in found.policies}
    assert rows["resident"].peak / gb == pytest.approx(expected["resident_peak"])
    assert rows["resident"].fits is expected["resident_fits"]
    assert rows["sequential"].peak / gb == pytest.approx(expected["sequential_peak"])
    assert rows["sequential"].worst == expected["sequential_worst"]
    assert rows["sequential"].fits is expected["sequential_fits"]
    assert rows["auto"].fits
    assert plan(9.4).policy("resident").fails_at == "loading vit"
    refused = expected["refuse"]
    with pytest.raises(ValueError, match=refused["names_stage"]):
        plan(refused["budget"])
