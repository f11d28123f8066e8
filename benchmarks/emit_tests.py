"""A plugin of pytest that emits how each test went: `pytest -p emit_tests`, started by `gpu.py`."""

from events import emit


def pytest_runtest_logreport(report) -> None:
    """One line for each test, and for each part of it that failed."""
    if report.when == "call" or not report.passed:
        facts = {"test": report.nodeid, "outcome": report.outcome, "part": report.when}
        emit("test", **facts, seconds=round(report.duration, 2), text=report.longreprtext[-2000:])
