"""Planted scripts that need a GPU: its allocator, its libraries, and others who use it.

`benchmarks/leaks.py --device cuda` runs them, and the tests marked gpu.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys

import torch
from planted import HEALTHY, PEAK, TENSORS, WARM_UP, planter

OUTSIDE = "outside the allocator"
MIB = 2**20
ON_GPU = []
planted = planter(ON_GPU)


@planted("fragmentation")
def each_block_larger_than_all_before():
    return lambda i: torch.empty((32 + 2 * i) * MIB, dtype=torch.uint8, device="cuda")


@planted("reserved cache", PEAK, WARM_UP)
def one_large_step_at_first():
    return lambda i: torch.empty((4 if i else 1024) * MIB, dtype=torch.uint8, device="cuda")


@planted(OUTSIDE)
def memory_that_is_not_pytorchs():
    cuda = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
    kept = []

    def step():
        kept.append(ctypes.c_void_p())
        if cuda.cudaMalloc(ctypes.byref(kept[-1]), ctypes.c_size_t(64 * MIB)):
            raise RuntimeError("cudaMalloc failed")

    return step


@planted(OUTSIDE, HEALTHY, WARM_UP)  # cuFFT decides how much a plan takes
def plans_of_ever_new_lengths():
    torch.backends.cuda.cufft_plan_cache.clear()
    return lambda i: torch.fft.rfft(torch.zeros(2**22 + 2 * i + 1, device="cuda"))


OTHER_PROCESS = """
import sys, torch
kept = []
for _ in sys.stdin:
    kept.append(torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda"))
    print(len(kept), flush=True)
"""


@planted(OUTSIDE)  # whose memory it is, the GPU does not tell
def another_process_that_takes_ever_more():
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def step():
        other.stdin.write("\n")
        other.stdin.flush()
        other.stdout.readline()

    return step


@planted(TENSORS, words=("last_frames", "pins"))
def small_view_of_a_large_block():
    last_frames = []

    def step():
        spectrogram = torch.zeros(1000, 1024, device="cuda")
        last_frames.append(spectrogram[-1])

    return step
