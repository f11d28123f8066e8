"""`tfswa-lab memory`, as it is typed."""

import copy
import json
import pickle
import re

import pytest
from typer.testing import CliRunner

from tfswa_lab.cli import app
from tfswa_lab.memory.snapshot import read, write_snapshot
from tfswa_lab.memory.trace import Block, Frame, Timeline

MIB = 2**20
MODEL, TRAIN = Frame("model.py", 12, "forward"), Frame("train.py", 3, "step")
PROGRAM = """
import torch
from torch import nn

kept, net = [], nn.Linear(64, 64)


def make_step():
    network = nn.Linear(1024, 1024)
    x = torch.zeros(256, 1024)
    return lambda: network(x).sum().backward()


def leaks():
    kept.append(torch.zeros(1000))


def sound():
    net(torch.zeros(8, 64)).sum().backward()


number = 5
"""


def typed(*words, status=0):
    result = CliRunner().invoke(app, ["memory", *map(str, words)])
    assert result.exit_code == status, result.output
    return result


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """Two snapshots; the second holds 4 MiB more on one line, and ran out of memory."""
    folder = tmp_path_factory.mktemp("snapshots")
    blocks = [Block(8 * MIB, 8 * MIB, 1, 3, frames=(TRAIN,)), Block(MIB, MIB, 2, frames=(MODEL,))]
    more = Block(4 * MIB, 4 * MIB, 2, frames=(MODEL,))
    first = write_snapshot(folder / "first.pickle", Timeline(blocks, 3))
    second = folder / "second.pickle"
    large = Block(30 * MIB, 30 * MIB, 4, frames=(TRAIN,))
    write_snapshot(second, Timeline([*blocks, more, large], 4), limit=40 * MIB)
    return first, second


@pytest.fixture
def program(tmp_path, monkeypatch):
    path = tmp_path / "my_program.py"
    path.write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return path


def test_a_report_says_peak_holders_and_what_would_have_fitted(snapshots):
    said = typed("report", snapshots[1]).stdout
    assert "peak 13.00 MiB allocated" in said
    assert "train.py:3 (step)" in said
    assert "30.00 MiB requested" in said
    assert f"{read(snapshots[1]).oom_report().fits // MIB}.00 MiB would have fitted" in said
    by_category = typed("report", snapshots[1], "--by", "category", "--at", "oom").stdout
    assert "(oom), by category" in by_category


def test_a_report_as_json_has_the_same_numbers(snapshots):
    (said,) = json.loads(typed("report", snapshots[0], "--json").stdout)
    assert said["peak"] == 9 * MIB
    assert [(g["line"], g["size"]) for g in said["groups"]] == [
        (str(TRAIN), 8 * MIB),
        (str(MODEL), MIB),
    ]


def test_pages_are_written_beside_the_text(snapshots, tmp_path):
    page = tmp_path / "new" / "report.html"
    assert str(page) in typed("report", snapshots[0], "--html", page).stderr
    assert "train.py:3 (step)" in page.read_text()
    result = typed("diff", *snapshots, "--json", "--html", page)
    assert json.loads(result.stdout)
    assert "first.pickle" in page.read_text()
    assert "second.pickle" in page.read_text()


def test_a_difference_has_both_directions(snapshots):
    said = typed("diff", *snapshots, "--at", "end").stdout
    assert re.search(r"more in the second: 1\n +4.00 MiB +\+1 block +model.py:12", said)
    back = typed("diff", *reversed(snapshots), "--at", "end").stdout
    assert re.search(r"less in the second: 1\n +-4.00 MiB", back)


def test_several_devices_are_compared_one_by_one(snapshots, tmp_path):
    raws = [pickle.loads(path.read_bytes()) for path in snapshots]
    for name, raw in zip("ab", raws, strict=True):
        second = copy.deepcopy(raw)
        for segment in second["segments"]:
            segment["device"] = 1
        both = {key: raw[key] + second[key] for key in ("segments", "device_traces")}
        (tmp_path / name).write_bytes(pickle.dumps(both))
    said = typed("diff", tmp_path / "a", tmp_path / "b", "--at", "end").stdout
    assert said.count("more in the second: 1") == 2


def test_ranks_are_compared(snapshots):
    said = typed("ranks", snapshots[0].parent).stdout
    assert "2 ranks, peak 13.00 MiB at most (second.pickle)" in said


def test_a_step_is_predicted_from_a_module_and_from_a_file(program):
    by_name = typed("predict", "my_program:make_step").stdout
    assert by_name == typed("predict", f"{program}:make_step").stdout
    assert "GPU: " in by_name


def test_leaks_set_the_status(program):
    said = typed("leaks", "my_program:leaks", status=1).stdout
    assert said.startswith("leak of tensors: 3.91 KiB per step")
    assert typed("leaks", "my_program:sound").stdout.startswith("healthy")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("report", "nothing.pickle"), "nothing.pickle: no such memory snapshot"),
        (("report", "{first}", "--by", "lines"), "by='lines'; choose one of line"),
        (("report", "{first}", "--at", "oom"), "at='oom': the history of"),
        (("report", "{first}", "--rule", "softmax"), "--rule softmax: expected NAME=REGEX"),
        (("report", "{first}", "--rule", "a=("), "rule a='(' is no regular expression"),
        (("report", "{first}", "--device", "3"), "device=3"),
        (("report", "{first}", "--html", "."), "--html . is a folder"),
        (("diff", "{first}", "{first}", "--at", "oom"), "the first snapshot: at='oom'"),
        (("report", "{program}"), "my_program.py"),
        (("ranks", "nowhere"), "nowhere: no such folder"),
        (("predict", "make_step"), "'make_step': expected MODULE:FUNCTION"),
        (("predict", "no_such_module:f"), "no module no_such_module in"),
        (("predict", "nothing.py:f"), "nothing.py: no such file"),
        (("predict", "my_program:number"), "has no function number; it has"),
        (("leaks", "my_program:missing"), "has no function missing; it has"),
        (("leaks", "my_program:sound", "--steps", "2"), "steps=2"),
    ],
)
def test_mistakes_are_one_line(snapshots, program, words, message):
    filled = [word.format(first=snapshots[0], program=program) for word in words]
    result = typed(*filled, status=1)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
