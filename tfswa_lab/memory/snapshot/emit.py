"""A trace as a CUDA memory snapshot: for pytorch.org/memory_viz, and all that reads such files.

The allocator's simulator decides on segments and addresses; lines, categories and modules are those
of the trace. A trace has no clock: times are the numbers of its events.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import pickle
from pathlib import Path

from tfswa_lab.durable import parts_of
from tfswa_lab.memory.predict.allocator import CachingAllocator, OutOfMemory, Piece, by_event
from tfswa_lab.memory.trace.timeline import Block, Frame, Timeline

SEPARATOR = " | "  # of category and module in `user_metadata`


def write_snapshot(path: str | Path, timeline: Timeline, limit: int | None = None) -> Path:
    """Write `as_snapshot` as a pickle, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    snapshot = as_snapshot(timeline, limit)
    with parts_of([path]) as (part,), part.open("wb") as file:
        pickle.dump(snapshot, file, protocol=4)
    return path


def as_snapshot(timeline: Timeline, limit: int | None = None) -> dict:
    """What `torch.cuda.memory._snapshot()` would have held at the end of a trace.

    Blocks that were there when the trace began are allocated by the first entries.

    Args:
        timeline: of any device.
        limit: bytes of segments that the device has. A trace that does not fit ends with the `oom`
            entry: an out-of-memory to look at, without a GPU.

    Returns:
        Segments with their blocks and one device's trace, in the schema of torch 2.13. An entry's
        `user_metadata` is `category | module`, its `category` what the viewer colours by.
    """
    story = _Story(limit)
    births, deaths = by_event(timeline)
    for story.time in range(timeline.events + 1):
        for block in deaths[story.time]:
            story.free(block)
        try:
            for block in births[story.time]:
                story.malloc(block)
        except OutOfMemory:
            break
    return {
        "segments": [story.segment(pieces) for pieces in story.allocator.segments()],
        "device_traces": [story.entries],
        "allocator_settings": {"expandable_segments": False, "max_split_size": -1},
        "external_annotations": [
            {"name": f"step {number}", "stage": "START", "device": 0, "time_us": began}
            for number, began in enumerate(timeline.steps)
        ],
    }


class _Story:
    """The allocator at work, and the entries of its history."""

    def __init__(self, limit: int | None):
        self.allocator = CachingAllocator(limit, watch=self.note)
        self.entries: list[dict] = []
        self.time = 0
        self._block: Block | None = None  # that is being served
        self._addresses: dict[Block, int] = {}
        self._served: dict[int, Block] = {}  # by address
        self._grown: dict[int, Block] = {}  # by the address of the segment that it needed
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
        """One entry, as the allocator's history words it."""
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

    def segment(self, pieces: list[Piece]) -> dict:
        """A segment with its blocks, as they are now."""
        first, used = pieces[0], [piece for piece in pieces if piece.requested]
        allocated = sum(piece.size for piece in used)
        return {
            "device": 0,
            "address": first.address,
            "total_size": sum(piece.size for piece in pieces),
            "allocated_size": allocated,
            "active_size": allocated,
            "requested_size": sum(piece.requested for piece in used),
            "stream": 0,
            "segment_type": "small" if first.small else "large",
            "segment_pool_id": (0, 0),
            "is_expandable": False,
            "frames": self._frames(self._grown[first.address].frames),
            "blocks": [self._piece(piece) for piece in pieces],
        }

    def _piece(self, piece: Piece) -> dict:
        frames = self._served[piece.address].frames if piece.requested else ()
        return {
            "address": piece.address,
            "size": piece.size,
            "requested_size": piece.requested,
            "state": "active_allocated" if piece.requested else "inactive",
            "frames": self._frames(frames),
        }

    def _frames(self, frames: tuple[Frame, ...]) -> list[dict]:
        """One list for equal stacks and one dictionary for equal lines: pickle keeps them once."""
        if frames not in self._stacks:
            self._stacks[frames] = [
                self._lines.setdefault(frame, frame._asdict()) for frame in frames
            ]
        return self._stacks[frames]
