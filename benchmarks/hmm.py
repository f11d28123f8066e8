"""How fast are hidden Markov models, beside hmmlearn, pomegranate, dynamax and loops in torch?

    python benchmarks/hmm.py [--peers FOLDER] [--only NAME ...] [--rounds 9] [--quick]
    python benchmarks/hmm.py --device cuda      started by gpu.py

One process, one thread, the same model and data; contenders take turns, and medians of wall time
and of CPU time are kept, beside the largest error against the same in float64. Ours, dynamax
(jitted, with emissions by a matrix product) and the loops work in float32, pomegranate too;
hmmlearn has float64 only. `--peers` names a folder of packages that is searched after all others,
or `none`; what is not installed is left out. The guide is that of crlotwhite/pytorch_hmm (9dd458a):
its milliseconds are claims for a GPU. Axis letters: `b` sequences, `t` frames, `k` states, `d`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["NUMBA_NUM_THREADS"] = "1"
os.environ["XLA_FLAGS"] = (
    "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1 "
    + os.environ.get("XLA_FLAGS", "")
)

import numpy as np
import torch
from events import REHEARSAL, attempt
from hmm_cases import SYSTEMS, cases
from hmm_peers import KERNELS, LOOPS, MODELS, DurationLoop, Tasks, duration_loops
from record import RESULTS, record, table
from torch import Tensor

from tfswa_lab.device import pick_device
from tfswa_lab.sequence import hsmm, inference
from tfswa_lab.sequence.compiled_engine import scaling_is_safe
from tfswa_lab.sequence.em import EM
from tfswa_lab.sequence.hmm import HMM, GaussianHMM, MixtureGaussianHMM
from tfswa_lab.sequence.inputs import checked

TASKS = ("score", "posteriors", "Viterbi", "EM step")
PATIENCE = 20.0  # seconds for the rounds of a row; then fewer rounds, but never a smaller row
DURATIONS = ((32, 1000), (24, 800))  # B, T
STATES, SEQUENCES = (2, 5, 16, 64), (1, 32, 256)
CLAIMS = {  # of the guide, in milliseconds
    "MixtureGaussian, B 32, T 1000": 3.2,
    "HSMM, B 32, T 1000": 3.5,
    "streaming, B 16, T 500": 1.1,
    "Neural, B 16, T 1000": 5.1,
    "semi-Markov, B 24, T 800": 4.2,
}
CONFIGURATIONS = ((5, 80, 16, 500), (10, 80, 32, 1000), (15, 128, 24, 800))  # K, D, B, T
FIRST_CALLS = """
import json, time
begun = time.perf_counter()
import torch
from tfswa_lab.sequence import hsmm, inference
from tfswa_lab.sequence.em import EM
from tfswa_lab.sequence.hmm import GaussianHMM
torch.set_num_threads(1)
seconds = {"imports": time.perf_counter() - begun}
model, x = GaussianHMM(2, 3), torch.randn(8, 50, 3)
given = (torch.randn(8, 50, 2), torch.full((2,), 0.5), 1 - torch.eye(2), torch.full((2, 5), 0.2))
for name, call in {
    "score": lambda: model.score(x),
    "posteriors": lambda: model.posteriors(x),
    "Viterbi": lambda: model.viterbi(x),
    "EM step": lambda: model.fit(x, settings=EM(iterations=1, initialise=False)),
    "HSMM score": lambda: hsmm.log_likelihood(*given),
    "HSMM posteriors": lambda: hsmm.posteriors(*given),
    "HSMM Viterbi": lambda: hsmm.viterbi(*given),
}.items():
    begun = time.perf_counter()
    call()
    seconds[name] = time.perf_counter() - begun
print(json.dumps(seconds))
"""
FRAMES = 20 if REHEARSAL else None  # of a rehearsal
MISSING: set[str] = set()  # packages that are not installed, or not asked for


# Taking turns ----------------------------------------------------------------------------------


def in_turns(contenders: Tasks, rounds: int) -> tuple[dict[str, dict], dict[str, object]]:
    """Medians in milliseconds of contenders that take turns, and what each returned."""
    wall, cpu = ({name: [] for name in contenders} for _ in range(2))
    outputs = {name: on_one_thread(run) for name, run in contenders.items()}  # compiles
    begun = time.perf_counter()
    for number in range(rounds + 1):  # the first warms up
        for name, run in contenders.items():
            torch.set_num_threads(1)  # pomegranate sets OpenMP to all cores
            wall_before, cpu_before = time.perf_counter(), time.process_time()
            run()
            cpu[name].append(1e3 * (time.process_time() - cpu_before))
            wall[name].append(1e3 * (time.perf_counter() - wall_before))
        if number and time.perf_counter() - begun > PATIENCE:
            break
    return {
        name: {
            "wall_ms": statistics.median(wall[name][1:]),
            "cpu_ms": statistics.median(cpu[name][1:]),
            "least_ms": min(wall[name][1:]),
            "most_ms": max(wall[name][1:]),
            "rounds": len(wall[name]) - 1,
        }
        for name in contenders
    }, outputs


def on_one_thread(run: Callable) -> object:
    """A result of torch's operators on one thread, whatever a package has set before."""
    torch.set_num_threads(1)
    return run()


def compared(contenders: dict[str, Tasks], right: dict, rounds: int) -> dict[str, dict]:
    """Times and errors by task and contender; `right` holds the results in float64."""
    result = {}
    for task in right:
        runs = {name: tasks[task] for name, tasks in contenders.items() if task in tasks}
        result[task], outputs = in_turns(runs, rounds)
        for name, found in outputs.items():
            result[task][name]["error"] = error_of(task, found, right[task])
    return result


def error_of(task: str, found: object, right: Tensor) -> float:
    """Largest error: relative of a score, absolute of numbers, share of frames of a path."""
    found = found if isinstance(found, Tensor) else torch.from_numpy(np.asarray(found).copy())
    if task == "Viterbi":
        return (found != right).double().mean().item()
    found = found.detach().double()
    if task == "score":
        return ((found.sum() - right.sum()) / right.sum()).abs().item()
    return (found - right).abs().max().item()


def there(builders: dict) -> dict[str, Callable]:
    """Builders whose package is installed."""
    return {name: make for name, (package, make) in builders.items() if package not in MISSING}


# Models and data -------------------------------------------------------------------------------


def steps_of(states: int) -> Tensor:
    """Transitions `(k, k)` of states that last for a while."""
    move = torch.rand(states, states) + 3 * torch.eye(states)
    return move / move.sum(1, keepdim=True)


def a_model(states: int, features: int, components: int = 0) -> HMM:
    """Gaussians, or mixtures of them, that overlap."""
    torch.manual_seed(0)
    sizes = (states, components, features) if components else (states, features)
    model = (MixtureGaussianHMM if components else GaussianHMM)(*sizes)
    model.means = 0.3 * torch.randn(model.means.shape)
    model.transmat = steps_of(states)
    return model


def random_durations(sequences: int, frames: int) -> tuple[Tensor, ...]:
    """Log emissions, start, transitions, and laws of 1 to 50 frames that look like a gamma law."""
    torch.manual_seed(0)
    move = torch.rand(5, 5).fill_diagonal_(0)
    ages = torch.arange(1, 51).float()
    laws = (2 * ages.log() - ages / 5).softmax(0).expand(5, -1)
    emissions = torch.randn(sequences, frames, 5)
    return emissions, torch.full((5,), 0.2), move / move.sum(1, keepdim=True), laws


def of_model(model: HMM, x: Tensor, method: str = "auto") -> Tasks:
    """Our functions from features, which return what is compared."""
    lengths, settings = torch.full((len(x),), x.shape[1]), EM()

    def em_step():
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model.maximise(x, lengths, model.expect(x, lengths)[1], settings)
        means = model.means.detach().clone()
        model.load_state_dict(before)
        return means

    return {
        "score": lambda: model.score(x, method=method),
        "posteriors": lambda: model.posteriors(x, method=method).states,
        "Viterbi": lambda: model.viterbi(x, method=method).states,
        "EM step": em_step,
    }


def of_emissions(given: tuple[Tensor, ...], method: str = "auto") -> Tasks:
    """Our functions from log emissions."""
    return {
        "score": lambda: inference.log_likelihood(*given, method=method),
        "posteriors": lambda: inference.posteriors(*given, method=method).states,
        "Viterbi": lambda: inference.viterbi(*given, method=method).states,
    }


def of_durations(given: tuple[Tensor, ...]) -> Tasks:
    """Our functions with explicit durations."""
    return {
        "score": lambda: hsmm.log_likelihood(*given),
        "posteriors": lambda: hsmm.posteriors(*given).states,
        "Viterbi": lambda: hsmm.viterbi(*given).states,
    }


def loops(emissions: Callable[[], Tensor], start: Tensor, move: Tensor) -> Tasks:
    """Plain loops in torch."""

    def task(loop: Callable) -> Callable:
        return lambda: loop(emissions(), start, move)

    return {name: task(loop) for name, loop in LOOPS.items()}


def in_float64(tasks: Tasks) -> dict[str, Tensor]:
    """Right answers."""
    return {name: run().detach() for name, run in tasks.items()}


# Measurements ----------------------------------------------------------------------------------


@torch.no_grad()
def end_to_end(rounds: int) -> dict:
    """From features to results: B 32, T 1000, K 5, D 80."""
    model = a_model(5, 80)
    x, _ = model.sample(32, FRAMES or 1000, torch.Generator().manual_seed(1))
    contenders = {
        "ours": of_model(model, x),
        "loop in torch": loops(lambda: model.log_emissions(x), model.startprob, model.transmat),
        **{name: make(model, x) for name, make in there(MODELS).items()},
    }
    exact = a_model(5, 80).double()
    mean, deviation = exact.means[:, None, None], exact.covariances.sqrt()[:, None, None]
    logs = torch.distributions.Normal(mean, deviation).log_prob(x.double()).sum(-1)
    logs = logs.permute(1, 2, 0)
    right = in_float64(loops(lambda: logs, exact.startprob, exact.transmat))
    weights = right["posteriors"].flatten(0, 1)
    right["EM step"] = weights.T @ x.double().flatten(0, 1) / weights.sum(0)[:, None]
    return compared(contenders, right, rounds)


@torch.no_grad()
def durations(rounds: int) -> dict:
    """Explicit durations, K 5, D 50, log emissions given."""
    result = {}
    for sequences, frames in DURATIONS:
        given = random_durations(sequences, FRAMES or frames)
        right = in_float64(duration_loops(*(tensor.double() for tensor in given)))
        contenders = {"ours": of_durations(given), "loop in torch": duration_loops(*given)}
        for task, times in compared(contenders, right, rounds).items():
            result[f"B {sequences}, T {frames}, {task}"] = times
    return result


@torch.no_grad()
def one_song(rounds: int) -> dict:
    """One sequence of 24 000 frames, four minutes at 100 a second, K 5, log emissions given."""
    torch.manual_seed(0)
    given = (torch.randn(1, FRAMES or 24_000, 5), torch.full((5,), 0.2), steps_of(5))
    exact = tuple(tensor.double() for tensor in given)
    contenders = {
        "ours": of_emissions(given),
        "loop in torch": loops(lambda: given[0], *given[1:]),
        **{name: make(*given) for name, make in there(KERNELS).items()},
    }
    return compared(contenders, in_float64(loops(lambda: exact[0], *exact[1:])), rounds)


@torch.no_grad()
def sizes(rounds: int) -> dict:
    """T 1000, log emissions `(b, t, k)` given, as a network returns them."""
    result = {}
    for k in STATES:
        for b in SEQUENCES if not REHEARSAL else (1, 2):
            torch.manual_seed(0)
            given = (torch.randn(b, FRAMES or 1000, k), torch.full((k,), 1 / k), steps_of(k))
            contenders = {
                "ours": of_emissions(given),
                **{name: make(*given) for name, make in there(KERNELS).items()},
            }
            row = {
                task: in_turns({name: tasks[task] for name, tasks in contenders.items()}, rounds)[0]
                for task in TASKS[:3]
            }
            safe = scaling_is_safe(checked(*given, None)[0])
            result[f"K {k}, B {b}"] = {"kernel": "scaled" if safe else "logarithmic", **row}
    return result


def guides_rows(device: torch.device, method: str) -> dict[str, Tasks]:
    """The guide's five rows and its three configurations, as our functions."""

    def chain(b, t):
        torch.manual_seed(0)
        given = (torch.randn(b, FRAMES or t, 5), torch.full((5,), 0.2), steps_of(5))
        return tuple(tensor.to(device) for tensor in given)

    def model(k, d, b, t, components=0):
        torch.manual_seed(1)
        x = torch.randn(b, FRAMES or t, d).to(device)
        tasks = of_model(a_model(k, d, components).to(device), x, method)
        return {task: tasks[task] for task in TASKS[:3]}

    def lasting(b, t):
        return of_durations(tuple(part.to(device) for part in random_durations(b, FRAMES or t)))

    stream = chain(16, 500)
    rows = (
        model(5, 80, 32, 1000, components=3),
        lasting(32, 1000),
        {"filter": lambda: inference.filter(*stream, method=method)},
        of_emissions(chain(16, 1000), method),
        lasting(24, 800),
    )
    found = dict(zip(CLAIMS, rows, strict=True))
    for k, d, b, t in CONFIGURATIONS:
        found[f"Gaussian, K {k}, D {d}, B {b}, T {t}"] = model(k, d, b, t)
        found[f"mixture of 3, K {k}, D {d}, B {b}, T {t}"] = model(k, d, b, t, components=3)
    return found


@torch.no_grad()
def guide(rounds: int) -> dict:
    """The guide's rows and configurations on one CPU thread."""
    return {
        name: {"claim_ms": CLAIMS.get(name), **in_turns(tasks, rounds)[0]}
        for name, tasks in guides_rows(torch.device("cpu"), "auto").items()
    }


def first_call(rounds: int) -> dict:
    """Seconds of first calls in new processes: compiled anew, and read from numba's cache."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder, "PYTHONPATH": path}
        command = [sys.executable, "-c", FIRST_CALLS]
        results = [
            subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            for _ in range(2)
        ]
    names = ("compiled", "cached")
    return {name: json.loads(done.stdout) for name, done in zip(names, results, strict=True)}


def correctness(rounds: int) -> dict:
    """What each system answers on the cases."""
    return cases(MISSING)


MEASUREMENTS = {
    "end to end": end_to_end,
    "durations": durations,
    "one song": one_song,
    "sizes": sizes,
    "guide": guide,
    "first call": first_call,
    "cases": correctness,  # the last: its peers in float64 change settings of jax
}


# On a GPU --------------------------------------------------------------------------------------


@torch.no_grad()
def on_gpu(device: torch.device, rounds: int) -> None:
    """A line for each row and task, with the tensor engine; explicit durations use the CPU."""
    model = a_model(5, 80)
    x, _ = model.sample(32, FRAMES or 1000, torch.Generator().manual_seed(1))
    model, x = model.to(device), x.to(device)
    features = "B 32, T 1000, K 5, D 80"
    by_loop = loops(lambda: model.log_emissions(x), model.startprob, model.transmat)
    rows = {("ours", features): of_model(model, x, "tensor")}
    rows |= {("loop in torch", features): by_loop}
    given = tuple(part.to(device) for part in random_durations(32, FRAMES or 1000))
    in_place = {"score": DurationLoop(*given).score_in_place}
    rows |= {("loop in torch", "HSMM, B 32, T 1000"): in_place}
    rows |= {("ours", name): tasks for name, tasks in guides_rows(device, "tensor").items()}
    lasts = ("HSMM", "semi-Markov")  # compiled for the CPU, which takes half a minute: the last
    order = sorted(rows.items(), key=lambda row: row[0][1].startswith(lasts))
    for (way, what), tasks in order:
        for task, run in tasks.items():
            measure = partial(milliseconds, run, rounds, CLAIMS.get(what))
            attempt("hmm", measure, way=way, what=what, task=task)
            torch.cuda.empty_cache()


def milliseconds(run: Callable, rounds: int, claim: float | None) -> dict:
    """Median over the rounds of a synchronised call, and the memory that it needs at most."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held, times = torch.cuda.memory_allocated(), []
    for _ in range(rounds):
        begun = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
    peak = torch.cuda.max_memory_allocated()
    found = {"ms": round(statistics.median(times), 3), "claim_ms": claim}
    return found | {"peak_mib": round(peak / 2**20, 1), "own_mib": round((peak - held) / 2**20, 1)}


# Tables ----------------------------------------------------------------------------------------


def times_table(result: dict) -> str:
    """Milliseconds by task and contender, how many times ours, and the error."""
    rows = []
    for task, contenders in result.items():
        ours = contenders["ours"]["wall_ms"]
        for name, found in contenders.items():
            wall, cpu = found["wall_ms"], found["cpu_ms"]
            ratio = "" if name == "ours" else f"{wall / ours:.1f}"
            rows.append([task, name, f"{wall:.2f}", f"{cpu:.2f}", ratio, f"{found['error']:.0e}"])
    return table(["task", "", "ms", "CPU ms", "times ours", "error"], rows)


def sizes_table(result: dict) -> str:
    """Ours beside the peers by size; who is fastest is bold."""
    names = [*next(iter(result.values()))["score"]]

    def cell(found: dict) -> str:
        fastest = min(one["wall_ms"] for one in found.values())
        shown = ((one["wall_ms"], f"{one['wall_ms']:.2f}") for one in found.values())
        return " / ".join(f"**{text}**" if ms == fastest else text for ms, text in shown)

    rows = [
        [size, row["kernel"], *(cell(row[task]) for task in TASKS[:3])]
        for size, row in result.items()
    ]
    return table([" / ".join(names), "kernel of `auto`", *TASKS[:3]], rows)


def guide_table(result: dict) -> str:
    """Milliseconds by task, beside the claim."""
    columns = (*TASKS[:3], "filter")
    rows = [
        [
            name,
            *(f"{row[c]['wall_ms']:.2f}" if c in row else "" for c in columns),
            row["claim_ms"] or "–",
        ]
        for name, row in result.items()
    ]
    return table(["", *columns, "claim, ms"], rows)


def first_call_table(result: dict) -> str:
    """Seconds."""
    compiled, cached = result["compiled"], result["cached"]
    rows = [[name, f"{compiled[name]:.2f}", f"{cached[name]:.2f}"] for name in compiled]
    rows.append(["all", *(f"{sum(times.values()):.2f}" for times in (compiled, cached))])
    return table(["first call", "compiled, s", "cached, s"], rows)


def cases_table(result: dict) -> str:
    """Answers."""
    names = [*next(iter(result.values()))] if result else []
    return table(["case", *names], [[name, *row.values()] for name, row in result.items()])


TABLES = {
    "sizes": sizes_table,
    "guide": guide_table,
    "first call": first_call_table,
    "cases": cases_table,
}


def find_peers(folder: str | None) -> None:
    """Search a folder for the peers; remember which are missing."""
    packages = {package for _, (package, _) in (*MODELS.items(), *SYSTEMS.items())} - {"torch"}
    if folder and folder != "none":
        sys.path.append(str(Path(folder).resolve()))
    MISSING.update(name for name in packages if folder == "none" or not find_spec(name))
    print("not installed:", ", ".join(sorted(MISSING)) or "none")


def main() -> None:
    """Measure, print tables, and keep the result if all was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", help="folder with the peers' packages, or none")
    parser.add_argument("--only", nargs="*", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--rounds", type=int, default=1 if REHEARSAL else 9)
    parser.add_argument("--quick", action="store_true", help="one round; nothing is recorded")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    asked = parser.parse_args()
    device = pick_device(asked.device)
    rounds = 1 if asked.quick else asked.rounds
    if device.type != "cpu":
        return on_gpu(device, rounds)
    torch.set_num_threads(1)
    find_peers(asked.peers)
    result = {}
    for name in asked.only:
        result[name] = MEASUREMENTS[name](rounds)
        print(f"{name}\n\n{TABLES.get(name, times_table)(result[name])}\n", flush=True)
    if set(asked.only) == set(MEASUREMENTS) and not asked.quick and not REHEARSAL:
        packages = {package for package, _ in MODELS.values()} - MISSING
        versions = {package: version(package) for package in packages}
        result |= {"threads": torch.get_num_threads(), "versions": versions}
        record("hmm", "cpu", result | {"missing": sorted(MISSING)}, asked.out)


if __name__ == "__main__":
    main()
