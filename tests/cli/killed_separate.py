"""Kill `tfswa-lab separate` at random moments, and look at what it leaves.

    OMP_NUM_THREADS=1 python tests/cli/killed_separate.py FOLDER 200 [SEED]

Two songs of one name are separated into one folder, one after the other or both at once, in forks
of this process. Each is killed at a random call of a Python function rather than at a random time,
so the moments are the same on a slow machine. This process itself separates nothing: a fork of a
process with threads can wait for ever. Prints what was left that must not be, and exits
with status 1 if anything was.
"""

import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import nn

from tfswa_lab.cli import app
from tfswa_lab.inference import files, separate  # noqa: F401  # imported before the forks
from tfswa_lab.models import storage

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
LEVELS = {"one": 0.4, "two": -0.8}  # of the songs


class Copies(nn.Module):
    """A separator without a network."""

    stems, audio_channels, sample_rate = ("vocals", "other"), 2, 44_100

    def forward(self, mixture):
        return torch.stack([0.75 * mixture, 0.25 * mixture], 1)


def run(song: Path, out: Path, calls, kill_at: int = -1, number: int = 0) -> None:
    """Separate in this process, which gets a signal at one of its calls."""

    def count(frame, event, _argument):
        if event == "call" and (calls[0] or frame.f_code.co_name == "separate_file"):
            calls[0] += 1
            if calls[0] == kill_at:
                os.kill(os.getpid(), number)

    sys.setprofile(count)
    options = ["--segment-seconds", "0.5", "--quiet", "--overwrite"]
    app(["separate", str(song), "--model", "copies", "--out", str(out), *options])


def forked(*arguments) -> int:
    """Start it in a fork; returns the process's number."""
    if process := os.fork():
        return process
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        run(*arguments)
    except SystemExit as end:
        os._exit(end.code or 0)
    os._exit(99)


def count_calls(song: Path, out: Path) -> int:
    """How many functions a whole run calls, in a fork as well."""
    calls = torch.zeros(1, dtype=torch.int64).share_memory_()
    process = forked(song, out, calls)
    os.waitpid(process, 0)
    return int(calls)


def faults(out: Path) -> list[str]:
    """What is wrong with the folder: anything but nothing, or all stems of one of the songs."""
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if not names:
        return []
    if names != ["other.wav", "vocals.wav"]:
        return [f"{names} were left"]
    found = [set(np.round(soundfile.read(out / name)[0], 2).ravel().tolist()) for name in names]
    whole = [[{round(share * level, 2)} for share in (0.25, 0.75)] for level in LEVELS.values()]
    return [] if found in whole else [f"{names} hold {found}"]


def main(folder: Path, trials: int, seed: int = 0) -> int:
    """Kill so often; returns how often something was wrong."""
    torch.set_num_threads(1)
    storage.load_separator = lambda _: Copies()
    draw, wrong, songs, statuses = random.Random(seed), 0, [], Counter()
    for name, level in LEVELS.items():
        songs.append(folder / name / "song.wav")
        songs[-1].parent.mkdir(parents=True)
        soundfile.write(songs[-1], np.full((66_150, 2), level), 44_100)
    total = count_calls(songs[0], folder / "counted")
    for trial in range(trials):
        out, number = folder / f"out{trial}", draw.choice(SIGNALS)
        started = []
        for song in songs:
            started.append(forked(song, out, [0], draw.randint(1, total), number))
            if trial % 2:  # one after the other
                statuses[os.waitpid(started.pop(), 0)[1]] += 1
        for process in started:
            statuses[os.waitpid(process, 0)[1]] += 1
        for fault in faults(out):
            wrong += 1
            print(f"trial {trial}, {signal.Signals(number).name}: {fault}")
    ends = {os.waitstatus_to_exitcode(status): count for status, count in statuses.items()}
    print(f"{trials} trials, {total} calls each, {wrong} faults, ends: {ends}")
    return wrong


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])) > 0)
