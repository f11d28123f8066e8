"""The order of tests; those marked gpu: skipped without one, found without others' packages."""

import os
import re
from pathlib import Path

import pytest
import torch

collect_ignore = ["tests/played_gpu"]  # whose import, for its doctests, would play a GPU to all


# Minutes in processes of their own: the workers of xdist begin with these, to end together.
LONG = re.compile(r"test_notebooks.py::test_runs_in_quick|test_gpu_run.py::test_the_first_command")
# These look at all objects of the process, so they take twice as long after the tests of others,
# which import and make so many more.
ALL_OBJECTS = re.compile(r"tests/(memory|teaching)/|test_readme.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu`, files without such a test are not even imported.

    A GPU that is borrowed has only what its tests need: `make wheels`.
    """
    if not re.match(r"gpu\b", config.option.markexpr) or collection_path.suffix != ".py":
        return None
    return None if "mark.gpu" in collection_path.read_text("utf-8") else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests in order; say what is skipped, and what would run it."""
    items[:] = in_order(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: make gpu"))


def in_order(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """Long tests first, the last lessons at the head, then those that look at all objects.

    xdist gives each worker a run of neighbours, so each run begins with its share of these.
    """
    long = [item for item in reversed(items) if LONG.search(item.nodeid)]
    others = [item for item in items if not LONG.search(item.nodeid)]
    looking = [item for item in others if ALL_OBJECTS.match(item.nodeid)]
    rest = [item for item in others if not ALL_OBJECTS.match(item.nodeid)]
    parts = [(k / workers, (k + 1) / workers) for k in range(workers)]
    return [
        item
        for start, stop in parts
        for group in (long, looking, rest)
        for item in group[round(start * len(group)) : round(stop * len(group))]
    ]
