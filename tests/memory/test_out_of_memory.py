"""One judge: what is an out-of-memory and what only sounds like one."""

import ast
import contextlib
import errno
import gc
import re
import traceback
import weakref
from pathlib import Path

import pytest
import torch

import tfswa_lab
from tfswa_lab.inference.separate import separate_batches
from tfswa_lab.memory import gauges
from tfswa_lab.memory.leaks import diagnose
from tfswa_lab.memory.out_of_memory import attempt, is_out_of_memory, retreat
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


def lost_process_group(cause: BaseException) -> RuntimeError:
    error = RuntimeError("NCCL communicator was aborted on rank 0")
    error.__cause__ = cause
    return error


def in_a_circle() -> RuntimeError:
    error = RuntimeError("this is its own cause")
    error.__cause__ = error
    return error


def of_onnxruntime(words: str) -> Exception:
    """Its errors derive from `Exception`, as pybind11 registers them."""
    module = "onnxruntime.capi.onnxruntime_pybind11_state"
    return type("RuntimeException", (Exception,), {"__module__": module})(
        f"[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running "
        f"Conv node. Name:'Conv_3' Status Message: /core/framework/bfc_arena.cc:376 {words}"
    )


HINTS = """
{0} kernel errors might be asynchronously reported at some other API call, so the stacktrace below \
might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_{0}_DSA` to enable device-side assertions.
"""
CPU = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: "
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"),  # of torch before 2.5
    torch.AcceleratorError("CUDA error: out of memory" + HINTS.format("CUDA")),
    torch.AcceleratorError("HIP error: out of memory" + HINTS.format("HIP")),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("[2] Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError("hipErrorOutOfMemory"),
    RuntimeError("cudaErrorMemoryAllocation"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("HIP error: out of memory"),
    RuntimeError("XPU out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"
    ),
    RuntimeError("level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)"),
    RuntimeError("Invalid buffer size: 19.45 GB"),  # on MPS
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
    RuntimeError("bad allocation"),  # on Windows
    RuntimeError("miopenStatusAllocFailed"),
    RuntimeError("hipErrorOutOfMemory: out of memory"),
    RuntimeError("cuda runtime error (2) : out of memory at THCStorage.cu:58"),  # of old torch
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("Allocation is out of device memory on current platform."),  # on XPU
    RuntimeError(
        "Caught RuntimeError in replica 0 on device 0.\nRuntimeError: CUDA out of memory."
    ),
    RuntimeError("Intel oneMKL DFTI ERROR: Not enough memory to allocate"),
    RuntimeError("Could not allocate memory for Tensor SizesAndStrides!"),
    RuntimeError(
        "Caught RuntimeError in DataLoader worker process 0.\n… " + CPU + "not enough memory"
    ),
    of_onnxruntime("Failed to allocate memory for requested buffer of size 643840"),
    of_onnxruntime("CudaCall [with ERRTYPE = cudaError] CUDA failure 2: out of memory ; GPU=0 ;"),
    of_onnxruntime("Available memory of 0 is smaller than requested bytes of 2048"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    OSError("Memory mapping file failed: Cannot allocate memory"),
    OSError(errno.EINVAL, "The paging file is too small for this operation to complete"),
    simulated(),
    chained(MemoryError()),
    chained(chained(RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"))),
]
OTHERS = [
    RuntimeError("NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'"),
    RuntimeError("CUDA error: device-side assert triggered"),
    torch.AcceleratorError("CUDA error: device-side assert triggered" + HINTS.format("CUDA")),
    torch.AcceleratorError("CUDA error: an illegal memory access" + HINTS.format("CUDA")),
    RuntimeError("ProcessGroupNCCL.cpp:1331, unhandled cuda error. Cuda failure 'out of memory'"),
    RuntimeError("A worker process was unexpectedly terminated … by an excessive memory usage"),
    RuntimeError("out of resource: shared memory, Required: 114688, Hardware limit: 101376"),
    RuntimeError("unable to write to file </torch_9_8>: No space left on device (28)"),
    RuntimeError("Storage size calculation overflowed with sizes=[1099511627776, 1099511627776]"),
    of_onnxruntime("Expected shape from model of {2} does not match actual shape of {3}"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("DataLoader worker (pid 9) is killed by signal: Killed."),
    RuntimeError("DataLoader worker (pid 9) exited unexpectedly; the host may be out of memory"),
    RuntimeError("DataLoader worker (pid 9) … Bus error. … workers are out of shared memory."),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (out of memory of the teacher)"),
    RuntimeError("the phrase out of memory is not in the vocabulary"),
    RuntimeError("Expected all tensors to be on cuda, or the batch is out of memory"),
    RuntimeError("state_dict has no key memory.out_of_memory.weight"),
    RuntimeError("not enough memory cells for the sequence"),
    RuntimeError("out of memory"),  # says who?
    KeyError("CUDA out of memory"),
    AssertionError("CUDA out of memory"),
    ValueError("out of memory"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.ENOSPC, "No space left on device", "Out of memory.wav"),
    FileNotFoundError("no such audio file: Out of memory.wav"),
    RuntimeError("Error opening 'out of memory.wav': System error."),  # of soundfile
    RuntimeError("unable to open file <out of memory.bin>: No such file or directory (2)"),
    RuntimeError("PytorchStreamReader failed locating file out of memory.pt"),
    RuntimeError("RCCL error: unhandled hip error. Last error: 'out of memory'"),
    RuntimeError("ncclUnhandledCudaError: Call to CUDA function failed: 'out of memory'"),
    NotImplementedError("no kernel for the out of memory op"),
    RecursionError("out of memory"),
    KeyboardInterrupt(),
    lost_process_group(torch.OutOfMemoryError("CUDA out of memory.")),
    chained(ValueError("no number")),
    in_a_circle(),
]


IN_DOUBT = [  # these come with little memory, and for other reasons
    RuntimeError("cuFFT error: CUFFT_INTERNAL_ERROR"),
    RuntimeError("cuFFT error: CUFFT_EXEC_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate`"),
    RuntimeError("CUDA error: CUSPARSE_STATUS_INSUFFICIENT_RESOURCES when calling `cusparseSpMM`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasSgemm( handle, …`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul( ltHandle`"),
    RuntimeError(
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in …"
    ),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("hipFFT error: HIPFFT_INTERNAL_ERROR"),
    RuntimeError("miopenStatusInternalError"),
    RuntimeError("rocblas_status_internal_error"),
    RuntimeError("it != c.end() INTERNAL ASSERT FAILED at /c10/cuda/CUDACachingAllocator.cpp:413"),
]


def named(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:40]}"


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=named)
def test_memory_ran_out(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=named)
def test_something_else_is_wrong(error):
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("error", IN_DOUBT, ids=named)
def test_in_doubt_the_free_memory_decides(error):
    assert is_out_of_memory(error, 0.09)
    assert is_out_of_memory(chained(error), 0.0)
    assert not is_out_of_memory(error, 0.10)
    assert not is_out_of_memory(error), "there is no GPU, or none is in use"


@pytest.mark.parametrize("error", OTHERS, ids=named)
def test_what_is_something_else_is_so_on_a_full_gpu(error):
    assert not is_out_of_memory(error, 0.0)


def test_an_illegal_access_is_none_whatever_came_of_it():
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    failed = RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")
    failed.__cause__ = lost
    assert not is_out_of_memory(failed, 0.01)


@pytest.mark.parametrize(
    ("in_use", "free", "expected"),
    [(True, 5, True), (True, 50, False), (True, None, False), (False, 5, False)],
    ids=["full", "half full", "broken", "not in use"],
)
def test_the_free_memory_is_that_of_the_gpu_in_use(monkeypatch, in_use, free, expected):
    def read():
        assert in_use, "reading would start CUDA"
        if free is None:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return gauges.DeviceMemory(free, 100)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    monkeypatch.setattr(gauges, "device_memory", read)
    assert is_out_of_memory(IN_DOUBT[0]) == expected
    assert is_out_of_memory(OUT_OF_MEMORY[0]), "no doubt, nothing to read"


class Narrow(torch.nn.Module):
    """Takes one example at a time."""

    def __init__(self, error: BaseException):
        super().__init__()
        self.error = error

    def forward(self, batch):
        if len(batch) > 1:
            raise self.error
        return batch[:, None]


@pytest.fixture(scope="module")
def old_objects_are_frozen():
    """A diagnosis looks at all objects but these, so it takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("old_objects_are_frozen")
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


# Trying again ------------------------------------------------------------------------------------


def failing(kept: list, how: str) -> None:
    """Runs out of memory with a tensor in its frame, and in those of errors on the way."""
    tensor, cycle = torch.ones(1000), []
    cycle.append((cycle, tensor))
    kept.append(weakref.ref(tensor))
    if how == "plain":
        raise torch.OutOfMemoryError("CUDA out of memory")
    try:
        failing(kept, "plain")
    except torch.OutOfMemoryError as error:
        if how == "cause":
            raise RuntimeError("the block failed") from error
        if how == "group":
            raise torch.OutOfMemoryError("CUDA out of memory") from ExceptionGroup("", [error])
        raise torch.OutOfMemoryError("CUDA out of memory again")  # noqa: B904 (its context)


@pytest.fixture
def without_gc():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_gc", "old_objects_are_frozen")
@pytest.mark.parametrize("how", ["plain", "cause", "context", "group"])
def test_after_an_attempt_nothing_of_it_is_alive_though_the_error_is_kept(how):
    tensors = []
    result, error = attempt(lambda: failing(tensors, how))
    assert result is None
    assert tensors
    assert not any(tensor() is not None for tensor in tensors)
    assert "in failing" in "".join(traceback.format_exception(error)), "its traceback is"
    with pytest.raises(type(error)) as raised:
        raise error
    assert raised.value is error


@pytest.mark.usefixtures("without_gc")
def test_an_error_that_is_dropped_is_gone_without_the_garbage_collector():
    class Failure(MemoryError):
        pass

    def work(_size):
        failure = Failure()
        alive.append(weakref.ref(failure))
        raise failure

    alive = []
    attempt(lambda: work(1))
    with contextlib.suppress(Failure):
        retreat(work, 4)  # the last: each attempt collects garbage
    assert len(alive) == 4
    assert not any(error() is not None for error in alive)


def test_an_attempt_lets_results_and_other_errors_pass():
    assert attempt(lambda: 3) == (3, None)
    assert attempt(lambda: None) == (None, None)
    for error in (KeyboardInterrupt, ZeroDivisionError, RuntimeError("out of memory")):
        with pytest.raises(type(error) if isinstance(error, Exception) else error):
            attempt(lambda error=error: raises(error))


def raises(error):
    raise error


def test_a_retreat_halves_down_to_the_floor_and_not_below():
    for size, floor, room, expected in [
        (100, 1, 7, [100, 50, 25, 12, 6]),
        (7, 2, 2, [7, 3, 2]),
        (7, 5, 5, [7, 5]),
        (3, 1, 3, [3]),
    ]:
        tried, told = [], []

        def work(size, tried=tried, room=room):
            tried.append(size)
            return size if size <= room else raises(MemoryError("no room"))

        found = retreat(work, size, floor, lambda *said, told=told: told.append(said))
        assert found == (expected[-1], expected[-1])
        assert tried == expected
        assert [smaller for smaller, _ in told] == expected[1:]
        assert all(str(error) == "no room" for _, error in told)


@pytest.mark.parametrize(("repeats", "last"), [(0, [2]), (2, [2, 2, 2])])
def test_at_the_floor_the_error_itself_comes_out_with_the_sizes(repeats, last):
    errors = []

    def work(size):
        errors.append(RuntimeError("CUDA error: out of memory"))
        raise errors[-1]

    with pytest.raises(RuntimeError) as raised:
        retreat(work, 9, floor=2, repeats=repeats)
    assert raised.value is errors[-1]
    assert raised.value.__notes__ == [
        f"memory ran out with each of these sizes: {[9, 4, *last]}; floor=2"
    ]


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
