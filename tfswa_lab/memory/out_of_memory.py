"""Decide whether an error means that memory ran out: one rule for the whole package.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

import torch

# CUDA, HIP, XPU, MPS and their drivers; cuBLAS, cuDNN, cuFFT and their AMD twins; the CPU and
# Windows; the arena of onnxruntime. XPU and MPS also have names of their own: out of resources, and
# a buffer that is larger than the device allows.
_NO_MEMORY = re.compile(
    r"\bout of memory\b(?!\.\w)|OutOfMemory\b|ErrorMemoryAllocation|OUT_OF_((DEVICE|HOST)_)?MEMORY"
    r"|(UR_RESULT|PI)_ERROR_OUT_OF_RESOURCES|\binvalid buffer size: \d"
    r"|ALLOC(ATION)?_FAILED|StatusAllocFailed|status_memory_error"
    r"|(can't|cannot|could not|failed to) allocate memory|not enough memory|\bbad[_ ]alloc"
    r"|paging file is too small|available memory of \d+ is smaller than requested",
    re.IGNORECASE,
)
# These can quote the words above, but a smaller batch does not help: the process group, the CUDA
# context or the worker is lost. "To enable device-side assertions" is a hint in every CUDA error.
_BROKEN = re.compile(
    r"(?-i:NCCL|RCCL|\bnccl)|device-side assert triggered"
    r"|worker.*\b(killed|exited|died|terminated)\b",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"(?<!\w)'[^'\n]*\.\w+'|<[^<>\n]*\.\w+>")  # names of files


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one of its causes, says that memory ran out.

    The memory may be a GPU's (CUDA, ROCm, XPU, MPS), or the host's; the error may come from a
    library such as cuFFT. An NCCL error, a device-side assert and a worker that died do not count,
    even if their text mentions memory.

    >>> is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"))
    True
    >>> is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    False
    """
    errors = list(_with_causes(error))
    return any(map(_says_so, errors)) and not any(map(_is_broken, errors))


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def _says_so(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return bool(_NO_MEMORY.search(_text_that_counts(error)))


def _is_broken(error: BaseException) -> bool:
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return not known and bool(_BROKEN.search(_text_that_counts(error)))


def _text_that_counts(error: BaseException) -> str:
    """The text of an error of torch, the system or onnxruntime, without names of files."""
    if isinstance(error, NotImplementedError | RecursionError):
        return ""
    if isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime"):
        return _QUOTED.sub("", str(error))
    if type(error) is OSError:  # not its subclasses, such as FileNotFoundError: they quote names
        return error.strerror or str(error)
    return ""
