"""`memory` needs nothing of the package but `durable`, and torch only where it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tfswa_lab.memory

ROOM = Path(tfswa_lab.memory.__file__).parent
ALLOWED = ("tfswa_lab.memory", "tfswa_lab.durable")


def imported(path: Path) -> set[str]:
    """All modules that a file imports, also inside functions and for type checkers."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import hides its room"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted(ROOM.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOM)))
def test_a_file_imports_no_other_room(path):
    ours = {name for name in imported(path) if name.split(".")[0] == "tfswa_lab"}
    assert all(f"{name}.".startswith(tuple(f"{each}." for each in ALLOWED)) for name in ours)


def test_torch_is_imported_where_it_is_used_only():
    """pytest loads the plugin in every test run of whoever installs the package; it takes 2 s."""
    code = "import sys, {0}; assert 'torch' not in sys.modules"
    lazy = "tfswa_lab.memory, tfswa_lab.memory.leaks, tfswa_lab.memory.leaks.pytest_plugin"
    lazy += ", tfswa_lab.memory.gauges, tfswa_lab.teaching.runner"  # these read the host
    subprocess.run([sys.executable, "-c", code.format(lazy)], check=True)
