"""Can tests, lessons and benchmarks run on this GPU? It takes at most a minute.

python benchmarks/gpu_smoke.py               every check is an event; exit 3 if one failed
python benchmarks/gpu_smoke.py --describe    print the machine as JSON; exit 3 without a GPU
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from events import REHEARSAL, attempt
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

PACKAGES = (
    "soundfile",
    "musdb",
    "museval",
    "mir_eval",
    "auraloss",
    "lightning_fabric",
    "torchaudio",
)
PACKAGES += ("tfswa_lab.training.run", "tfswa_lab.evaluation.evaluate", "tfswa_lab.memory.leaks")
PRIVATE = {
    torch._C: (
        "_cuda_isHistoryEnabled",
        "_cuda_clearCublasWorkspaces",
        "_cuda_attach_out_of_memory_observer",
    ),
    torch.cuda.memory: ("_record_memory_history", "_snapshot"),
    torch: ("_fused_sdp_choice",),
}
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Attention as our networks ask for it, one second of stereo: sequences, heads, length, width, and
# whether there is a mask.
SHAPES = {
    "TFSWA-UNet 15.4 M, time": (1025, 8, 86, 4, False),
    "TFSWA-UNet 15.4 M, windows": (1419, 8, 64, 4, True),
    "TFSWA-UNet small, frequency": (86, 2, 1025, 8, False),
    "TFSWA-UNet small, windows": (1419, 2, 64, 8, True),
    "TF-Locoformer S, time": (1025, 4, 86, 32, False),
    "TF-Locoformer S, frequency": (86, 4, 1025, 32, False),
}
SHARE = 80 if REHEARSAL else 1  # of the sequences that is left out
FRAMES_AND_BINS = (8, 64) if REHEARSAL else (64, 256)
SIDE = 256 if REHEARSAL else 8192  # of the matrices that are multiplied
COPIED = 2**20 if REHEARSAL else 2**30  # bytes


def describe() -> dict:
    """The description of the machine in every event."""
    if not torch.cuda.is_available():
        sys.exit(
            f"torch {torch.__version__} of {sys.executable} sees no CUDA GPU. Run this on a "
            "machine that has one, or rehearse it here: make gpu ARGS=--rehearse"
        )
    gpu = torch.cuda.get_device_properties(0)
    return {
        "gpu_name": gpu.name,
        "memory_gib": round(gpu.total_memory / 2**30, 1),
        "driver": _nvidia_smi("--query-gpu=driver_version") or "unknown",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def _nvidia_smi(query: str) -> str:
    """Its answer for the first GPU; empty where the program is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", query, "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def gpu_memory() -> dict:
    """Bytes free, and who else is on the GPU."""
    free, total = torch.cuda.mem_get_info()
    return {"free": free, "total": total, "others": _nvidia_smi("--query-compute-apps=pid,name")}


def packages() -> dict:
    """Import everything that is needed later, and time it."""
    began = time.perf_counter()
    for name in PACKAGES:
        importlib.import_module(name)
    return {"seconds": round(time.perf_counter() - began, 1)}


def files() -> dict:
    """FLAC is written and read, and the folder for results can be written to."""
    import numpy as np
    import soundfile

    with tempfile.TemporaryDirectory(dir=os.environ.get("TFSWA_LAB_OUT")) as folder:
        path, samples = Path(folder) / "x.flac", np.arange(-100, 100, dtype=np.int16)
        soundfile.write(path, samples, 44_100)
        assert (soundfile.read(path, dtype="int16")[0] == samples).all()
    return {}


def private_names() -> dict:
    """Names of torch that start with an underscore, which a new torch may have lost."""
    missing = [
        name for place, names in PRIVATE.items() for name in names if not hasattr(place, name)
    ]
    if missing:
        raise AttributeError(f"torch {torch.__version__} has no {', '.join(missing)}")
    return {}


def attention(sequences: int, heads: int, length: int, width: int, masked: bool) -> dict:
    """The default kernel, and whether each named one runs, with backward pass, by precision."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        shape = (3, sequences // SHARE, heads, length, width)
        qkv = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
        mask = torch.zeros(length, length, device="cuda", dtype=dtype) if masked else None
        default = SDPBackend(torch._fused_sdp_choice(*qkv, mask)).name
        ran = {name: _runs(kernel, qkv, mask) for name, kernel in KERNELS.items()}
        found[str(dtype).removeprefix("torch.")] = {"default": default, **ran}
    return found


def _runs(kernel: SDPBackend, qkv: torch.Tensor, mask: torch.Tensor | None) -> str:
    try:
        with sdpa_kernel(kernel):
            F.scaled_dot_product_attention(*qkv, mask).sum().backward()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "ran"


def networks() -> dict[str, nn.Module]:
    """One of each kind, tiny."""
    from tfswa_lab.models import tf_locoformer, tfswa_unet
    from tfswa_lab.models.mask_resunet import MaskResUNet

    return {
        "TFSWA-UNet": tfswa_unet.TFSWAUNet(2, 4, **tfswa_unet.SIZES["tiny"]),
        "TF-Locoformer": tf_locoformer.TFLocoformer(2, 4, **tf_locoformer.SIZES["tiny"]),
        "MaskResUNet": MaskResUNet(2, 4),
    }


def training_step(network: str, precision: str) -> dict:
    """A step as the trainer's Fabric makes it, whose loss is a number."""
    from tfswa_lab.training.launch import launch

    fabric = launch("cuda", 1, precision)
    model = networks()[network]
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters()))
    loss = model(torch.randn(1, 2, *FRAMES_AND_BINS, device=fabric.device)).square().mean()
    fabric.backward(loss)
    optimizer.step()
    assert loss.isfinite(), f"the loss is {loss.item()}"
    return {"loss": loss.item()}


def snapshot_is_read() -> dict:
    """Recorded, dumped and read again."""
    from tfswa_lab.memory import snapshot

    torch.cuda.init()
    with tempfile.TemporaryDirectory() as folder, snapshot.record():
        kept = torch.zeros(2**20, device="cuda")
        there = snapshot.read(snapshot.dump(Path(folder) / "now.pickle"))
    return {"allocated": there.fragmentation().allocated, "kept": kept.nbytes}


def failure_is_dumped() -> dict:
    """An out-of-memory writes a snapshot."""
    from tfswa_lab.memory import snapshot

    with tempfile.TemporaryDirectory() as folder, snapshot.record():
        with snapshot.dump_on_oom(Path(folder) / "oom.pickle") as dumped:
            try:
                torch.empty(2**50, dtype=torch.uint8, device="cuda")
            except torch.OutOfMemoryError as error:
                message = str(error).splitlines()[0]
        assert dumped.written, dumped.failures
    return {"message": message}


def bsseval_is_the_cpus() -> dict:
    """Two seconds of noise."""
    from bsseval import stems

    from tfswa_lab.evaluation.bsseval import bss_eval

    pair = [torch.from_numpy(x) for x in stems(2)]
    on_cpu, on_gpu = bss_eval(*pair), bss_eval(*(x.cuda() for x in pair))
    difference = max(
        (getattr(on_cpu, name) - getattr(on_gpu, name).cpu()).abs().max().item()
        for name in ("sdr", "isr", "sir", "sar")
    )
    assert difference < 1e-6, f"{difference} dB apart"
    return {"difference_db": difference}


def a_notebook_runs() -> dict:
    """One cell, where the packages for notebooks are there."""
    if importlib.util.find_spec("papermill") is None:
        return {"skipped": "no papermill: it is among the wheels for lessons"}
    import nbformat
    import papermill

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.ipynb"
        cell = nbformat.v4.new_code_cell("import torch; assert torch.cuda.is_available()")
        metadata = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=metadata), path)
        papermill.execute_notebook(path, path, progress_bar=False)
    return {}


def speeds() -> dict:
    """Bandwidth of a copy, bytes read and written, and the rate of a matrix product in bfloat16."""
    x = torch.randn(COPIED // 4, device="cuda")
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copying, multiplying = milliseconds(x.clone), milliseconds(lambda: a @ b)
    return {
        "copy_gb_per_s": round(2 * x.nbytes / copying / 1e6),
        "bfloat16_tflop_per_s": round(2 * SIDE**3 / multiplying / 1e9),
    }


def milliseconds(call: Callable, repeats: int = 5) -> float:
    """Median of some calls, by the GPU's own clock."""
    times = []
    for _ in range(2 + repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times[2:])[repeats // 2]


def checks() -> Iterator[tuple[str, Callable[[], dict]]]:
    """Names and checks, those that cost the least first."""
    yield "memory of the GPU", gpu_memory
    yield "files", files
    yield "private names of torch", private_names
    yield "packages", packages
    for name, shape in SHAPES.items():
        yield f"attention: {name}", partial(attention, *shape)
    yield "speeds", speeds
    for network, precision in product(networks(), ("32-true", "bf16-mixed", "16-mixed")):
        yield f"step: {network}, {precision}", partial(training_step, network, precision)
    yield "snapshot", snapshot_is_read
    yield "out of memory", failure_is_dumped
    yield "BSSEval", bsseval_is_the_cpus
    yield "notebook", a_notebook_runs


def main() -> None:
    """Run all checks; exit 3 if one failed."""
    lines = [attempt("smoke", check, check=name) for name, check in checks()]
    failed = [line for line in lines if line["kind"] == "failed" or "out_of_memory" in line]
    for line in failed:
        print(f"FAILED: {line['check']}\n{line.get('traceback', line.get('out_of_memory'))}")
    sys.exit(3 if failed else 0)


if __name__ == "__main__":
    if sys.argv[1:] == ["--describe"]:
        print(json.dumps(describe()))
    else:
        main()
