"""SIGKILL and SIGTERM against real processes: the final weights do not know of them."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from toy_run import ToySongs, toy_trainer, weights

SCRIPT = Path(__file__).with_name("toy_run.py")
# Five steps an epoch, three batches a step; checkpoints fall anywhere in an epoch.
SETTINGS = {"accumulate": 3, "max_epochs": 30, "checkpoint_every_n_steps": 2}
OPTIONS = ["--norm=batch", "--dropout=0.2", "--accumulate=3", "--epochs=30", "--checkpoint-every=2"]


def start(folder, *options):
    command = [sys.executable, str(SCRIPT), str(folder), *OPTIONS, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c
    )


def hear_ctrl_c():
    """A shell starts what runs in its background deaf to Ctrl-C, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_a_new_checkpoint(process, folder, known):
    while set(folder.glob("checkpoints/step_*.ckpt")) <= known:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)


def test_killed_at_random_moments_a_run_ends_with_the_very_same_weights(tmp_path, one_thread):
    folder, seed = tmp_path / "run", time.time_ns()
    print(f"killed at the moments of seed {seed}")
    moments = random.Random(seed)
    resume = []
    for end in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        known = set(folder.glob("checkpoints/step_*.ckpt"))
        process = start(folder, *resume)
        wait_for_a_new_checkpoint(process, folder, known)
        time.sleep(moments.uniform(0, 0.25))
        process.send_signal(end)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -end, errors
        resume = ["--resume"]
    process = start(folder, "--resume", "--workers=2")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors

    whole = toy_trainer(
        tmp_path / "whole", "batch", 0.2, ToySongs(60), valid_set=ToySongs(4), **SETTINGS
    )
    whole.fit()
    final = load_file(folder / "final.safetensors")
    assert whole.step == 150
    assert final.keys() == weights(whole).keys()
    for name, tensor in weights(whole).items():
        assert torch.equal(final[name], tensor), name
