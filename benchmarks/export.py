"""Do exported networks give what the network gives, and are they smaller or faster?

    python benchmarks/export.py [--threads 2] [--compile-all]

TFSWA-UNet small, TF-Locoformer S and the shipped separator's MaskResUNet become ONNX and pt2 files;
each file is compared with its network at 44 sizes, and timed for a batch of one and 64 frames,
beside the network in eager mode and after `torch.compile` (which takes minutes for the other two,
so they are compiled only if that is asked for). Only the shipped separator has learned
something, so only its SDR is measured, on the band's test songs; its weights are also stored as
float16 and as int8, and quantised by onnxruntime's own tool.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from record import record, table
from torch import nn

from tfswa_lab.data.band import ensure_band
from tfswa_lab.device import compute_threads
from tfswa_lab.memory.sizes import format_bytes
from tfswa_lab.models.separator import Separator, build_separator
from tfswa_lab.models.storage import load_separator
from tfswa_lab.models.tf_locoformer import SIZES as LOCOFORMERS
from tfswa_lab.models.tf_locoformer import TFLocoformer
from tfswa_lab.models.tfswa_unet import SIZES as UNETS
from tfswa_lab.performance.export import TIMED_FRAMES, ExportReport, Subject, export
from tfswa_lab.performance.export_cost import seconds_per_call
from tfswa_lab.weights import BAND

STEMS = ("vocals", "drums", "bass", "other")
FILES = {"onnx": ".onnx", "pt2": ".pt2"}


def separators() -> dict[str, Separator]:
    """The three, by name. Two of them see few bins, or their 88 checks would take long."""
    torch.manual_seed(0)
    locoformer = {"architecture": TFLocoformer, **LOCOFORMERS["S"]}
    return {
        "TFSWA-UNet small": build_separator(
            STEMS, "magnitude", None, 256, 64, **UNETS["small"]
        ).eval(),
        "TF-Locoformer S": build_separator(STEMS, "mapping", None, 128, 32, **locoformer).eval(),
        "MaskResUNet": load_separator(BAND),
    }


def compiled(separator: Separator) -> dict[str, float]:
    """Seconds of a call after `torch.compile`, and of the first call, which compiles."""
    subject = Subject.of(separator, with_stft=False, bins=None)
    x, network = subject.random(1, TIMED_FRAMES), torch.compile(subject.network, dynamic=False)
    torch.compiler.reset()
    began = time.perf_counter()
    network(x)
    return {"compiling": time.perf_counter() - began, "seconds": seconds_per_call(network, x)}


def rows_of(report: ExportReport, took: float) -> dict:
    """What is kept of an export."""
    batch, frames = report.check.at
    return {
        "worst_error": report.worst_error,
        "at": f"{batch} × {frames}",
        "sizes": len(report.sizes),
        "seconds_exporting_and_checking": took,
        "variants": [vars(variant) for variant in report.variants],
    }


def exports(
    network: nn.Module, bins: int, precisions: dict[str, tuple[str, ...]], songs: Path | None
) -> dict:
    """Reports by format and precision, of a separator or, without songs, of a network."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for form, wanted in precisions.items():
            for precision in wanted:
                began = time.perf_counter()
                path = Path(folder, f"{precision}{FILES[form]}")
                options = {"songs": songs} if songs else {"bins": bins}
                report = export(network, path, form, precision, accept_loss=True, **options)
                print(report, "\n", flush=True)
                took = time.perf_counter() - began
                found[f"{form} {precision}"] = rows_of(report, took)
    return found


def measured(name: str, separator: Separator, compile_all: bool) -> dict:
    """All of one network."""
    trained = name == "MaskResUNet"
    precisions = {"onnx": ("fp32", "fp16", "int8") if trained else ("fp32", "int8")}
    precisions["pt2"] = ("fp32",)
    with torch.no_grad():
        subject = Subject.of(separator, with_stft=False, bins=None)
        return {
            "parameters": sum(p.numel() for p in separator.model.parameters()),
            "bins": subject.bins,
            "exports": exports(
                separator if trained else separator.model,
                subject.bins,
                precisions,
                ensure_band() if trained else None,
            ),
            "compiled": compiled(separator) if trained or compile_all else None,
        }


def show(result: dict) -> None:
    """Print the table."""
    rows = []
    for name, network in result["networks"].items():
        reports = network["exports"].items()
        eager = network["exports"]["onnx fp32"]["variants"][0]
        rows.append(row(name, "eager", eager, eager))
        if network["compiled"]:
            seconds = f"{1000 * network['compiled']['seconds']:.0f}"
            rows.append((name, "torch.compile", "", "", seconds, ""))
        for form, report in reports:
            error = f"{report['worst_error']:.1e} at {report['at']}"
            own, file, *others = report["variants"]
            rows.append(row(name, form, file, own, error))
            rows += [row(name, other["name"], other, own) for other in others]
    columns = ["network", "run as", "bytes", "worst error", "ms (eager then)", "SDR, or its change"]
    print(table(columns, rows))


def row(name: str, way: str, variant: dict, eager: dict, error: str = "") -> tuple:
    """One line of the table."""
    seconds = "" if variant["seconds"] is None else f"{1000 * variant['seconds']:.0f}"
    if seconds and variant is not eager:
        seconds += f" ({1000 * eager['seconds']:.0f})"
    measured = None not in (variant["sdr"], eager["sdr"])
    change = f"{variant['sdr'] - eager['sdr']:+.2f} dB" if measured else ""
    if measured and variant is eager:
        change = f"{eager['sdr']:.2f} dB"
    return name, way, format_bytes(variant["bytes"]), error, seconds, change


def main() -> None:
    """Measure, record, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile-all", action="store_true")
    asked = parser.parse_args()
    with compute_threads(asked.threads):
        networks = {
            name: measured(name, separator, asked.compile_all)
            for name, separator in separators().items()
        }
    result = {"threads": asked.threads, "frames_timed": TIMED_FRAMES, "networks": networks}
    record("export", "cpu", result)
    show(result)


if __name__ == "__main__":
    main()
