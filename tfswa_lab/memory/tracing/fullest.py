"""The fullest moment of a timeline, and who holds the memory then.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

from dataclasses import dataclass

from tfswa_lab.memory.sizes import in_words
from tfswa_lab.memory.tracing.blocks import Timeline, by_category, by_line, by_module, top


@dataclass(frozen=True)
class Fullest:
    """A moment of a timeline.

    Args:
        timeline: all blocks.
        event: the fullest moment.
        peak: bytes allocated then, with all that an allocator adds: a prediction's may be a little
            above the sum of its blocks, because large blocks are not split for less than 1 MiB.

    Notebook: 05_where_memory_goes
    """

    timeline: Timeline
    event: int
    peak: int

    def by_category(self) -> dict[str, int]:
        """Bytes at the peak, by what they are: activations, parameters, …"""
        return dict(self.timeline.held_by(self.event, by_category).most_common())

    def by_module(self, depth: int = 1, count: int = 10) -> dict[str, int]:
        """Bytes at the peak, by who made them.

        Args:
            depth: parts of the path of a module that count.
            count: rows; the others are added up.
        """
        return dict(top(self.timeline.held_by(self.event, by_module(depth)), count))

    def by_line(self, count: int = 10) -> dict[str, int]:
        """Bytes at the peak, by the line of Python that asked for them."""
        return dict(top(self.timeline.held_by(self.event, by_line), count))

    def table(self) -> str:
        """What is there at the peak, a category per line."""
        rows = self.by_category().items()
        return "\n".join(f"  {in_words(size):>12}  {name}" for name, size in rows)
