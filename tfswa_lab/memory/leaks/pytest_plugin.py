"""For your own test suite: a fixture that fails a test whose step loses memory.

It is available wherever this package is installed, without an import.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tfswa_lab.memory.leaks.verdicts import Diagnosis


@pytest.fixture
def assert_no_leak() -> Callable[..., Diagnosis]:
    """Diagnose a step as `leaks.diagnose` does, and fail with the diagnosis if memory is lost.

    It also fails if a step raises an error (except at the end of its data), runs out of memory, or
    needs more than `limit`.

    Returns:
        A function with the arguments of `diagnose`; it returns the diagnosis.
    """
    from tfswa_lab.memory.leaks import diagnose  # imports torch, which not every test needs

    def check(step: Callable, steps: int = 12, **options) -> Diagnosis:
        diagnosis = diagnose(step, steps, **options)
        if diagnosis.leaks or diagnosis.failed:
            pytest.fail(str(diagnosis), pytrace=False)
        return diagnosis

    return check
