"""Which lines of Python are being executed, without those of libraries.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import CodeType

import einops
import torch

from tfswa_lab.memory.trace.timeline import Frame

MOST = 16  # lines of a stack that are kept
VERBS = Path(__file__).parents[1]
# Lines in these say nothing about the model.
HIDDEN = (
    *(str(Path(library.__file__).parent) for library in (torch, einops)),
    *(str(VERBS / verb) for verb in ("trace", "predict", "leaks")),
    "<frozen",
)


class CallSites:
    """Stacks as tuples of `Frame`; equal lines are one object."""

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


LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


def line_of(frames: Sequence[Frame]) -> Frame | None:
    """The innermost line outside of libraries, else outside of torch; None without either.

    Args:
        frames: innermost first.

    Notebook: 06_leak_diagnosis

    >>> import copy
    >>> frames = [Frame(copy.__file__, 153, "deepcopy"), Frame("train.py", 9, "step")]
    >>> line_of(frames).filename
    'train.py'
    """
    known = [frame for frame in frames if not frame.filename.startswith(HIDDEN)]
    own = (frame for frame in known if not frame.filename.startswith(LIBRARIES))
    return next(own, known[0] if known else None)


def in_short(line: Frame | None) -> str:
    """File, line and function; a notebook's cell has a number for a name that nobody knows.

    Notebook: 06_leak_diagnosis

    >>> in_short(Frame("/home/me/train.py", 9, "step"))
    'train.py:9 (step)'
    """
    if line is None:
        return "lines unknown"
    name = f" ({line.name})" if line.name else ""
    file = "cell" if "ipykernel" in line.filename else Path(line.filename).name
    return f"{file}:{line.line}{name}"


NOWHERE = "(no stack was recorded)"
NOBODY = "(no line outside of torch: its own threads, such as the backward pass)"

_NOT_OURS = re.compile(
    r"[/\\](site|dist)-packages[/\\](torch|torchaudio|functorch)[/\\]"
    r"|[/\\]torch[/\\](nn|autograd|optim|utils|cuda|amp|fx|jit|distributed|_\w+)([/\\]|\.py)"
    r"|\.(c|cc|cpp|cxx|cu|cuh|h|hpp|pyx|S)$"
    r"|^(\?*|<frozen .*>|<string>)$"
)


def user_line(stack: Sequence[Frame]) -> str:
    """The innermost line of a stack that is neither torch's nor C++.

    Notebook: 06_leak_diagnosis

    >>> torch = Frame("/lib/python3.12/site-packages/torch/nn/functional.py", 9, "linear")
    >>> user_line([torch, Frame("model.py", 12, "forward"), Frame("train.py", 3, "<module>")])
    'model.py:12 (forward)'
    """
    for frame in stack:
        if not _NOT_OURS.search(frame.filename):
            return str(frame)
    return NOBODY if stack else NOWHERE
