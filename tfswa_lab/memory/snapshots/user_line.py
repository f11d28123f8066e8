"""The line of a stack that its reader wrote, rather than one of torch's own.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tfswa_lab.memory.tracing.blocks import Frame

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
