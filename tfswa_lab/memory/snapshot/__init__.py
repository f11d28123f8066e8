"""Snapshots of CUDA's allocator: recorded, written, read safely and explained.

Notebook: 06_leak_diagnosis
"""

from tfswa_lab.memory.snapshot.emit import as_snapshot, write_snapshot
from tfswa_lab.memory.snapshot.pickles import SnapshotError
from tfswa_lab.memory.snapshot.recording import dump, dump_on_oom, record
from tfswa_lab.memory.snapshot.snapshot import Snapshot, diff, read

__all__ = [
    "Snapshot",
    "SnapshotError",
    "as_snapshot",
    "diff",
    "dump",
    "dump_on_oom",
    "read",
    "record",
    "write_snapshot",
]
