"""Which lines of Python are being executed, and which of them is the user's.

One rule for traces, snapshots and leaks, for the paths of this machine and of any other.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import CodeType
from typing import NamedTuple

import einops
import torch

MOST = 16  # lines of a stack that are kept


class Frame(NamedTuple):
    """A line of Python that was being executed."""

    filename: str
    line: int
    name: str  # of the function

    def __str__(self) -> str:
        return f"{self.filename}:{self.line} ({self.name})"


def user_frame(frames: Sequence[Frame]) -> Frame | None:
    """The innermost line outside of libraries, else the innermost outside of torch; None without.

    The networks of this package count as the user's: the lessons are about their lines.

    Args:
        frames: innermost first.

    >>> import copy
    >>> frames = [Frame(copy.__file__, 153, "deepcopy"), Frame("train.py", 9, "step")]
    >>> user_frame(frames).filename
    'train.py'
    """
    known = [frame for frame in frames if not is_torch(frame.filename)]
    own = (frame for frame in known if not is_library(frame.filename))
    return next(own, known[0] if known else None)


def via(frames: Sequence[Frame]) -> str:
    """The installed libraries between torch and the user's line, such as `via einops`; or empty.

    Args:
        frames: innermost first.

    >>> lib = "/venv/lib/python3.12/site-packages"
    >>> via([Frame(f"{lib}/einops/einops.py", 9, "einsum"), Frame("model.py", 39, "forward")])
    'via einops'
    """
    own = user_frame(frames)
    inner = frames[: frames.index(own)] if own else ()
    names = (found[1] for frame in inner if (found := _INSTALLED.search(frame.filename)))
    others = dict.fromkeys(name for name in names if name not in _OF_TORCH)
    return f"via {', '.join(reversed(others))}" if others else ""


def in_short(frame: Frame | None) -> str:
    """File, line and function. Notebook cells have generated file names: these become `cell`.

    >>> in_short(Frame("/home/me/train.py", 9, "step"))
    'train.py:9 (step)'
    """
    if frame is None:
        return "lines unknown"
    name = f" ({frame.name})" if frame.name else ""
    file = "cell" if "ipykernel" in frame.filename else Path(frame.filename).name
    return f"{file}:{frame.line}{name}"


# Where torch and einops lie here, wherever they were installed.
_TORCH_HERE = tuple(str(Path(library.__file__).parent) + os.sep for library in (torch, einops))
# Their paths on other machines, C++, generated code, and this package's memory tools.
_TORCH = re.compile(
    r"[/\\](site|dist)-packages[/\\](torch|torchaudio|functorch|einops)[/\\]"
    r"|[/\\]tfswa_lab[/\\]memory[/\\]"
    r"|\.(c|cc|cpp|cxx|cu|cuh|h|hh|hpp|hxx|inc|inl|tcc|i|pyx|pxd|rs|s|asm)$"
    r"|\.(o|obj|a|so|dll|pyd|dylib)(\.\d+)*$"  # object files and libraries
    r"|[/\\]c\+\+[/\\](?!.*\.py$)"  # headers of C++ have names without an ending
    r"|(^|[/\\])python[\d.]*$"
    r"|^(\?*|<frozen .*|<forward>|\[?<?(unknown|vdso)>?\]?)$",
    re.IGNORECASE,
)
# Paths of torch's source tree. If such a file exists on this machine, it is the user's.
_TORCH_SOURCES = re.compile(
    r"[/\\]torch[/\\](nn|autograd|optim|utils|cuda|amp|fx|jit|distributed|_\w+)([/\\]|\.py)"
)
_LIBRARIES_HERE = tuple(
    {sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")}
)
_LIBRARIES = re.compile(
    r"[/\\](site|dist)-packages[/\\]|[/\\]lib[/\\]python3[.\d]*[/\\]|^<string>$", re.IGNORECASE
)
_INSTALLED = re.compile(r"[/\\](?:site|dist)-packages[/\\]([^/\\]+?)(?:\.py)?(?:[/\\]|$)")
_OF_TORCH = ("torch", "torchaudio", "functorch", "triton")
_OWN_NETWORKS = re.compile(r"[/\\](site|dist)-packages[/\\]tfswa_lab[/\\]")


@cache
def is_torch(filename: str) -> bool:
    """Whether lines of a file say nothing about the model: torch's, C++, and the tracer's own."""
    if filename.startswith(_TORCH_HERE) or _TORCH.search(filename):
        return True
    # `Path.is_file` raises an error where a folder may not be read.
    return bool(_TORCH_SOURCES.search(filename)) and not os.path.isfile(filename)  # noqa: PTH113


@cache
def is_library(filename: str) -> bool:
    """Whether a file is of the standard library or was installed; our networks are the user's."""
    if _OWN_NETWORKS.search(filename):
        return False
    return filename.startswith(_LIBRARIES_HERE) or bool(_LIBRARIES.search(filename))


class CallSites:
    """Stacks as tuples of `Frame`; equal lines are one object."""

    def __init__(self):
        self._frames: dict[tuple[CodeType, int], Frame] = {}

    def here(self) -> tuple[Frame, ...]:
        """The lines that led here, innermost first, without torch's."""
        found, frame = [], sys._getframe(1)
        while frame is not None and len(found) < MOST:
            code = frame.f_code
            if not is_torch(code.co_filename):
                found.append(self._of(code, frame.f_lineno))
            frame = frame.f_back
        return tuple(found)

    def _of(self, code: CodeType, line: int) -> Frame:
        frame = self._frames.get((code, line))
        if frame is None:
            frame = Frame(code.co_filename, line, code.co_qualname)
            self._frames[code, line] = frame
        return frame
