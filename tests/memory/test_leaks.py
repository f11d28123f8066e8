"""The diagnosis of planted scripts: no growth called a leak, no leak called healthy.

All of them take minutes; `benchmarks/leaks.py` runs them. Here are the sound ones and a part of the
others.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from planted_beyond import BEYOND
from planted_gpu import ON_GPU
from planted_healthy import SOUND
from planted_holders import HELD_LEAKS
from planted_judged import JUDGED
from planted_rules import RULES
from planted_second import SECOND
from planted_tensors import TENSOR_LEAKS
from planted_unseen import UNSEEN

from tfswa_lab.memory.leaks import diagnose

SOME = [*SOUND, *TENSOR_LEAKS[::2], *HELD_LEAKS[::2], *SECOND[::4], *UNSEEN[::4]]
SOME += [*JUDGED, *RULES, *BEYOND]


pytestmark = pytest.mark.usefixtures("one_thread")


# A process that has run thousands of tests makes up to 1.1 KiB of host memory more per step than
# one of its own, and 1 KiB is a finding; why is not known. So one of its own decides there.
ALONE = """
import sys
from test_leaks import SOME, diagnose, judge
(script,) = (each for each in SOME if each.name == sys.argv[1])
step, arguments = script.prepare()
judge(script, diagnose(step, **arguments))
"""


@pytest.mark.parametrize("script", SOME, ids=lambda script: script.name)
def test_planted(script):
    step, arguments = script.prepare()
    diagnosis = diagnose(step, **arguments)
    if diagnosis.verdict == "host memory" not in script.verdicts:
        alone(script)
    else:
        judge(script, diagnosis)


def judge(script, diagnosis):
    assert diagnosis.verdict in script.verdicts, diagnosis
    assert script.is_named_in(diagnosis), diagnosis


def alone(script):
    command = [sys.executable, "-c", ALONE, script.name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


ALL = [*SOUND, *TENSOR_LEAKS, *HELD_LEAKS, *SECOND, *UNSEEN, *JUDGED, *RULES]
ONE_OF_EACH = list({script.verdicts[0]: script for script in reversed(ALL)}.values())


@pytest.mark.gpu
@pytest.mark.parametrize("script", [*ONE_OF_EACH, *ON_GPU], ids=lambda script: script.name)
def test_planted_with_tensors_on_a_gpu(script):
    torch.set_default_device("cuda")
    try:
        test_planted(script)
    finally:
        torch.set_default_device(None)
