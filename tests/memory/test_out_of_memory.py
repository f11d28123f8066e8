"""One judge: what is an out-of-memory and what only sounds like one."""

import ast
import errno
import re
from pathlib import Path

import pytest
import torch

import tfswa_lab
from tfswa_lab.inference.separate import separate_batches
from tfswa_lab.memory.leaks import diagnose
from tfswa_lab.memory.out_of_memory import is_out_of_memory
from tfswa_lab.memory.predict.allocator import CachingAllocator, OutOfMemory

PACKAGE = Path(tfswa_lab.__file__).parent


def simulated() -> OutOfMemory:
    with pytest.raises(OutOfMemory) as raised:
        CachingAllocator(limit=2**21).malloc(2**30)
    return raised.value


def chained(cause: BaseException) -> RuntimeError:
    error = RuntimeError("the block failed")
    error.__cause__ = cause
    return error


def in_a_circle() -> RuntimeError:
    error = RuntimeError("this is its own cause")
    error.__cause__ = error
    return error


CPU = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: "
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"),  # of torch before 2.5
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be …"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("HIP error: out of memory"),
    RuntimeError("XPU out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"
    ),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB, other allocations: 1 MB)"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"),
    RuntimeError(CPU + "can't allocate memory: you tried to allocate 9 bytes."),
    RuntimeError(CPU + "not enough memory: you tried to allocate 9 bytes."),
    RuntimeError("unable to mmap 9 bytes from file <weights>: Cannot allocate memory (12)"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    simulated(),
    chained(MemoryError()),
    chained(chained(RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"))),
]
OTHERS = [
    RuntimeError("NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("DataLoader worker (pid 9) is killed by signal: Killed."),
    RuntimeError("DataLoader worker (pid 9) exited unexpectedly; the host may be out of memory"),
    RuntimeError("DataLoader worker (pid 9) … Bus error. … workers are out of shared memory."),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ValueError("out of memory"),
    OSError(errno.ENOSPC, "No space left on device"),
    KeyboardInterrupt(),
    chained(ValueError("no number")),
    in_a_circle(),
]


def named(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:40]}"


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=named)
def test_memory_ran_out(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=named)
def test_something_else_is_wrong(error):
    assert not is_out_of_memory(error)


class Narrow(torch.nn.Module):
    """Takes one example at a time."""

    def __init__(self, error: BaseException):
        super().__init__()
        self.error = error

    def forward(self, batch):
        if len(batch) > 1:
            raise self.error
        return batch[:, None]


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, *OTHERS], ids=named)
def test_separating_and_diagnosing_ask_the_same_judge(error):
    segments = [torch.zeros(2, 8) for _ in range(4)]

    def step():
        raise error

    if is_out_of_memory(error):
        assert len(list(separate_batches(Narrow(error), segments, 4))) == 4
        assert "ended with" in str(diagnose(step))
    else:
        with pytest.raises(type(error)):
            list(separate_batches(Narrow(error), segments, 4))
        with pytest.raises(type(error)):
            diagnose(step)


READS = {"memory_info", "memory_allocated", "memory_reserved", "memory_stats", "mem_get_info"}
READS |= {"max_memory_allocated", "max_memory_reserved", "reset_peak_memory_stats", "ru_maxrss"}
READS |= {"virtual_memory"}
JUDGES = re.compile(r"ALLOC_FAILED|can't allocate memory|not enough memory")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_no_other_file_reads_memory_or_judges_errors(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    texts = [node.value for node in nodes if isinstance(node, ast.Constant)]
    assert path.name == "gauges.py" or not attributes & READS
    assert path.name == "out_of_memory.py" or not any(JUDGES.search(str(each)) for each in texts)
