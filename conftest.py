"""Tests marked gpu: skipped without a GPU, and found without the packages of all others."""

import re
from pathlib import Path

import pytest
import torch

collect_ignore = ["tests/played_gpu"]  # whose import, for its doctests, would play a GPU to all


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu`, files without such a test are not even imported.

    A GPU that is borrowed has only what its tests need: `make wheels`.
    """
    if not re.match(r"gpu\b", config.option.markexpr) or collection_path.suffix != ".py":
        return None
    return None if "mark.gpu" in collection_path.read_text("utf-8") else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say what is skipped, and what would run it."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: make gpu"))
