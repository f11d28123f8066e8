"""One rule for the user's line: traces, leaks and snapshots charge a stack to the same line."""

import copy
from pathlib import Path

import einops
import numpy as np
import pytest
import torch

from tfswa_lab.memory.leaks.census import Boundary, Census
from tfswa_lab.memory.snapshot import read
from tfswa_lab.memory.snapshot.emit import as_snapshot
from tfswa_lab.memory.snapshot.groups import NOBODY
from tfswa_lab.memory.trace import trace
from tfswa_lab.memory.trace.stacks import Frame, in_short, user_frame, via
from tfswa_lab.memory.trace.timeline import Block, Timeline, by_line

SITE = "/home/she/.venv/lib/python3.12/site-packages"
MINE = Frame("/home/me/train.py", 9, "step")
CELL = Frame("/tmp/ipykernel_4711/3087212312.py", 4, "<module>")
STRANGERS = {
    "torch": Frame(f"{SITE}/torch/nn/modules/linear.py", 134, "forward"),
    "torchaudio": Frame(f"{SITE}/torchaudio/transforms/_transforms.py", 9, "forward"),
    "a library": Frame(f"{SITE}/lightning/pytorch/loops/fit_loop.py", 250, "advance"),
    "Debian": Frame("/usr/lib/python3/dist-packages/numpy/core/numeric.py", 1, "ones"),
    "conda": Frame("/opt/conda/envs/x/lib/python3.11/copy.py", 153, "deepcopy"),
    "Windows": Frame("C:\\py\\Lib\\site-packages\\torch\\_tensor.py", 5, "f"),
    "torch, from its sources": Frame("/opt/pytorch/torch/nn/modules/linear.py", 134, "forward"),
    "C++": Frame("/pytorch/aten/src/ATen/native/cuda/Blas.cpp", 300, "addmm"),
    "unknown": Frame("??", 0, "at::detail::empty_cuda"),
    "frozen": Frame("<frozen importlib._bootstrap>", 241, "_call_with_frames_removed"),
}
LOCAL = {
    "torch": Frame(torch.nn.functional.__file__, 9, "linear"),
    "einops": Frame(einops.__file__, 3, "rearrange"),
    "numpy": Frame(np.__file__, 3, "ones"),
    "the standard library": Frame(copy.__file__, 153, "deepcopy"),
}
LIBRARIES = [*STRANGERS.values(), *LOCAL.values()]
NETWORK = Frame(f"{SITE}/tfswa_lab/models/attention.py", 80, "forward")
NAMESAKE = Frame("/home/me/torch/train.py", 1, "main")
NEIGHBOUR = Frame(f"{SITE}/torch_geometric/nn/conv.py", 1, "forward")
NEIGHBOUR_HERE = Frame(str(Path(torch.__file__).parent) + "_geometric/nn/conv.py", 1, "forward")
COMMAND = Frame("<string>", 1, "<module>")  # of `python -c`
TABLE = [
    *(((library, MINE), MINE) for library in LIBRARIES),
    *(((library, CELL, MINE), CELL) for library in LIBRARIES),
    ((STRANGERS["torch"], STRANGERS["a library"]), STRANGERS["a library"]),
    ((STRANGERS["torch"], LOCAL["the standard library"], MINE), MINE),
    ((LOCAL["numpy"], STRANGERS["a library"]), LOCAL["numpy"]),
    ((STRANGERS["C++"], STRANGERS["torch"], MINE, STRANGERS["a library"]), MINE),
    ((STRANGERS["torch"], NETWORK, MINE), NETWORK),  # the lessons are about its lines
    ((STRANGERS["torch"], NAMESAKE), NAMESAKE),
    ((STRANGERS["torch"], NEIGHBOUR), NEIGHBOUR),
    ((LOCAL["torch"], NEIGHBOUR_HERE), NEIGHBOUR_HERE),
    ((STRANGERS["torch"], COMMAND), COMMAND),
    ((STRANGERS["torch"], COMMAND, MINE), MINE),
    ((STRANGERS["C++"], STRANGERS["unknown"], STRANGERS["torch"]), None),
    ((STRANGERS["torch"], STRANGERS["frozen"]), None),
]


@pytest.mark.parametrize(("stack", "line"), TABLE)
def test_traces_leaks_and_snapshots_agree(stack, line):
    block = Block(512, 512, 1, frames=stack)
    timeline = Timeline([block], 3)
    assert user_frame(stack) == line
    assert by_line(block) == str(line or "(unknown)")
    assert Census([timeline], 0, [Boundary(2, 3)]).at_peak() == [(in_short(line), 512)]
    (site,) = read(as_snapshot(timeline)).allocation_sites()
    assert site.line.split(" via ")[0] == str(line or NOBODY)


def test_a_folder_of_the_user_that_is_called_torch_is_not_torch(tmp_path):
    path = tmp_path / "torch" / "utils" / "data.py"
    path.parent.mkdir(parents=True)
    path.write_text("import torch\n\ndef load():\n    return torch.ones(300)\n")
    namespace = {}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    with trace() as seen:
        kept = namespace["load"]()
    assert [by_line(block) for block in seen.timeline().blocks] == [f"{path}:4 (load)"]
    del kept


def test_libraries_between_torch_and_the_user_are_named_from_the_outside_in():
    torch_line, einops_line = STRANGERS["torch"], Frame(f"{SITE}/einops/einops.py", 907, "einsum")
    assert via([torch_line, einops_line, MINE]) == "via einops"
    assert via([torch_line, einops_line, STRANGERS["a library"], MINE]) == "via lightning, einops"
    assert via([torch_line, MINE, einops_line]) == ""
    assert via([torch_line, STRANGERS["C++"], MINE]) == ""
    assert via([]) == via([torch_line]) == ""


@pytest.mark.parametrize(
    "file",
    [
        *("thread48.o", "libc.so.6", "/usr/lib/libcuda.so.535.1", "/usr/include/c++/11/functional"),
        *("std_thread.h", "Module.cpp", "crtstuff.c", "python3.12", "/usr/bin/python3", "[vdso]"),
    ],
)
def test_no_file_of_another_language_is_a_users_line(file):
    assert user_frame([Frame(file, 0, "execute_native_thread_routine"), MINE]) == MINE
    assert user_frame([Frame(file, 0, "execute_native_thread_routine")]) is None


@pytest.mark.parametrize("file", ["/home/me/c++/train.py", "train", "main.o.py", "<stdin>"])
def test_names_that_look_like_those_are_the_users(file):
    assert user_frame([Frame(file, 1, "step")]) == Frame(file, 1, "step")
