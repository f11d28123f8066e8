"""Can this machine run the lab? One line per check: `python -m tfswa_lab.doctor [--json]`.

Checks are independent: a broken package fails its own line and no other.

Notebook: 00_start_here
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tfswa_lab import repair

if TYPE_CHECKING:
    from rich.table import Table

OLDEST_PYTHON = (3, 11)  # as in pyproject.toml
GIB = 2**30  # not from `memory.sizes`: the doctor also works where the package is broken
FREE_GIB_WANTED = 5
SET_UP = 'make clean && make lab, or in an environment of your own: pip install -e ".[lab]"'
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Check:
    """One line: `ok`, `warn` (something is missing) or `fail` (the lab cannot run), and the fix."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


def run_checks() -> list[Check]:
    """Check everything the lab needs, in the order in which a reader should fix it."""
    return [_isolated(*entry) for entry in CHECKS]


def _isolated(name: str, check: Callable[[], Check], broken: str, fix: str) -> Check:
    """Run one check; an exception becomes its result."""
    try:
        return check()
    except Exception as error:
        reason = str(error).strip().splitlines()
        found = f"{type(error).__name__}: {reason[0] if reason else ''}"
        return Check(name, broken, found, fix)


def check_python() -> Check:
    """The running interpreter and its path."""
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < OLDEST_PYTHON:
        return Check("Python", "fail", found, "install Python 3.11 or newer, then: make lab")
    return Check("Python", "ok", found)


def check_numpy() -> Check:
    """numpy, scipy and soundfile can be imported."""
    import numpy
    import scipy
    import soundfile

    found = (
        f"numpy {numpy.__version__}, scipy {scipy.__version__}, {soundfile.__libsndfile_version__}"
    )
    return Check("numpy", "ok", found)


def check_torch() -> Check:
    """PyTorch can be imported."""
    import torch

    return Check("PyTorch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")


def check_cuda() -> Check:
    """The GPU, or why there is none."""
    import torch

    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
        return Check("CUDA", "ok", found)
    if shutil.which("nvidia-smi") is None:
        return Check("CUDA", "ok", "no GPU; the lessons run on the CPU")
    if torch.version.cuda is None:
        fix = "install a CUDA build: pip install --force-reinstall torch"
        return Check("CUDA", "warn", "there is a GPU, but this PyTorch is CPU-only", fix)
    found = f"there is a GPU, but PyTorch (CUDA {torch.version.cuda}) cannot use it"
    return Check("CUDA", "warn", found, "update the driver, or install PyTorch for an older CUDA")


def check_torchaudio() -> Check:
    """torchaudio can be imported, with or without its compiled extension."""
    import torchaudio

    torchaudio.transforms.Resample(44_100, 16_000)
    compiled = repair.extensions(Path(torchaudio.__file__).parent)
    extension = "extension works" if compiled else "works, its CUDA extension is set aside"
    return Check("torchaudio", "ok", f"{torchaudio.__version__}, {extension}")


def check_ffmpeg() -> Check:
    """Both programs, on PATH or in this environment: musdb needs them to be imported."""
    bin_folder = Path(sys.executable).parent
    programs = {name: repair.find_program(name, bin_folder) for name in repair.FFMPEG}
    if missing := [name for name, path in programs.items() if path is None]:
        fix = 'install ffmpeg, or: pip install -e ".[ffmpeg]", then: python -m tfswa_lab.repair'
        return Check("ffmpeg", "fail", f"no {' and no '.join(missing)}", fix)
    return Check("ffmpeg", "ok", programs["ffmpeg"])


def check_jupyterlab() -> Check:
    """JupyterLab is installed, and the packages of the widgets and the runner."""
    packages = ("jupyterlab", "ipywidgets", "papermill")
    return Check("JupyterLab", "ok", ", ".join(f"{name} {version(name)}" for name in packages))


def check_band() -> Check:
    """The embedded band, which every lesson uses by default."""
    from tfswa_lab.data.band import band_root

    songs = len(list(band_root().glob("*/*/mixture.wav")))
    if not songs:
        fix = "run: python data_scripts/make_band.py (lessons make it on first use, too)"
        return Check("embedded band", "warn", f"not yet in {band_root()}", fix)
    return Check("embedded band", "ok", f"{songs} songs in {band_root()}")


def check_real_stems() -> Check:
    """Folders of real recordings that the user has named; none are needed."""
    named = {
        name: os.environ[name] for name in ("TFSWA_LAB_AUDIO", "MUSDB_PATH") if os.environ.get(name)
    }
    if not named:
        return Check("real stems", "ok", "none (optional: TFSWA_LAB_AUDIO, MUSDB_PATH)")
    found = ", ".join(f"{name}={folder}" for name, folder in named.items())
    if missing := [name for name, folder in named.items() if not Path(folder).is_dir()]:
        fix = f"correct or unset {' and '.join(missing)}"
        return Check("real stems", "warn", f"no such folder: {found}", fix)
    return Check("real stems", "ok", found)


def check_disk() -> Check:
    """Room for executed notebooks, models and a data set."""
    free = shutil.disk_usage(Path.cwd()).free / GIB
    found = f"{free:.1f} GiB free in {Path.cwd()}"
    if free < FREE_GIB_WANTED:
        return Check(
            "disk", "warn", found, f"free some space: {FREE_GIB_WANTED} GiB is comfortable"
        )
    return Check("disk", "ok", found)


# Name, check, its state when it raises, and the fix in that case.
CHECKS = (
    ("Python", check_python, "fail", SET_UP),
    ("numpy", check_numpy, "fail", SET_UP),
    ("PyTorch", check_torch, "fail", SET_UP),
    ("CUDA", check_cuda, "warn", SET_UP),
    ("torchaudio", check_torchaudio, "warn", "run: python -m tfswa_lab.repair"),
    ("ffmpeg", check_ffmpeg, "fail", SET_UP),
    ("JupyterLab", check_jupyterlab, "fail", SET_UP),
    ("embedded band", check_band, "warn", SET_UP),
    ("real stems", check_real_stems, "warn", SET_UP),
    ("disk", check_disk, "warn", SET_UP),
)


def checks_table(checks: list[Check]) -> Table:
    """The checks for a terminal or a notebook; below each that is not ok, how to fix it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table("check", "state", "found")
    for check in checks:
        colour = COLOURS[check.state]
        fix = [Text(f"→ {check.fix}", style=colour)] if check.fix else []
        table.add_row(check.name, Text(check.state, colour), Group(Text(check.found), *fix))
    return table


def checks_text(checks: list[Check]) -> str:
    """The same without rich, for a Python that lacks it."""
    rows = [f"{check.name:14} {check.state:5} {check.found}  {check.fix}" for check in checks]
    return "\n".join(rows)


def main() -> None:
    """Print all checks; exit 1 if the lab cannot run."""
    parser = argparse.ArgumentParser(prog="python -m tfswa_lab.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")
    as_json = parser.parse_args().json
    checks = run_checks()
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    elif find_spec("rich") is None:
        print(checks_text(checks))
    else:
        from rich.console import Console

        Console().print(checks_table(checks))
    sys.exit(any(check.state == "fail" for check in checks))


if __name__ == "__main__":
    main()
