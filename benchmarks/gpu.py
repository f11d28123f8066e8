"""Everything that needs a GPU, in a quarter of an hour of one, without network.

    python3 benchmarks/gpu.py PART… [--out DIR] [--wheels DIR] [--mir1k DIR] [--seconds N]
    python3 benchmarks/gpu.py report DIR/events.jsonl…
    python3 benchmarks/gpu.py carry mir1k ROOT DIR

Parts are `smoke` (what the others need is there; exit 3 at once if not), `measure` (benchmarks),
`tests` (those marked gpu) and `lessons` (in full). A measurement exists when its line is in
DIR/events.jsonl; `report` makes results and tables of such lines. The two commands for a borrowed
GPU are in README.md beside this file. `--rehearse` plays a GPU on the CPU, with tiny sizes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from events import MACHINE, REHEARSED, emit
from gpu_jobs import CHECKOUT, Job, Session, end, end_left_over, members, start_in_background

BEGAN = time.monotonic()
BENCHMARKS = CHECKOUT / "benchmarks"
BUILD = CHECKOUT / "build" / "gpu"
PLAYED = CHECKOUT / "tests" / "played_gpu"
PARTS = ("smoke", "measure", "tests", "lessons")
PACKING = 15  # seconds at the end, for what comes back
FILES, FILE_BYTES = 8, 16 * 2**20  # that come back from a borrowed machine
ROOMY_GIB = 40  # of a GPU on which several lessons run side by side


def script(name: str, seconds: float, command: str, alone: bool = True) -> Job:
    """A job that runs a script of this folder."""
    path, *arguments = command.split()
    return Job(name, seconds, (str(BENCHMARKS / path), *arguments), alone)


SMOKE = script("smoke", 50, "gpu_smoke.py", alone=False)  # the training reads its clips meanwhile
# In order of value; seconds are limits, from what we expect of an H100: 380 with the smoke.
# Only the recordings are made while the training goes on: all others measure times as well.
MEASURE = (
    script("hmm", 35, "hmm.py --device cuda"),
    script("staged", 25, "eight_stages.py --device cuda"),
    script("lean", 30, "lean.py --device cuda"),
    script("snapshots", 15, "gpu_snapshots.py", alone=False),
    script("prediction", 65, "memory_prediction.py --measure"),
    script("default kernel", 20, "memory_prediction.py --measure --default"),
    script("leaks", 35, "leaks.py --device cuda"),
    script("separation", 30, "separator.py --device cuda"),
    script("bsseval", 25, "bsseval.py --device cuda"),
    script("training", 25, "training.py --device cuda"),
    script("memory_trace", 10, "memory_trace.py --device cuda"),
    script("claims", 15, "claims.py --device cuda"),
)
MUSEVAL = script("museval", 300, "bsseval.py --museval")  # on cores of its own, beside the others
TRAINER = Job("mir1k", 0, ())  # its command is known when it is started
BAND_CODE = "from tfswa_lab.data.band import ensure_band; ensure_band()"
BAND = Job("band", 60, ("-c", BAND_CODE), alone=False)
# Diagnoses look at the whole GPU, so they take others who use it for a leak: `measure` runs the
# planted scripts alone, and lesson 06 comes before all others.
PYTEST = ("-m", "pytest", "-v", "-m", "gpu and not notebook", "tests")
PYTEST += ("--deselect", "tests/memory/test_leaks.py")
PYTEST += ("-p", "no:cacheprovider", "-p", "emit_tests")
TESTS = Job("tests", 120, PYTEST, alone=False)
COLLECTED = Job("tests", 120, (*PYTEST, "--collect-only"), alone=False)  # all that can be played
LONE_LESSONS = {"06_leak_diagnosis": 75}
# The longest first. 07 trains thirteen separators, and may take as long as all others together.
LESSONS = {"07_training": 250, "03_tfswa_unet": 120, "05_where_memory_goes": 120}
LESSONS |= {"04_tf_locoformer": 120, "08_evaluation": 120, "09_running_lean": 90}
LESSONS |= {"10_staged_pipelines": 90, "11_hmm": 60}
LESSONS |= {"01_sound_to_spectrogram": 60, "02_attention_blocks": 60, "00_start_here": 60}


# Missing packages --------------------------------------------------------------------------


def lacks(wheel: Path) -> bool:
    """Whether this Python has no version of the wheel's package."""
    try:
        version(wheel.name.split("-")[0])
    except PackageNotFoundError:
        return True
    return False


def add_packages(wheels: Path | None) -> None:
    """Make the checkout and the missing packages importable, in all child processes."""
    site = BUILD / "site"
    sys.path[1:1] = [str(CHECKOUT), str(site)]  # with what an earlier command has installed
    found = sorted(wheels.rglob("*.whl")) if wheels else []
    files = [str(wheel) for wheel in found if lacks(wheel)]
    if files:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        command += ["--no-compile", "--upgrade", "--target", str(site), *files]
        subprocess.run(command, check=True)
    prepend("PYTHONPATH", CHECKOUT, BENCHMARKS, site)
    importlib.invalidate_caches()


def prepend(variable: str, *folders: Path) -> None:
    """Put folders before all others in a variable of the environment."""
    inherited = os.environ.get(variable)
    parts = [*map(str, folders), *([inherited] if inherited else [])]
    os.environ[variable] = os.pathsep.join(parts)


def stand_in_for_ffmpeg() -> None:
    """Let musdb list WAV files where there is no ffmpeg; decoding with it fails and says why."""
    scripts = {
        "ffmpeg": "echo 'this machine has no ffmpeg' >&2; exit 1",
        "ffprobe": f"exec '{sys.executable}' -S -E '{BENCHMARKS}/wav_probe.py' \"$@\"",
    }
    folder = BUILD / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in scripts.items():
        if shutil.which(name) is None:
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)
    os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], str(folder)])


def describe() -> dict:
    """GPU, driver, torch and cuDNN, found by a process that ends before others measure."""
    command = [sys.executable, str(BENCHMARKS / "gpu_smoke.py"), "--describe"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        sys.exit(3)
    return json.loads(done.stdout.splitlines()[-1])


# The parts ----------------------------------------------------------------------------------


def smoke(session: Session) -> None:
    """Exit 3 if a later part could not work; a check that is only slow stops nothing."""
    if session.run(SMOKE) == "exit 3":
        session.log("The smoke test failed, so nothing else is started.")
        end(TRAINER)
        sys.exit(3)


def measure(session: Session) -> None:
    """All benchmarks, with museval on cores of its own beside them."""
    start_in_background(MUSEVAL, BUILD / "museval.txt")
    for job in MEASURE:
        session.run(job)
    end(MUSEVAL)


def train(clips: Path) -> None:
    """Start the training on MIR-1K, which goes on when this command has ended."""
    command = (str(BENCHMARKS / "mir1k.py"), str(clips), "--device", "cuda")
    job = Job(TRAINER.name, 0, (*command, "--out", str(BUILD / "mir1k")))
    start_in_background(job, BUILD / "mir1k.txt")


def tests_and_lessons(session: Session, parts: list[str], machine: dict) -> None:
    """Tests beside lessons, four at once where the GPU has room for them."""
    session.run(BAND)
    jobs = []
    if "lessons" in parts:
        for name, seconds in LONE_LESSONS.items():
            session.run(lesson(session, name, seconds))
        jobs += [lesson(session, name, seconds) for name, seconds in LESSONS.items()]
    if "tests" in parts:
        jobs.insert(0, COLLECTED if REHEARSED in os.environ else TESTS)
    roomy = machine.get("memory_gib", 0) >= ROOMY_GIB
    with ThreadPoolExecutor(5 if roomy else 1) as pool:
        try:
            list(pool.map(session.run, jobs))
        except BaseException:  # asked to end: the pool waits for its jobs, so these are ended first
            pool.shutdown(wait=False, cancel_futures=True)
            end_left_over(spared=TRAINER)
            raise
    for times in sorted((BUILD / "notebooks").glob("*/times.json")):
        for run in json.loads(times.read_text()):
            emit("lesson", **run)


def lesson(session: Session, name: str, seconds: float) -> Job:
    """Execute a lesson in full; the executed copy is kept, also of one that failed.

    In a rehearsal it runs quickly on the CPU: it asserts what a played GPU has not.
    """
    limit = str(session.patience * seconds - 10)  # it ends itself before it is ended
    options = ("--output", str(BUILD / "notebooks" / name), "--timeout", limit)
    played = REHEARSED in os.environ
    options += ("--quick", "--device", "cpu") if played else ("--full", "--device", "cuda")
    command = ("-m", "tfswa_lab.teaching.runner", name, *options)
    path = os.environ["PYTHONPATH"].replace(str(PLAYED), str(CHECKOUT))
    return Job(f"lesson {name}", seconds, command, alone=False, python_path=path)


# Files sent back ----------------------------------------------------------------------------


def pack(out: Path, last: bool) -> None:
    """Copy weights and notebooks into the folder; say which files are too large to be sent back."""
    if last:
        end(TRAINER, seconds=10)
    trained = BUILD / "mir1k"
    if (trained / "training.json").exists():
        emit("mir1k", **json.loads((trained / "training.json").read_text()))
    names = ("separator.json", "separator.safetensors", "training.json")
    archive(out / "mir1k.tar.gz", [trained / name for name in names if (trained / name).exists()])
    for name in ("mir1k.txt", "museval.txt"):  # output of the jobs in the background
        if (BUILD / name).exists():
            said = (BUILD / name).read_text(errors="replace").splitlines()[-20:]
            emit("background", name=name, output="\n".join(said)[-4000:])
    archive(out / "notebooks.tar.gz", sorted((BUILD / "notebooks").rglob("*.ipynb")))
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    too_large = [name for name, size in sizes.items() if size >= FILE_BYTES]
    emit("returned", files=sizes, too_large=too_large, too_many=len(sizes) > FILES)
    for name, size in sizes.items():
        print(f"{size / 2**20:7.2f} MiB  {name}{'  TOO LARGE' if name in too_large else ''}")


def archive(path: Path, files: list[Path]) -> None:
    """Pack several files into one, if there are any."""
    if files:
        with tarfile.open(path, "w:gz") as packed:
            for file in files:
                packed.add(file, file.name)


def options(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=BUILD / "out", help="for all that comes back")
    parser.add_argument("--wheels", type=Path, help="folder of packages that are missing here")
    parser.add_argument("--mir1k", type=Path, help="folder of training clips, to be trained on")
    parser.add_argument("--seconds", type=float, help="for everything; else each job has a limit")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        default="FAKE_GPU_GIB" in os.environ,
        help="play a GPU, with tiny sizes; FAKE_GPU_GIB is its memory",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Run the parts; exit 1 if anything failed, 3 if nothing can be run."""
    if arguments[:1] == ["report"]:
        import gpu_report

        return gpu_report.main(arguments[1:])
    if arguments[:2] == ["carry", "mir1k"]:
        from mir1k_carry import carry

        try:
            return carry(*arguments[2:])
        except (OSError, ValueError) as error:
            sys.exit(str(error))
    asked = options(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all jobs are ended
    if asked.rehearse:
        os.environ[REHEARSED] = "1"
        prepend("PYTHONPATH", PLAYED)
    end_left_over(spared=TRAINER)
    add_packages(asked.wheels)
    stand_in_for_ffmpeg()
    deadline = BEGAN + asked.seconds - PACKING if asked.seconds else None
    session = Session(asked.out.resolve(), deadline, resting=TRAINER)
    os.environ["TFSWA_LAB_OUT"] = str(asked.out.resolve())
    os.environ[MACHINE] = json.dumps(machine := describe())
    session.log(json.dumps(machine))
    try:
        if asked.mir1k and not members(TRAINER.known_by):
            train(asked.mir1k.resolve())
        if "measure" in asked.parts:
            start_in_background(BAND, BUILD / "band.txt")
        if "smoke" in asked.parts:
            smoke(session)
        if "measure" in asked.parts:
            measure(session)
        if {"tests", "lessons"} & set(asked.parts):
            tests_and_lessons(session, asked.parts, machine)
    finally:
        end_left_over(spared=TRAINER)
        pack(asked.out, last="measure" not in asked.parts or "lessons" in asked.parts)
    sys.exit(not session.good)


if __name__ == "__main__":
    main(sys.argv[1:])
