"""Keep a benchmark's result beside the machine that it was measured on."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict:
    """Processor, cores, GPU, and the versions that a timing depends on."""
    return {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def record(name: str, result: dict) -> Path:
    """Write `results/<name>.json`: the result, and the machine under the key `machine`."""
    path = RESULTS / f"{name}.json"
    content = {**result, "machine": machine()}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    return path


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
