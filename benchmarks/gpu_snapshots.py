"""Two real recordings of CUDA's allocator: a training step, and an out-of-memory error.

    python benchmarks/gpu_snapshots.py    into the folder TFSWA_LAB_OUT, started by gpu.py

They are small enough to be kept as fixtures for the tests of `tfswa_lab.memory.snapshot`.
"""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from events import attempt

from tfswa_lab.memory import gauges, snapshot
from tfswa_lab.memory.sizes import MIB
from tfswa_lab.models.tf_locoformer import SIZES, TFLocoformer

SPARE = 64 * MIB  # bytes that the failing program may take
ENTRIES = (4000, 1000, 250)  # of the history: as many as make no larger file than
LARGEST = 300_000  # bytes, compressed


def compressed(path: Path) -> bytes:
    """The snapshot as it is kept."""
    return gzip.compress(path.read_bytes(), 9)


def keep(name: str, record: Callable[[Path, int], dict]) -> dict:
    """Record with fewer and fewer entries until the file is small enough; say what was recorded."""
    with tempfile.TemporaryDirectory() as folder:
        for entries in ENTRIES:
            path = Path(folder) / f"{entries}.pickle"
            facts = record(path, entries)
            if len(kept := compressed(path)) <= LARGEST:
                break
    (Path(os.environ.get("TFSWA_LAB_OUT", ".")) / name).write_bytes(kept)
    return {"bytes": len(kept), "entries": entries, **facts}


def training_step(path: Path, entries: int) -> dict:
    """Two steps of a tiny network."""
    torch.manual_seed(0)
    model = TFLocoformer(4, 16, **SIZES["tiny"]).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(1, 4, 16, 33, device="cuda")
    with snapshot.record(max_entries=entries):
        for _ in range(2):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        snapshot.dump(path)
        return {"allocated": gauges.allocated(), "reserved": gauges.reserved()}


def out_of_memory(path: Path, entries: int) -> dict:
    """Spectrograms are kept until there is no room for another."""
    torch.cuda.empty_cache()
    room = gauges.reserved() + SPARE
    torch.cuda.set_per_process_memory_fraction(room / gauges.device_memory().total)
    kept, message = [], "there was room for all"
    with snapshot.record(max_entries=entries), snapshot.dump_on_oom(path):
        try:
            for _ in range(40):
                kept.append(torch.zeros(2 * 1025 * 431, device="cuda"))
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as error:
            message = str(error).splitlines()[0]
    torch.cuda.set_per_process_memory_fraction(1.0)
    return {"message": message, "kept": len(kept), "notes": snapshot.read(path).notes}


def main() -> None:
    """Record both."""
    for name, record in {"step": training_step, "oom": out_of_memory}.items():
        attempt("snapshot", partial(keep, f"{name}.pickle.gz", record), recording=name)


if __name__ == "__main__":
    main()
