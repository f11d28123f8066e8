"""Which lines of Python are being executed, without those of libraries.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType

import einops
import torch

from tfswa_lab.memory.tracing.blocks import Frame

MOST = 16  # lines of a stack that are kept
ROOM = Path(__file__).parents[1]
# Lines in these say nothing about the model.
HIDDEN = (
    *(str(Path(library.__file__).parent) for library in (torch, einops)),
    *(str(ROOM / part) for part in ("tracing", "card", "diagnosis")),
    *(str(ROOM / f"{part}.py") for part in ("trace", "predict", "leaks")),
    "<frozen",
)


class CallSites:
    """Stacks as tuples of `Frame`; equal lines are one object.

    Notebook: 05_where_memory_goes
    """

    def __init__(self):
        self._hidden: dict[CodeType, bool] = {}
        self._frames: dict[tuple[CodeType, int], Frame] = {}

    def here(self) -> tuple[Frame, ...]:
        """The lines that led here, innermost first."""
        found, frame = [], sys._getframe(1)
        while frame is not None and len(found) < MOST:
            code = frame.f_code
            hidden = self._hidden.get(code)
            if hidden is None:
                hidden = self._hidden[code] = code.co_filename.startswith(HIDDEN)
            if not hidden:
                found.append(self._of(code, frame.f_lineno))
            frame = frame.f_back
        return tuple(found)

    def _of(self, code: CodeType, line: int) -> Frame:
        frame = self._frames.get((code, line))
        if frame is None:
            frame = Frame(code.co_filename, line, code.co_qualname)
            self._frames[code, line] = frame
        return frame
