"""How fast, how lean and how exact is BSSEval here, beside museval?

    python benchmarks/bsseval.py [--seconds 180 240] [--threads 2 1]
    python benchmarks/bsseval.py --device cuda    songs and solver on a GPU, started by gpu.py
    python benchmarks/bsseval.py --museval        museval alone, on cores of its own beside them

Four stereo stems of noise that leak into one another, frames of 1 s, filters of 512 taps; both get
the same float64 arrays. Each measurement is a process of its own: the first call is the cold one,
the median of the following is the warm one. museval is called once per length: it takes a minute.
Then the solver alone, beside Cholesky's method on the whole matrix.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial

import numpy as np
import torch
from events import REHEARSAL, attempt
from record import record, table
from subprocess_benchmark import peak_gib, run, start

from tfswa_lab import audio
from tfswa_lab.device import pick_device
from tfswa_lab.evaluation.block_toeplitz import solve
from tfswa_lab.evaluation.bsseval import bss_eval

RATE = 44_100
SONGS = [1.0] if REHEARSAL else [180.0, 240.0]  # seconds
SOURCES = 2 if REHEARSAL else 4
SOLVED_SECONDS = 1 if REHEARSAL else 10  # of sound whose equations are solved
MUSEVALS_CORES = 4
WARM = 1 if REHEARSAL else 5  # calls after the first
TAPS = 64 if REHEARSAL else 512  # of the solver that is timed


def stems(seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """References and estimates `(n, 2, s)`, float64, always the same."""
    draw = np.random.default_rng(0)
    references = np.empty((SOURCES, 2, round(seconds * RATE)))
    for channel in references.reshape(2 * SOURCES, -1):  # one by one: the peak holds no copies
        channel[:] = np.round(3000 * draw.standard_normal(channel.size)) / 32_768
    estimates = 0.8 * references
    estimates += 0.2 * references.mean(0)
    for channel in estimates.reshape(2 * SOURCES, -1):
        channel += 0.01 * draw.standard_normal(channel.size)
    return references, estimates


def time_ours(seconds: float, device: str) -> dict:
    """Cold and warm seconds, and peak memory of the process with its input."""
    pair = [torch.from_numpy(x).to(device) for x in stems(seconds)]
    before, spent = peak_gib(), []
    for _ in range(1 + WARM):
        began = time.perf_counter()
        bss_eval(*pair).sdr.cpu()  # waits for a GPU
        spent.append(time.perf_counter() - began)
    row = {"cold_s": round(spent[0], 2), "warm_s": round(statistics.median(spent[1:]), 3)}
    row |= {"peak_gib": peak_gib(), "input_gib": before}
    if device == "cuda":
        row["gpu_peak_gib"] = peak_gib(device)
    return row


def time_solver(device: str = "cpu") -> dict:
    """The equations of four stereo stems by their structure, and by Cholesky's method."""
    x = torch.from_numpy(stems(SOLVED_SECONDS)[0]).flatten(0, 1).to(device)
    length = 2 ** (x.shape[1] + TAPS).bit_length()
    spectra = torch.fft.rfft(x, n=length)
    cross = torch.fft.irfft(spectra[:, None].conj() * spectra, n=length)[..., :TAPS]
    blocks = cross.permute(2, 0, 1).contiguous()  # (l, p, p)
    sides = blocks.flip(2)
    spent, filters = {}, {}
    for name, method in (("structured_s", structured), ("cholesky_s", cholesky)):
        times = []
        for _ in range(1 + WARM):
            began = time.perf_counter()
            filters[name] = method(blocks, sides)
            filters[name][0, 0].cpu()  # waits for a GPU
            times.append(time.perf_counter() - began)
        spent[name] = round(statistics.median(times[1:]), 3)
    first, second = filters.values()
    return spent | {"relative_difference": ((first - second).norm() / second.norm()).item()}


def structured(blocks: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
    """Filters as BSSEval finds them here."""
    return solve(blocks[None], sides[None])[0][0]


def cholesky(blocks: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
    """Filters by the matrix of 4096 rows, written out."""
    both = torch.cat([blocks.flip(0)[:-1].mT, blocks])  # by delay, the negative ones first
    delays = torch.arange(TAPS)[:, None] - torch.arange(TAPS) + TAPS - 1
    matrix = both[delays].transpose(1, 2).reshape(TAPS * len(blocks[0]), -1)
    factor = torch.linalg.cholesky(matrix)
    return torch.cholesky_solve(sides.flatten(0, 1), factor).view_as(sides)


def time_museval(seconds: float) -> dict:
    """One call of museval, and how far our values are from it, in dB."""
    audio.ensure_ffmpeg()
    import museval

    references, estimates = stems(seconds)
    before, began = peak_gib(), time.perf_counter()
    theirs = museval.metrics.bss_eval(
        references.swapaxes(1, 2), estimates.swapaxes(1, 2), window=RATE, hop=RATE
    )[:4]
    row = {
        "s": round(time.perf_counter() - began, 2),
        "peak_gib": peak_gib(),
        "input_gib": before,
    }
    ours = bss_eval(references, estimates)
    pairs = zip((ours.sdr, ours.isr, ours.sir, ours.sar), theirs, strict=True)
    return row | {"difference_db": max(float(abs(a.numpy() - b).max()) for a, b in pairs)}


def measure(what: str, seconds: float = 0.0, device: str = "cpu") -> dict:
    """One measurement, in a process of its own."""
    if what == "solver":
        return time_solver()
    return time_museval(seconds) if what == "museval" else time_ours(seconds, device)


def compare(seconds: float, threads: list[int]) -> dict:
    """museval once, and ours with each number of threads."""
    peer = run(__file__, max(threads), what="museval", seconds=seconds)
    rows = {str(number): run(__file__, number, what="ours", seconds=seconds) for number in threads}
    for row in rows.values():
        row["ratio_warm"] = round(peer["s"] / row["warm_s"], 1)
        row["ratio_cold"] = round(peer["s"] / row["cold_s"], 1)
    return {"museval": peer, "threads": rows}


def on_gpu(songs: list[float]) -> None:
    """A line for each length of song, and for the solver on either side."""
    for seconds in songs:
        row = partial(time_ours, seconds, "cuda")
        attempt("bsseval", row, what="ours", song_seconds=seconds)
    for device in ("cpu", "cuda"):
        attempt("bsseval", partial(time_solver, device), what="solver", where=device)


def museval_alone(seconds: float) -> None:
    """A line for one call of museval, which takes a minute, and so may miss the end."""
    torch.set_num_threads(MUSEVALS_CORES)
    row = partial(run, __file__, MUSEVALS_CORES, what="museval", seconds=seconds)
    attempt("bsseval", row, what="museval", song_seconds=seconds)


def main() -> None:
    """Measure, record, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--museval", action="store_true", help="museval alone, once")
    parser.add_argument("--seconds", type=float, nargs="+", default=SONGS)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    asked = parser.parse_args()
    if asked.museval:
        return museval_alone(asked.seconds[0])
    if pick_device(asked.device).type == "cuda":
        return on_gpu(asked.seconds)
    result = {f"{each:g} s": compare(each, asked.threads) for each in asked.seconds}
    solver = {str(number): run(__file__, number, what="solver") for number in asked.threads}
    record("bsseval", "cpu", {"songs": result, "solver": solver})
    show(result, solver)


def show(songs: dict, solver: dict) -> None:
    """Print both tables."""
    lines = []
    for song, found in songs.items():
        peer = found["museval"]
        for number, row in found["threads"].items():
            ours = f"{row['cold_s']} s", f"{row['warm_s']} s", f"{row['peak_gib']} GiB"
            theirs = f"{peer['s']} s", f"{peer['peak_gib']} GiB"
            lines.append((song, number, *ours, *theirs, row["ratio_warm"], row["ratio_cold"]))
        print(f"{song}, largest difference: {peer['difference_db']:.0e} dB")
    columns = ["song", "threads", "cold", "warm", "peak", "museval", "peak", "ratio warm", "cold"]
    print(table(columns, lines))
    times = [
        (number, f"{row['structured_s']} s", f"{row['cholesky_s']} s")
        for number, row in solver.items()
    ]
    print("\n" + table(["threads", "structured solver", "Cholesky"], times))


if __name__ == "__main__":
    start(main, measure)
