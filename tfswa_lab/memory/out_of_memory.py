"""Does an error say that there is no memory left? The only place that knows.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

import torch

# CUDA, HIP, XPU and MPS write "out of memory"; drivers' codes have underscores. cuBLAS, cuDNN,
# cuFFT and their AMD twins end in ALLOC_FAILED or ALLOCATION_FAILED. The rest is the CPU's.
_NO_MEMORY = re.compile(
    r"\bout of memory\b|OUT_OF_((DEVICE|HOST)_)?MEMORY|ALLOC(ATION)?_FAILED|status_memory_error"
    r"|can't allocate memory|cannot allocate memory|not enough memory|failed to allocate memory"
    r"|std::bad_alloc",
    re.IGNORECASE,
)
# These can quote the words above, but fewer or shorter examples do not help: the process group, the
# CUDA context or the worker is lost.
_BROKEN = re.compile(
    r"NCCL|device-side assert|worker.*\b(killed|exited|died|terminated)\b", re.IGNORECASE
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that memory ran out.

    On a GPU (CUDA, ROCm, XPU, MPS), in one of its libraries, or on the host. Errors of NCCL,
    device-side asserts and workers that died are none, whatever they quote.

    >>> is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"))
    True
    >>> is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    False
    """
    return any(map(_says_so, _with_causes(error)))


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def _says_so(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError):
        return False
    words = str(error)
    return bool(_NO_MEMORY.search(words)) and not _BROKEN.search(words)
