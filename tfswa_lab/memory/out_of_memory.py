"""Decide whether an error means that memory ran out, and try again with less: one rule of each.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import errno
import gc
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from types import CellType, FunctionType
from typing import Any, TypeVar

import torch

from tfswa_lab.memory import gauges

log = logging.getLogger(__name__)
T = TypeVar("T")
OnRetreat = Callable[[int, BaseException], None]  # gets the smaller size and the error

# An allocator says it, by its own name or in its own words: the words "out of memory" can stand in
# any error. XPU and MPS also have names of their own: out of resources, and a buffer that is larger
# than the device allows. The last lines are of the CPU, Windows, onnxruntime and our simulation.
_NO_MEMORY = re.compile(
    r"(^|[:\]] )(CUDA|HIP|XPU|MPS|NPU|MUSA|Triton Error|Error)"
    r"(\W+(CUDA|HIP|backend|driver|runtime|error|failure|\d+))*\W+out of memory\b"
    r"|\bAllocation is out of device memory|\binvalid buffer size: \d"
    r"|ErrorOutOfMemory\b|ErrorMemoryAllocation\b|(?-i:OUT_OF_((DEVICE|HOST)_)?MEMORY)"
    r"|(UR_RESULT|PI)_ERROR_OUT_OF_RESOURCES"
    r"|(?-i:_ALLOC(ATION)?_FAILED)|StatusAllocFailed|status_(memory_error|alloc_failed)"
    r"|\b(can't|cannot|could not|failed to) allocate memory"
    r"|Allocator: not enough memory|\bnot enough memory to allocate|\bbad[_ ]alloc"
    r"|paging file is too small|available memory of \d+ is smaller than requested"
    r"|^out of memory: .* requested, which needs a segment",
    re.IGNORECASE | re.MULTILINE,
)
# Libraries beside torch's allocator, and its own assertions, fail like this where they get no
# memory, and also for other reasons: PyTorch issues 119420, 81620.
_PERHAPS_NO_MEMORY = re.compile(
    r"\b(cu(fft|blas(lt)?|dnn|solver|sparse)|hip(fft|blas(lt)?)|roc(fft|blas)|miopen)_?(status)?_?"
    r"(internal_?error|not_?supported|not_?initialized|(setup|exec(ution)?)_?failed|insufficient_?resources)"
    r"|unable to find (a valid cuDNN algorithm|an engine to execute)"
    r"|INTERNAL ASSERT FAILED at \S*CachingAllocator",
    re.IGNORECASE,
)
LOW = 0.1  # of the GPU is free: then such a failure counts
# These can quote the words above, but a smaller batch does not help: the process group, the CUDA
# context or the worker is lost. "To enable device-side assertions" is a hint in every CUDA error.
_BROKEN = re.compile(
    r"(?-i:NCCL|RCCL|\bnccl)|device-side assert triggered|illegal (memory access|address)"
    r"|worker.*\b(killed|exited|died|terminated)\b",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"(?<!\w)'[^'\n]*\.\w+'|<[^<>\n]*\.\w+>")  # names of files


# What counts -------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException, free_fraction: float | None = None) -> bool:
    """Whether an error, or one of its causes, says that memory ran out.

    The memory may be a GPU's (CUDA, ROCm, XPU, MPS), or the host's; the error may come from a
    library such as cuFFT. A failure of such a library that names no allocation counts only where
    less than a tenth of the GPU is free. An NCCL error, a device-side assert and a worker that died
    do not count, even if their text mentions memory.

    Args:
        free_fraction: share of the GPU that was free when the error came, from 0 to 1; None reads
            it from the current CUDA device, if the program uses one.

    >>> is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"))
    True
    >>> is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    False
    >>> is_out_of_memory(RuntimeError("cuFFT error: CUFFT_INTERNAL_ERROR"), free_fraction=0.6)
    False
    """
    errors = list(_linked(error, "__cause__"))
    if any(map(_is_broken, errors)):
        return False
    return any(map(_says_so, errors)) or (
        any(_PERHAPS_NO_MEMORY.search(_text_that_counts(each)) for each in errors)
        and (_free_fraction() if free_fraction is None else free_fraction) < LOW
    )


def _linked(error: BaseException, *links: str) -> Iterator[BaseException]:
    """The error and all that its attributes `links` lead to, each once."""
    seen, ahead = set(), [error]
    while ahead:
        error = ahead.pop()
        if not isinstance(error, BaseException) or id(error) in seen:
            continue
        seen.add(id(error))
        yield error
        for linked in (getattr(error, link, None) for link in links):
            ahead += linked if isinstance(linked, tuple) else [linked]


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


def _free_fraction() -> float:
    """Share of the current CUDA device that is free; 1 where there is none, or it is broken."""
    if not torch.cuda.is_initialized():
        return 1.0
    try:
        memory = gauges.device_memory()
    except RuntimeError:  # after an illegal access, every call fails
        return 1.0
    return memory.free / memory.total


# Try again with less -----------------------------------------------------------------------------


def attempt(work: Callable[[], T]) -> tuple[T, None] | tuple[None, BaseException]:
    """What `work()` returns, or the error if memory ran out; other errors pass.

    While an error is handled, its traceback keeps all that the failed functions had. So the error
    is handed back after its handler: the frames of its traceback, and of the errors it is linked
    to, hold nothing any more, also where the error is kept, and GPUs have their cached memory back.

    Returns:
        The result and None, or None and the error, which can be raised again.

    Notebook: 09_running_lean

    >>> attempt(lambda: 3)
    (3, None)
    """
    try:
        return work(), None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failed = error
    try:
        free_what_it_holds(failed)
        return None, failed
    finally:
        del failed, work  # this frame is in the traceback, too


def free_what_it_holds(failed: BaseException) -> None:
    """Empty the frames that an error and those linked to it passed through, and torch's cache.

    Call it where these functions have ended: their arguments and variables are gone afterwards,
    also where somebody keeps the error.

    Notebook: 10_staged_pipelines
    """
    for error in _linked(failed, "__cause__", "__context__", "exceptions"):
        traceback.clear_frames(error.__traceback__)
        _empty_closures(error)
    gc.collect()  # cycles
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()  # cuFFT and cuBLAS allocate beside it


def _empty_closures(error: BaseException) -> None:
    """Empty what inner functions have captured, where only the traceback still has the function.

    A cleared frame keeps its function, and so the variables that a lambda, a generator expression
    or one of torch's own wrappers has taken from the function around it.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    held = [each for frame in frames for each in gc.get_referents(frame)]
    functions = [each for each in held if isinstance(each, FunctionType) and each.__closure__]
    del held
    for function in functions:
        by_frames = 2 * sum(each is function for each in functions)  # and by our list
        by_itself = sum(_content(cell) is function for cell in function.__closure__)
        if sys.getrefcount(function) <= by_frames + by_itself + 2:  # the variable, the argument
            for cell in function.__closure__:
                if sys.getrefcount(cell) <= 3 or _content(cell) is function:
                    cell.cell_contents = None


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def retreat(
    work: Callable[[int], T],
    size: int,
    floor: int = 1,
    on_retreat: OnRetreat | None = None,
    repeats: int = 0,
) -> tuple[T, int]:
    """`work(size)`; where memory runs out, with half of the size, and so on down to `floor`.

    Each retreat is logged.

    Args:
        work: is called with a size, and again with a smaller one after it ran out of memory.
        size: the first to try.
        floor: the smallest to try.
        on_retreat: gets each size that is tried next, and the error that made it so.
        repeats: how often to try `floor` again, where it is known to fit.

    Returns:
        The result and the size that worked.

    Raises:
        torch.OutOfMemoryError, or another out-of-memory error: the smallest size ran out of memory,
            too. It is the last try's, and its note names all sizes that were tried.

    Notebook: 09_running_lean

    >>> def work(size):
    ...     if size > 3:
    ...         raise MemoryError
    ...     return f"{size} fit"
    >>> retreat(work, 7)
    ('3 fit', 3)
    """
    tried = []
    while True:
        result, error = attempt(partial(work, size))
        if error is None:
            return result, size
        try:
            tried.append(size)
            if size <= floor and tried.count(size) > repeats:
                error.add_note(f"memory ran out with each of these sizes: {tried}; floor={floor}")
                raise error
            size = min(size, max(floor, size // 2))
            why = (str(error) or type(error).__name__).splitlines()[0]
            log.warning("memory ran out; trying again with at most %d at once: %s", size, why)
            if on_retreat:
                on_retreat(size, error)
        finally:
            del error  # it may be raised: its traceback would refer to itself
