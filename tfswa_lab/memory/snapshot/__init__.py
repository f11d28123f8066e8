"""Snapshots of CUDA's allocator: recorded, written, read safely and explained.

Notebook: 06_leak_diagnosis
"""

from tfswa_lab.memory.snapshot.emit import as_snapshot, write_snapshot
from tfswa_lab.memory.snapshot.pickles import SnapshotError
from tfswa_lab.memory.snapshot.recording import dump, dump_on_oom, record
from tfswa_lab.memory.snapshot.snapshot import Snapshot, diff, read
from tfswa_lab.memory.snapshot.summary import Difference, Summary, difference

__all__ = [
    "Difference",
    "Snapshot",
    "SnapshotError",
    "Summary",
    "as_snapshot",
    "diff",
    "difference",
    "dump",
    "dump_on_oom",
    "read",
    "record",
    "write_snapshot",
]
