"""The run on a borrowed GPU, rehearsed without one: nothing that was measured is ever lost."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT / "benchmarks"))
import events  # noqa: E402
import gpu  # noqa: E402
import gpu_report  # noqa: E402
import memory_prediction  # noqa: E402
from gpu_jobs import Job, Session, end, members  # noqa: E402

NOBODY = Job("nobody", 0, ())
ENOUGH = 600  # seconds: a limit that no machine is too slow for


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT / "benchmarks"))
    monkeypatch.setenv(events.FILE, "")  # so that it is taken back
    return Session(tmp_path / "out", None, resting=NOBODY)


def code(name, text, seconds=ENOUGH):
    return Job(f"{name} of {os.getpid()}", seconds, ("-c", text))


def lines(session_or_folder):
    folder = getattr(session_or_folder, "folder", session_or_folder)
    return events.read([folder / "events.jsonl"])[0]


# Lines --------------------------------------------------------------------------------------


def test_a_line_that_was_cut_is_counted_and_spoils_no_other(tmp_path):
    path = tmp_path / "events.jsonl"
    events.append(path, {"kind": "row", "number": 1})
    with path.open("a") as file:
        file.write('{"kind": "row", "num')
    events.append(path, {"kind": "row", "number": 2})
    found, cut = events.read([path])
    assert [line["number"] for line in found] == [1, 2]
    assert cut == 1


ROWS = """
from events import emit
for number in range(1000):
    emit("row", number=number)
    print("row", number)
"""


def test_whatever_was_finished_when_it_is_killed_is_there(tmp_path):
    """Ten times, after a random number of rows: whoever kills does not wait for a good moment."""
    job = code("rows", ROWS)
    main = (
        "import sys; from pathlib import Path; from gpu_jobs import Job, Session\n"
        "session = Session(Path(sys.argv[1]), None, resting=Job('nobody', 0, ()))\n"
        f"session.run({job!r})"
    )
    for seed in range(10):
        out, wanted = tmp_path / str(seed), random.Random(seed).randrange(1, 100)
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", main, str(out)],
            env=os.environ | {"PYTHONPATH": str(CHECKOUT / "benchmarks")},
            stdout=subprocess.PIPE,
            text=True,
        )
        seen = [next(process.stdout) for _ in range(1 + wanted)]
        process.kill()
        process.wait()
        numbers = [line["number"] for line in lines(out)]
        assert seen[-1] == f"[{job.name}] row {wanted - 1}\n"
        assert numbers[:wanted] == list(range(wanted))
        end(job)
    assert members(job.known_by) == []


# Jobs ---------------------------------------------------------------------------------------


def test_a_job_that_hangs_fails_or_leaves_a_child_behind_spoils_no_other(session, tmp_path):
    child = "import os, time; os.setsid(); time.sleep(10_000)"
    leaves = (
        "import subprocess, sys, events\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "events.emit('child', pid=child.pid)"
    )
    hangs = "import events, time\nevents.emit('before'); print('here', flush=True)\ntime.sleep(1e4)"
    fails = "import events\nevents.emit('before')\nraise SystemExit('no wheels')"
    short_of_memory = (
        "import events\n"
        "class OutOfMemoryError(RuntimeError): pass\n"
        "def step(): raise OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')\n"
        "events.attempt('step', step, batch=8)\n"
        "events.attempt('step', lambda: {'seconds': 1.0}, batch=1)\n"
        "events.attempt('step', lambda: 1 / 0, batch=0)"
    )
    ended = [
        session.run(code("leaves", leaves)),
        session.run(code("fails", fails)),
        session.run(code("short of memory", short_of_memory)),
        session.run(code("hangs", hangs, seconds=1)),  # ten times that: there is no deadline
        session.run(code("last", "print('still here')")),
    ]
    assert ended == ["exit 0", "exit 1", "exit 0", "not finished after 10 s", "exit 0"]
    assert not session.good
    found = lines(tmp_path / "out")
    (pid,) = [line["pid"] for line in found if line["kind"] == "child"]
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    steps = [line for line in found if line["kind"] == "step"]
    assert [line["batch"] for line in steps] == [8, 1]
    assert steps[0]["out_of_memory"].startswith("CUDA out of memory")
    failed = [line for line in found if line["kind"] == "failed"]
    assert [line["of"] for line in failed] == ["job", "step", "job"]
    assert failed[0]["output"] == "no wheels"
    assert "ZeroDivisionError" in failed[1]["traceback"]
    assert failed[2]["output"] == "here"
    assert [line["last"] for line in found if line["kind"] == "job"][-1] == "still here"
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "not finished after 10 s" in log
    assert "still here" in log


def test_after_the_deadline_nothing_is_started(tmp_path, monkeypatch):
    monkeypatch.setenv(events.FILE, "")
    session = Session(tmp_path, deadline=1.0, resting=NOBODY)
    assert session.run(code("late", "print('started')")) == "no time was left"
    (job, failed) = lines(tmp_path)
    assert job["ended"] == "no time was left"
    assert failed["of"] == "job"


def test_the_limits_fit_into_the_two_commands():
    assert sum(job.seconds for job in (gpu.SMOKE, *gpu.MEASURE)) < 385
    assert gpu.SMOKE.seconds <= 60
    notebooks = {path.stem for path in (CHECKOUT / "notebooks").glob("*.ipynb")}
    assert set(gpu.LESSONS | gpu.LONE_LESSONS) == notebooks
    for seconds in (gpu.TESTS.seconds, *gpu.LESSONS.values(), *gpu.LONE_LESSONS.values()):
        assert seconds <= 280 - gpu.PACKING


def test_the_first_rows_that_are_measured_have_everything_in_them():
    rows = memory_prediction.predictions_of("2.11.0+cu130")["rows"]
    some = memory_prediction.in_fair_order(rows)[:8]
    assert len(rows) == 57
    for name in ("network", "precision", "attention", "checkpointed", "train", "batch"):
        assert {row[name] for row in some} >= {row[name] for row in rows if "claim" not in row}


@pytest.mark.parametrize(
    ("version", "nearest"), [("2.11.0+cu130", "2.11"), ("2.13.1", "2.13"), ("2.14.0", "2.13")]
)
def test_predictions_are_those_of_the_nearest_torch(version, nearest):
    predicted = memory_prediction.predictions_of(version)
    assert predicted["machine"]["torch"].startswith(nearest)


def test_without_a_gpu_it_says_so_and_how_to_rehearse(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "smoke", "--out", str(tmp_path)]
    without = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, env=without)
    assert done.returncode == 3
    assert "make gpu ARGS=--rehearse" in done.stderr


# The whole ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copy(tmp_path_factory, band_root):
    """What would travel, all files that git tracks or would track; and the band, made already."""
    folder = tmp_path_factory.mktemp("borrowed") / "checkout"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in names:
        if (CHECKOUT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, folder / name)
    for package in ("models", "sequence"):  # what numba has compiled need not be compiled again
        (folder / "tfswa_lab" / package / "__pycache__").symlink_to(
            CHECKOUT / "tfswa_lab" / package / "__pycache__"
        )
    (folder / "data").mkdir()
    (folder / "data" / "band").symlink_to(band_root)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two clips of a singer whom MIR-1K trains on."""
    root = tmp_path_factory.mktemp("mir1k")
    (root / "train").mkdir()
    draw = np.random.default_rng(0)
    for name in ("amy_1_01", "amy_2_01"):
        soundfile.write(
            root / f"train/{name}.flac", 0.1 * draw.standard_normal((64_000, 2)), 16_000
        )
        for label in ("f0", "vocal"):
            (root / f"train/{name}.{label}.txt").write_text("1\n" * 199)
    return root


def run(copy, *arguments):
    command = [sys.executable, str(copy / "benchmarks" / "gpu.py"), *map(str, arguments)]
    environment = os.environ | {"FAKE_GPU_GIB": "8", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)


def test_the_first_command_rehearsed(copy, clips, tmp_path, capsys):
    """On a played GPU of 8 GiB, from a copy of the checkout; one test, as it takes a minute."""
    out = copy / "out"
    done = run(copy, "smoke", "measure", "--rehearse", "--mir1k", clips, "--out", out)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    every_job_has_measured(out)
    what_does_not_fit_says_so(out)
    little_enough_comes_back(out)
    the_training_goes_on_until_it_is_collected(copy, tmp_path)
    a_report_is_made_of_any_beginning(out, tmp_path)
    capsys.readouterr()


def every_job_has_measured(out):
    found = lines(out)
    jobs = {line["name"]: line for line in found if line["kind"] == "job"}
    assert list(jobs) == [job.name for job in (gpu.SMOKE, *gpu.MEASURE)]
    assert all(job["ok"] for job in jobs.values()), jobs
    failed = [line for line in found if line["kind"] == "failed" and line.get("set") != "on a GPU"]
    assert failed == []
    kinds = {line["kind"] for line in found}
    assert kinds >= {"smoke", "snapshot", "prediction", "leak", "separation", "bsseval"}
    assert kinds >= {"training", "trace", "claim", "returned"}
    assert all(line["gpu_name"] == "Played GPU" and line["memory_gib"] == 8 for line in found)


def what_does_not_fit_says_so(out):
    rows = [line for line in lines(out) if line["kind"] == "prediction"]
    too_large = [row for row in rows if row["predicted"] > 0.9 * 7.5 * 2**30]
    assert 0 < len(too_large) < len(rows)
    for row in rows:
        assert ("does_not_fit" in row) == (row in too_large)
        assert ("measured" in row) != (row in too_large)


def little_enough_comes_back(out):
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"events.jsonl", "log.txt", "step.pickle.gz"}
    assert len(files) <= gpu.FILES
    assert all(path.stat().st_size < gpu.FILE_BYTES for path in files)
    assert all(path.parent == out for path in files)


def the_training_goes_on_until_it_is_collected(copy, tmp_path):
    """It rested while others measured, outlived their command, and writes when asked to end."""
    collect = (
        "import os, sys; sys.path.insert(0, 'benchmarks'); import gpu; from pathlib import Path\n"
        f"os.environ['TFSWA_LAB_EVENTS'] = r'{tmp_path}/events.jsonl'\n"
        "print(len(gpu.members(gpu.TRAINER.known_by)))\n"
        f"gpu.end(gpu.TRAINER, seconds={ENOUGH})\n"
        f"gpu.pack(Path(r'{tmp_path}'), last=True)"
    )
    done = subprocess.run([sys.executable, "-c", collect], cwd=copy, capture_output=True, text=True)
    output = (copy / "build" / "gpu" / "mir1k.txt").read_text()
    assert done.stdout.startswith("1\n"), done.stdout + done.stderr + output
    (line,) = [line for line in lines(tmp_path) if line["kind"] == "mir1k"]
    assert line["steps"] > 0
    assert line["seconds_of_audio_per_second"] > 0
    shutil.unpack_archive(tmp_path / "mir1k.tar.gz", tmp_path / "weights", filter="data")
    from tfswa_lab.models.storage import load_separator

    assert load_separator(tmp_path / "weights").stems == ("voice",)


def a_report_is_made_of_any_beginning(out, tmp_path):
    whole = (out / "events.jsonl").read_bytes()
    for share in (0.0, 0.2, 0.5, 0.999, 1.0):
        results = tmp_path / f"{share}"
        results.mkdir()
        (results / "events.jsonl").write_bytes(whole[: round(share * len(whole))])
        gpu_report.main([str(results / "events.jsonl")], results)
    made = json.loads((results / "memory_prediction-gpu.json").read_text())
    assert made["machine"]["gpu_name"] == "Played GPU"
    assert made["configurations"] == sum("measured" in row for row in made["rows"]) > 0
    assert (results / "memory_prediction-gpu.png").stat().st_size > 0
    assert len(list(results.glob("*-gpu.json"))) >= 9


def test_a_report_of_nothing_says_what_it_wants():
    with pytest.raises(SystemExit, match=r"gpu\.py report OUT/events\.jsonl"):
        gpu.main(["report"])


def test_a_run_that_is_asked_to_end_ends_its_jobs(copy, tmp_path):
    """SIGTERM: nothing goes on behind the back of whoever ended it."""
    process = subprocess.Popen(
        [sys.executable, "benchmarks/gpu.py", "smoke", "--rehearse", "--out", str(tmp_path)],
        cwd=copy,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("[smoke] smoke"):
            process.send_signal(signal.SIGTERM)
            break
    process.communicate()
    assert process.returncode == 143
    assert members(f"{copy}: smoke") == []
