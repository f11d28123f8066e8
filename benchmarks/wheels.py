"""Fetch the wheels that another machine lacks, so that `make gpu` runs there without network.

    python benchmarks/wheels.py --have names.txt

`names.txt` holds what that machine has, one package a line, as `pip list --format=freeze` prints.
What is fetched are the versions installed here; torch and what belongs to it are never among them.
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

CHECKOUT = Path(__file__).resolve().parents[1]
THERE_ALREADY = {"torch", "torchaudio"}
# pip matches these exactly, so every glibc that a Linux of today may have is listed.
PLATFORMS = ["any", "manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"]
PLATFORMS += [f"manylinux_2_{minor}_x86_64" for minor in range(5, 40)]


def needed(python_version: str) -> set[str]:
    """All packages that lessons and tests need, directly or through others."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    target = {"python_version": python_version, "python_full_version": f"{python_version}.0"}
    target |= {"extra": "", "sys_platform": "linux", "platform_system": "Linux"}
    lines = [*project["dependencies"], *project["optional-dependencies"]["lab"], "pytest"]
    queue = [Requirement(line) for line in lines]
    names: set[str] = set()
    while queue:
        need = queue.pop()
        name = canonicalize_name(need.name)
        if name in names | THERE_ALREADY or (need.marker and not need.marker.evaluate(target)):
            continue
        names.add(name)
        try:
            queue += [Requirement(line) for line in requires(name) or ()]
        except PackageNotFoundError:
            continue  # needed there only, because of its Python: fetched without what it needs
    return names


def pinned(name: str) -> str:
    """The version proved here, if it is installed here."""
    try:
        return f"{name}=={version(name)}"
    except PackageNotFoundError:
        return name


def main() -> None:
    """Download into a folder, and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--have", type=Path, required=True, help="packages of that machine")
    parser.add_argument("--into", type=Path, default=Path(".whl"))
    parser.add_argument("--python-version", default="3.12", help="of that machine")
    options = parser.parse_args()
    present = re.findall(r"^[\w.-]+", options.have.read_text(), re.MULTILINE)
    names = needed(options.python_version) - {canonicalize_name(name) for name in present}
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", options.python_version, "--implementation", "cp"]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    command += ["--dest", str(options.into), *map(pinned, sorted(names))]
    if subprocess.run(command, check=False).returncode:
        sys.exit("pip could not fetch all of them, its message is above")
    files = sorted(options.into.glob("*.whl"), key=lambda path: path.stat().st_size)
    size = sum(path.stat().st_size for path in files) / 2**20
    largest = ", ".join(path.name.split("-")[0] for path in files[:-6:-1])
    print(f"{len(files)} wheels, {size:.1f} MiB in {options.into}; the largest: {largest}")


if __name__ == "__main__":
    main()
