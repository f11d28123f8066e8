"""A trace as a CUDA memory snapshot, for pytorch.org/memory_viz and other readers of such files.

The simulated allocator chooses segments and addresses; lines, categories and modules come from the
trace. A trace has no clock, so times are the numbers of its events.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

from pathlib import Path

from tfswa_lab.memory.predict.allocator import CachingAllocator, OutOfMemory, SegmentPart, by_event
from tfswa_lab.memory.snapshot.pickles import write_plain
from tfswa_lab.memory.trace.stacks import Frame
from tfswa_lab.memory.trace.timeline import Block, Timeline

SEPARATOR = " | "  # of category and module in `user_metadata`


def write_snapshot(path: str | Path, timeline: Timeline, limit: int | None = None) -> Path:
    """Write `as_snapshot` as a pickle; an error leaves no part of a file."""
    return write_plain(path, as_snapshot(timeline, limit))


def as_snapshot(timeline: Timeline, limit: int | None = None) -> dict:
    """What `torch.cuda.memory._snapshot()` would have returned at the end of a trace.

    The first entries allocate the blocks that are older than the trace.

    Args:
        timeline: of any device.
        limit: bytes that the device has for segments. A trace that does not fit ends with an `oom`
            entry: an out-of-memory error to study without a GPU.

    Returns:
        Segments with their blocks and one device's trace, in the schema of torch 2.13. An entry's
        `user_metadata` is `category | module`, its `category` what the viewer colours by.
    """
    recorded = _RecordedAllocator(limit)
    births, deaths = by_event(timeline)
    for recorded.time in range(timeline.events + 1):
        for block in deaths[recorded.time]:
            recorded.free(block)
        try:
            for block in births[recorded.time]:
                recorded.malloc(block)
        except OutOfMemory:
            break
    return {
        "segments": [recorded.segment(parts) for parts in recorded.allocator.segments()],
        "device_traces": [recorded.entries],
        "allocator_settings": {"expandable_segments": False, "max_split_size": -1},
        "external_annotations": [
            {"name": f"step {number}", "stage": "START", "device": 0, "time_us": began}
            for number, began in enumerate(timeline.steps)
        ],
    }


class _RecordedAllocator:
    """The allocator at work, and the history that it records."""

    def __init__(self, limit: int | None):
        self.allocator = CachingAllocator(limit, watch=self.note)
        self.entries: list[dict] = []
        self.time = 0
        self._block: Block | None = None  # being allocated or released
        self._addresses: dict[Block, int] = {}
        self._served: dict[int, Block] = {}  # by address
        self._grown: dict[int, Block] = {}  # by the address of the segment that was made for it
        self._stacks: dict[tuple[Frame, ...], list[dict]] = {}
        self._lines: dict[Frame, dict] = {}

    def malloc(self, block: Block) -> None:
        self._block = block
        address = self.allocator.malloc(block.size)
        self._addresses[block] = address
        self._served[address] = block

    def free(self, block: Block) -> None:
        self._block = block
        address = self._addresses.pop(block)
        self.allocator.free(address)
        del self._served[address]

    def note(self, action: str, address: int, size: int) -> None:
        """Record one action as an entry of a history."""
        entry = {
            "action": action,
            "device_free" if action == "oom" else "addr": address,
            "size": size,
            "stream": 0,
            "time_us": self.time,
            "pool_id": (0, 0),
            "frames": self._frames(self._block.frames),
        }
        if action == "alloc":
            about = (self._block.category, self._block.module)
            entry |= {"user_metadata": SEPARATOR.join(about), "category": self._block.category}
        elif action == "segment_alloc":
            self._grown[address] = self._block
        self.entries.append(entry)

    def segment(self, parts: list[SegmentPart]) -> dict:
        """A segment with its blocks in their present state."""
        first, used = parts[0], [part for part in parts if part.requested]
        allocated = sum(part.size for part in used)
        return {
            "device": 0,
            "address": first.address,
            "total_size": sum(part.size for part in parts),
            "allocated_size": allocated,
            "active_size": allocated,
            "requested_size": sum(part.requested for part in used),
            "stream": 0,
            "segment_type": "small" if first.small else "large",
            "segment_pool_id": (0, 0),
            "is_expandable": False,
            "frames": self._frames(self._grown[first.address].frames),
            "blocks": [self._part(part) for part in parts],
        }

    def _part(self, part: SegmentPart) -> dict:
        frames = self._served[part.address].frames if part.requested else ()
        return {
            "address": part.address,
            "size": part.size,
            "requested_size": part.requested,
            "state": "active_allocated" if part.requested else "inactive",
            "frames": self._frames(frames),
        }

    def _frames(self, frames: tuple[Frame, ...]) -> list[dict]:
        """Equal stacks share one list, equal lines one dictionary, so pickle stores them once."""
        if frames not in self._stacks:
            self._stacks[frames] = [
                self._lines.setdefault(frame, frame._asdict()) for frame in frames
            ]
        return self._stacks[frames]
