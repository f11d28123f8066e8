"""Which line of a stack is the user's: the innermost one that is in no library.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

from tfswa_lab.memory.tracing.blocks import Frame
from tfswa_lab.memory.tracing.call_sites import HIDDEN

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
