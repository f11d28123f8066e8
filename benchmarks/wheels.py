"""Fetch the wheels that a GPU machine without network lacks, in two folders.

    python benchmarks/wheels.py

`.whl/core` holds what tests and benchmarks need there, `.whl/lessons` what lessons need on top.
The packages of that machine are listed in `benchmarks/gpu_machine.txt`, in the form of
`pip list --format=freeze`. The versions installed here are fetched. At the end it prints how much
travels to that machine with the checkout, and fails if that is too much.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tfswa_lab.memory.sizes import MIB

CHECKOUT = Path(__file__).resolve().parents[1]
GPU_MACHINE = CHECKOUT / "benchmarks" / "gpu_machine.txt"
CLIPS = CHECKOUT / ".gpu" / "mir1k"
TRAVELS = 64 * MIB  # the checkout and all folders that go with one command
LIMITS = {"core": 6 * MIB, "lessons": 14 * MIB}
NEVER = {
    *("torch", "torchaudio"),  # a machine with a GPU has its own
    *("jupyterlab", "jupyterlab-widgets", "widgetsnbextension"),  # all for a browser
    "debugpy",  # ipykernel runs without it, and only cannot be debugged
}
# pip matches these exactly, so every glibc that a Linux of today may have is listed.
PLATFORMS = ["any", "manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"]
PLATFORMS += [f"manylinux_2_{minor}_x86_64" for minor in range(5, 40)]


def tree_bytes() -> int:
    """Size of the checkout as it travels: all its files but those that git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if listed.returncode:
        raise ValueError(f"{CHECKOUT} is no git checkout ({listed.stderr.strip()}); clone it again")
    paths = {CHECKOUT / name for name in listed.stdout.split("\0") if name}
    return sum(path.lstat().st_size for path in paths if path.is_symlink() or path.is_file())


def folder_bytes(folder: Path) -> int:
    """Size of a folder's files; 0 if there is no such folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def total(sizes: dict[str, int], limit: int = TRAVELS) -> str:
    """A sum for people: `checkout 8.7 + .whl/core 4.0 = 12.7 MiB of 64.0`."""
    terms = " + ".join(f"{name} {size / MIB:.1f}" for name, size in sizes.items())
    return f"{terms} = {sum(sizes.values()) / MIB:.1f} MiB of {limit / MIB:.1f}"


def needed(roots: list[str], there: set[str], python_version: str) -> set[str]:
    """These packages and all their dependencies, without the packages that are there.

    A package that is there has its dependencies there, perhaps others than its version here has.
    """
    target = {"python_version": python_version, "python_full_version": f"{python_version}.0"}
    target |= {"extra": "", "sys_platform": "linux", "platform_system": "Linux"}
    queue = [Requirement(line) for line in roots]
    names: set[str] = set()
    while queue:
        need = queue.pop()
        name = canonicalize_name(need.name)
        if name in names | there | NEVER or (need.marker and not need.marker.evaluate(target)):
            continue
        names.add(name)
        try:
            queue += [Requirement(line) for line in requires(name) or ()]
        except PackageNotFoundError:
            continue  # needed there only, because of its Python: fetched without what it needs
    return names


def contents(have: Path, python_version: str) -> dict[str, set[str]]:
    """The packages of each folder, for a machine that has those listed in a file."""
    listed = re.findall(r"^[\w.-]+", have.read_text(), re.MULTILINE)
    there = {canonicalize_name(name) for name in listed}
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    core = [*project["dependencies"], "pytest", "mir-eval", "museval", "auraloss"]
    lessons = [*project["optional-dependencies"]["lab"], "ipykernel", "nbformat"]
    names = needed(core, there, python_version)
    return {"core": names, "lessons": needed(lessons, there | names, python_version)}


def pinned(name: str) -> str:
    """The version proved here, if it is installed here."""
    try:
        return f"{name}=={version(name)}"
    except PackageNotFoundError:
        return name


def fetch(names: set[str], folder: Path, python_version: str) -> None:
    """Download wheels; older ones go first, since pip installs no folder with two versions."""
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python_version, "--implementation", "cp"]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    command += ["--dest", str(folder), *map(pinned, sorted(names))]
    if names and subprocess.run(command, check=False).returncode:
        sys.exit(f"pip could not fetch all wheels of {folder}, its message is above")


def describe(folder: Path) -> str:
    """Number, size and the largest of a folder's wheels."""
    files = sorted(folder.glob("*.whl"), key=lambda path: path.stat().st_size)
    largest = ", ".join(path.name.split("-")[0] for path in files[:-6:-1])
    limit = LIMITS[folder.name] / MIB
    return (
        f"{folder}: {len(files)} wheels, {folder_bytes(folder) / MIB:.1f} MiB of {limit:.1f}; "
        f"the largest: {largest}"
    )


def too_much(into: Path) -> list[str]:
    """Print what travels with each kind of command, and return what exceeds its limit."""
    sizes = {name: folder_bytes(into / name) for name in LIMITS}
    problems = [describe(into / name) for name in LIMITS if sizes[name] > LIMITS[name]]
    core = {"checkout": tree_bytes(), f"{into}/core": sizes["core"]}
    clips = {".gpu/mir1k": folder_bytes(CLIPS)} if CLIPS.is_dir() else {}
    commands = {
        "tests and benchmarks": core | clips,
        "lessons": core | {f"{into}/lessons": sizes["lessons"]},
    }
    for command, parts in commands.items():
        line = f"{command}: {total(parts)}"
        print(line)
        if sum(parts.values()) > TRAVELS:
            problems.append(line)
    return problems


def main() -> None:
    """Download both folders, and say how large they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--have", type=Path, default=GPU_MACHINE, help="packages of that machine")
    parser.add_argument("--into", type=Path, default=Path(".whl"))
    parser.add_argument("--python-version", default="3.12", help="of that machine")
    options = parser.parse_args()
    for name, packages in contents(options.have, options.python_version).items():
        fetch(packages, options.into / name, options.python_version)
        print(describe(options.into / name))
    if problems := too_much(options.into):
        sys.exit("\n".join(["above the limit, so let less travel:", *problems]))


if __name__ == "__main__":
    main()
