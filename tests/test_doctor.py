import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from tfswa_lab import doctor, repair
from tfswa_lab.doctor import run_checks


def doctor_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tfswa_lab.doctor", *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def by_name(name: str) -> doctor.Check:
    return next(check for check in run_checks() if check.name == name)


def test_here_the_lab_can_run():
    done = doctor_process()
    assert done.returncode == 0, done.stdout
    assert "PyTorch" in done.stdout


def test_every_line_that_is_not_ok_says_how_to_fix_it(monkeypatch, tmp_path):
    for name in ("numpy", "torch", "torchaudio"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("MUSDB_PATH", str(tmp_path / "absent"))
    monkeypatch.setattr(repair, "find_program", lambda name, folder: None)
    monkeypatch.setattr(doctor, "FREE_GIB_WANTED", 1e9)
    checks = run_checks()
    bad = [check for check in checks if check.state != "ok"]
    assert {"numpy", "PyTorch", "torchaudio", "ffmpeg", "real stems", "disk"} <= {
        check.name for check in bad
    }
    assert all(check.fix for check in bad)


def shadow(folder: Path, name: str) -> None:
    """A module in front of the real one that raises, as a half-removed package does."""
    (folder / f"{name}.py").write_text("raise OSError('lib.so: cannot load this library')")


def test_without_torch_the_lab_cannot_run(tmp_path):
    shadow(tmp_path, "torch")
    done = doctor_process("--json", PYTHONPATH=str(tmp_path))
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 1
    assert checks["PyTorch"]["state"] == "fail"
    assert "cannot load this library" in checks["PyTorch"]["found"]
    assert checks["JupyterLab"]["state"] == "ok"


def test_without_numpy_the_lab_cannot_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert by_name("numpy").state == "fail"


def test_without_jupyterlab_the_lab_cannot_run(monkeypatch):
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", version)
    assert by_name("JupyterLab").state == "fail"


def test_broken_torchaudio_is_reported_and_stops_nothing(tmp_path):
    shadow(tmp_path, "torchaudio")
    done = doctor_process("--json", PYTHONPATH=str(tmp_path))
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 0
    assert checks["torchaudio"]["state"] == "warn"
    assert "cannot load this library" in checks["torchaudio"]["found"]
    assert "tfswa_lab.repair" in checks["torchaudio"]["fix"]
    assert checks["PyTorch"]["state"] == "ok"


def test_old_python_fails(monkeypatch):
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (99, 0))
    assert by_name("Python").state == "fail"


def test_gpu_that_torch_cannot_use_is_a_warning(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CPU-only" in by_name("CUDA").found
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "driver" in by_name("CUDA").fix


def test_real_stems_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("MUSDB_PATH", str(tmp_path))
    check = by_name("real stems")
    assert check.state == "ok"
    assert str(tmp_path) in check.found


def test_a_python_without_rich_gets_plain_lines():
    lines = doctor.checks_text(run_checks()).splitlines()
    assert len(lines) == len(doctor.CHECKS)
    assert lines[0].startswith("Python")
