"""Keep a benchmark's result beside the machine that it was measured on, and print it as a table."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def machine() -> dict:
    """Processor, cores, GPU, and the versions that a timing depends on."""
    import torch  # `gpu.py report` reads and writes results without it

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def path_of(name: str, device: str, folder: Path = RESULTS) -> Path:
    """The file of a result: `<name>.json` from a CPU, `<name>-gpu.json` from a GPU."""
    return folder / f"{name}{'' if device == 'cpu' else '-gpu'}.json"


def record(name: str, device: str, result: dict, folder: Path = RESULTS) -> Path:
    """Write a result.

    Args:
        name: of the benchmark.
        device: that it was measured on, such as `cpu` or `cuda`.
        result: in JSON's types; without a key `machine`, it gets this machine.
        folder: of the results.

    Returns:
        The file.
    """
    path = path_of(name, device, folder)
    content = result if "machine" in result else {**result, "machine": machine()}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    return path


def table(columns: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A table in Markdown.

    >>> print(table(["song", "SDR"], [["a|b", 7.5]]))
    | song | SDR |
    |---|---|
    | a\\|b | 7.5 |
    """
    cells = ([str(cell).replace("|", "\\|") for cell in row] for row in (columns, *rows))
    head, *body = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([head, "|---" * len(columns) + "|", *body])


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
