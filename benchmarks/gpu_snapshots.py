"""Two real recordings of CUDA's allocator: a training step, and a failure for want of memory.

    python benchmarks/gpu_snapshots.py    into the folder TFSWA_LAB_OUT, started by gpu.py

They are small enough to be kept as fixtures for the tests of `tfswa_lab.memory.snapshot`.
"""

from __future__ import annotations

import gzip
import os
import tempfile
from functools import partial
from pathlib import Path

import torch
from events import attempt

from tfswa_lab.memory import snapshot
from tfswa_lab.models.tf_locoformer import TINY, TFLocoformer

SPARE = 64 * 2**20  # bytes that the failing program may take
ENTRIES = 1500  # of the history: what keeps a file below 300 kB


def compressed(path: Path, name: str) -> dict:
    """The file in the folder for results, and its size."""
    out = Path(os.environ.get("TFSWA_LAB_OUT", ".")) / name
    out.write_bytes(gzip.compress(path.read_bytes(), 9))
    return {"bytes": out.stat().st_size}


def training_step(folder: Path) -> dict:
    """Two steps of a tiny network, whose history is whole."""
    torch.manual_seed(0)
    model = TFLocoformer(4, 16, **TINY).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(1, 4, 16, 33, device="cuda")
    with snapshot.record(max_entries=ENTRIES):
        for _ in range(2):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        path = snapshot.dump(folder / "step.pickle")
        facts = {
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
        }
    return facts | compressed(path, "step.pickle.gz")


def out_of_memory(folder: Path) -> dict:
    """Spectrograms are kept until there is no room for another."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + SPARE) / total)
    kept, message = [], "there was room for all"
    with (
        snapshot.record(max_entries=ENTRIES),
        snapshot.dump_on_oom(folder / "oom.pickle") as dumped,
    ):
        try:
            for _ in range(40):
                kept.append(torch.zeros(2 * 1025 * 431, device="cuda"))
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as error:
            message = str(error).splitlines()[0]
    report = snapshot.read(dumped.written[0])
    facts = {"message": message, "kept": len(kept), "notes": report.notes}
    return facts | compressed(dumped.written[0], "oom.pickle.gz")


def main() -> None:
    """Record both."""
    with tempfile.TemporaryDirectory() as folder:
        for make in (training_step, out_of_memory):
            attempt("snapshot", partial(make, Path(folder)), recording=make.__name__)


if __name__ == "__main__":
    main()
