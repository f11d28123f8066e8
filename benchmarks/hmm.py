"""How fast are hidden Markov models, beside hmmlearn, pomegranate, dynamax and a loop in torch?

    python benchmarks/hmm.py [--rounds 9] [--only NAME ...]
    python benchmarks/hmm.py --device cuda      the guide's table on a GPU, started by gpu.py

One process, one thread, the same model and data; contenders take turns, and medians of wall time
and of CPU time are kept. Ours, dynamax (jitted, with emissions by a matrix product) and the loops
work in float32, hmmlearn and pomegranate as they do by default. A package that is not installed is
left out. The guide is the one of crlotwhite/pytorch_hmm (9dd458a), whose times are for a GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["XLA_FLAGS"] = (
    "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1 "
    + os.environ.get("XLA_FLAGS", "")
)

import numpy as np
import torch
from events import REHEARSAL
from record import record, table
from torch import Tensor

from tfswa_lab.sequence import hsmm, inference
from tfswa_lab.sequence.compiled_engine import scaling_is_safe
from tfswa_lab.sequence.em import EM
from tfswa_lab.sequence.hmm import GaussianHMM, MixtureGaussianHMM
from tfswa_lab.sequence.inputs import checked

CLAIMS = {  # of the guide: model, sequences, frames, milliseconds
    "MixtureGaussian": (32, 1000, 3.2),
    "HSMM": (32, 1000, 3.5),
    "streaming": (16, 500, 1.1),
    "Neural": (16, 1000, 5.1),
    "semi-Markov": (24, 800, 4.2),
}
CONFIGURATIONS = ((5, 80, 16, 500), (10, 80, 32, 1000), (15, 128, 24, 800))  # K, D, B, T
# A first score and a first posterior, in an empty process: what the compiler takes.
FIRST_CALL = """
import time, torch
from tfswa_lab.sequence.hmm import GaussianHMM
model, x = GaussianHMM(2, 3), torch.randn(8, 50, 3)
start = time.perf_counter()
model.score(x); model.posteriors(x); model.viterbi(x)
print(time.perf_counter() - start)
"""


def in_turns(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict]:
    """Medians in milliseconds, wall and CPU time, of contenders that take turns."""
    wall, cpu = ({name: [] for name in contenders} for _ in range(2))
    for run in contenders.values():
        run()  # compiles
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            torch.set_num_threads(1)  # pomegranate sets OpenMP to all cores
            before, cpu_before = time.perf_counter(), time.process_time()
            run()
            wall[name].append(1e3 * (time.perf_counter() - before))
            cpu[name].append(1e3 * (time.process_time() - cpu_before))
    return {
        name: {
            "wall_ms": statistics.median(wall[name]),
            "cpu_ms": statistics.median(cpu[name]),
            "least_ms": min(wall[name]),
            "most_ms": max(wall[name]),
        }
        for name in contenders
    }


def a_model(states: int, features: int) -> GaussianHMM:
    """States that overlap, and stay for a while."""
    torch.manual_seed(0)
    model = GaussianHMM(states, features)
    model.means = 0.3 * torch.randn(states, features)
    move = torch.rand(states, states) + 3 * torch.eye(states)
    model.transmat = move / move.sum(1, keepdim=True)
    return model


# Contenders ------------------------------------------------------------------------------------


def loop_score(emissions: Tensor, start: Tensor, transmat: Tensor) -> Tensor:
    """The plain scaled loop in torch, a frame at a time."""
    best = emissions.amax(-1, keepdim=True)
    seen = (emissions - best).exp()
    now, logs = start * seen[:, 0], 0.0
    for t in range(1, seen.shape[1] + 1):
        total = now.sum(-1, keepdim=True)
        now, logs = now / total, logs + total.log()
        if t < seen.shape[1]:
            now = (now @ transmat) * seen[:, t]
    return logs[:, 0] + best[..., 0].sum(1)


def loop_posteriors(emissions: Tensor, start: Tensor, transmat: Tensor) -> Tensor:
    """Forward and backward, a frame at a time."""
    seen = (emissions - emissions.amax(-1, keepdim=True)).exp().movedim(1, 0)
    now, filtered = start * seen[0], []
    for t in range(len(seen)):
        if t:
            now = (now @ transmat) * seen[t]
        now = now / now.sum(-1, keepdim=True)
        filtered.append(now)
    later, smoothed = torch.ones_like(now), [now]
    for t in range(len(seen) - 2, -1, -1):
        later = (later * seen[t + 1]) @ transmat.T
        later = later / later.sum(-1, keepdim=True)
        both = filtered[t] * later
        smoothed.append(both / both.sum(-1, keepdim=True))
    return torch.stack(smoothed[::-1], 1)


def loop_viterbi(emissions: Tensor, start: Tensor, transmat: Tensor) -> Tensor:
    """Max and gather, a frame at a time."""
    steps, score, origins = transmat.log(), start.log() + emissions[:, 0], []
    for t in range(1, emissions.shape[1]):
        best, origin = (score[:, :, None] + steps).max(1)
        origins.append(origin)
        score = best + emissions[:, t]
    path = [score.argmax(-1)]
    for origin in reversed(origins):
        path.append(origin.gather(1, path[-1][:, None])[:, 0])
    return torch.stack(path[::-1], 1)


def loop_durations(emissions: Tensor, start: Tensor, transmat: Tensor, laws: Tensor) -> Tensor:
    """Explicit durations in log space: one log-sum-exp over all durations a frame."""
    longest = laws.shape[1]
    before = torch.cat([torch.zeros_like(emissions[:, :1]), emissions.cumsum(1)], 1)
    b, t, k = before.shape
    starts = torch.full((b, t + longest, k), -torch.inf)
    starts[:, longest] = start.log()
    reverse, steps = laws.log().flip(1).T, transmat.log()
    for frame in range(1, t):
        ends = (starts[:, frame : frame + longest] + reverse).logsumexp(1) + before[:, frame]
        entered = (ends[:, :, None] + steps).logsumexp(1)
        starts[:, longest + frame] = entered - before[:, frame]
    return ends.logsumexp(-1)


def of_hmmlearn(model: GaussianHMM, x: Tensor) -> dict[str, Callable]:
    """score, posteriors, Viterbi and an EM step of hmmlearn."""
    from copy import deepcopy

    from tfswa_lab.sequence.exchange import to_hmmlearn

    peer = to_hmmlearn(model)
    peer.set_params(implementation="scaling", n_iter=1, init_params="", algorithm="viterbi")
    rows, lengths = x.flatten(0, 1).double().numpy(), [x.shape[1]] * len(x)
    return {
        "score": lambda: peer.score(rows, lengths),
        "posteriors": lambda: peer.predict_proba(rows, lengths),
        "Viterbi": lambda: peer.predict(rows, lengths),
        "EM step": lambda: deepcopy(peer).fit(rows, lengths),
    }


def of_dynamax(model: GaussianHMM, x: Tensor) -> dict[str, Callable]:
    """The same in dynamax, jitted, with emissions and moments as matrix products."""
    import jax
    import jax.numpy as jnp
    from dynamax.hidden_markov_model import hmm_filter, hmm_posterior_mode, hmm_smoother

    precision = 1 / model.covariances.detach()
    mean = model.means.detach()
    weights = jnp.asarray(torch.cat([precision, -2 * mean * precision], 1).numpy().T)
    constant = (mean**2 * precision).sum(1) + (2 * torch.pi / precision).log().sum(1)
    constant = jnp.asarray(constant.numpy())
    start, move = (jnp.asarray(p.detach().numpy()) for p in (model.startprob, model.transmat))
    data = jnp.asarray(x.numpy())

    def emissions(x):
        return -(jnp.concatenate([x * x, x], -1) @ weights + constant) / 2

    def step(x):
        def one(log):
            found = hmm_smoother(start, move, log)
            return found.marginal_loglik, found.smoothed_probs, found.trans_probs

        total, states, steps = jax.vmap(one)(emissions(x))
        moments = jnp.einsum("btk,btd->kd", states, jnp.concatenate([x * x, x], -1))
        return total, states.sum((0, 1)), steps.sum(0), moments

    functions = {
        "score": lambda x: jax.vmap(lambda log: hmm_filter(start, move, log).marginal_loglik)(
            emissions(x)
        ),
        "posteriors": lambda x: jax.vmap(lambda log: hmm_smoother(start, move, log).smoothed_probs)(
            emissions(x)
        ),
        "Viterbi": lambda x: jax.vmap(lambda log: hmm_posterior_mode(start, move, log))(
            emissions(x)
        ),
        "EM step": step,
    }
    jitted = {name: jax.jit(function) for name, function in functions.items()}
    return {
        name: (lambda run=run: jax.block_until_ready(run(data))) for name, run in jitted.items()
    }


def of_pomegranate(model: GaussianHMM, x: Tensor) -> dict[str, Callable]:
    """The same in pomegranate; its EM step without the new parameters."""
    from pomegranate.distributions import Normal
    from pomegranate.hmm import DenseHMM

    pairs = zip(model.means.detach(), model.covariances.detach(), strict=True)
    laws = [Normal(mean, variance, covariance_type="diag") for mean, variance in pairs]
    k = model.num_states
    peer = DenseHMM(laws, model.transmat.detach(), model.startprob.detach(), torch.ones(k))
    return {
        "score": lambda: peer.log_probability(x),
        "posteriors": lambda: peer.predict_proba(x),
        "Viterbi": lambda: peer.viterbi(x),
        "EM step": lambda: peer.summarize(x),
    }


PEERS = {"hmmlearn": of_hmmlearn, "dynamax": of_dynamax, "pomegranate": of_pomegranate}


def peers(model: GaussianHMM, x: Tensor) -> dict[str, dict[str, Callable]]:
    """What is installed."""
    found = {}
    for name, make in PEERS.items():
        try:
            found[name] = make(model, x)
        except ImportError as error:
            print(f"left out: {name} ({error})")
    return found


# Measurements ----------------------------------------------------------------------------------


@torch.no_grad()
def end_to_end(rounds: int) -> dict:
    """From features to results: B 32, T 1000, K 5, D 80."""
    model = a_model(5, 80)
    x, _ = model.sample(32, 1000, torch.Generator().manual_seed(1))
    lengths, settings = torch.full((32,), 1000), EM()

    def em_step():
        expected = model.expect(x, lengths)[1]
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model.maximise(x, lengths, expected, settings)
        model.load_state_dict(before)

    def by_loop(function):
        return lambda: function(model.log_emissions(x), model.startprob, model.transmat)

    contenders = {
        "ours": {
            "score": lambda: model.score(x),
            "posteriors": lambda: model.posteriors(x),
            "Viterbi": lambda: model.viterbi(x),
            "EM step": em_step,
        },
        "loop in torch": {
            "score": by_loop(loop_score),
            "posteriors": by_loop(loop_posteriors),
            "Viterbi": by_loop(loop_viterbi),
        },
        **peers(model, x),
    }
    return {
        task: in_turns({name: c[task] for name, c in contenders.items() if task in c}, rounds)
        for task in ("score", "posteriors", "Viterbi", "EM step")
    }


def laws_of(states: int, longest: int) -> Tensor:
    """Gamma-like durations."""
    ages = torch.arange(1, longest + 1).float()
    return (2 * ages.log() - ages / 5).softmax(0).expand(states, -1)


def without_stays(states: int) -> Tensor:
    """Random steps from one segment to another."""
    move = torch.rand(states, states).fill_diagonal_(0)
    return move / move.sum(1, keepdim=True)


def durations(rounds: int) -> dict:
    """Explicit durations, K 5, D 50, log emissions given."""
    result = {}
    for sequences, frames in ((32, 1000), (24, 800)):
        torch.manual_seed(0)
        given = (torch.randn(sequences, frames, 5), torch.full((5,), 0.2), without_stays(5))
        given = (*given, laws_of(5, 50))
        result[f"B {sequences}, T {frames}"] = in_turns(
            {
                "ours": lambda given=given: hsmm.log_likelihood(*given),
                "loop in torch": lambda given=given: loop_durations(*given),
                "ours, posteriors": lambda given=given: hsmm.posteriors(*given),
                "ours, Viterbi": lambda given=given: hsmm.viterbi(*given),
            },
            rounds,
        )
    return result


def one_song(rounds: int) -> dict:
    """One sequence of 24 000 frames, four minutes at 100 a second, K 5."""
    torch.manual_seed(0)
    move = torch.rand(5, 5) + 3 * torch.eye(5)
    move /= move.sum(1, keepdim=True)
    given = (torch.randn(1, 24_000, 5), torch.full((5,), 0.2), move)
    return {
        "posteriors": in_turns(
            {
                "ours": lambda: inference.posteriors(*given),
                "loop in torch": lambda: loop_posteriors(*given),
            },
            min(rounds, 3),
        ),
        "Viterbi": in_turns(
            {
                "ours": lambda: inference.viterbi(*given),
                "loop in torch": lambda: loop_viterbi(*given),
            },
            min(rounds, 3),
        ),
    }


def sizes(rounds: int) -> dict:
    """Log emissions given, T 1000; dynamax beside it where it is installed."""
    result = {}
    for k in (2, 5, 16, 64):
        for b in (1, 32, 256):
            torch.manual_seed(0)
            move = (torch.rand(k, k) + 3 * torch.eye(k)).double()
            move = (move / move.sum(1, keepdim=True)).float()
            emissions = torch.randn(1000, k, b).permute(2, 0, 1)
            given = (emissions, torch.full((k,), 1 / k), move)
            contenders = {
                "score": lambda given=given: inference.log_likelihood(*given),
                "posteriors": lambda given=given: inference.posteriors(*given),
                "Viterbi": lambda given=given: inference.viterbi(*given),
                **dynamax_kernels(*given),
            }
            times = in_turns(contenders, max(1, min(rounds, 5)))
            safe = scaling_is_safe(checked(*given, None)[0])
            result[f"K {k}, B {b}"] = {"engine": "scaled" if safe else "logarithms", **times}
    return result


def dynamax_kernels(emissions: Tensor, start: Tensor, move: Tensor) -> dict[str, Callable]:
    """Jitted recursions of dynamax."""
    try:
        import jax
        import jax.numpy as jnp
        from dynamax.hidden_markov_model import hmm_filter, hmm_posterior_mode, hmm_smoother
    except ImportError:
        return {}
    logs, start, move = (
        jnp.asarray(array.contiguous().numpy()) for array in (emissions, start, move)
    )
    functions = {
        "score": lambda log: hmm_filter(start, move, log).marginal_loglik,
        "posteriors": lambda log: hmm_smoother(start, move, log).smoothed_probs,
        "Viterbi": lambda log: hmm_posterior_mode(start, move, log),
    }
    jitted = {name: jax.jit(jax.vmap(function)) for name, function in functions.items()}
    return {
        f"dynamax, {name}": (lambda run=run: jax.block_until_ready(run(logs)))
        for name, run in jitted.items()
    }


@torch.no_grad()
def guide(rounds: int, device: str = "cpu") -> dict:
    """The guide's five rows and three configurations, on one CPU thread or on a GPU."""
    method = "auto" if device == "cpu" else "tensor"
    small = REHEARSAL and device != "cpu"

    def emissions(b, t, k=5):
        return torch.randn(b, t // (20 if small else 1), k, device=device)

    def run(b, t, function):
        move = torch.rand(5, 5, device=device).softmax(-1)
        given = (emissions(b, t), move[0], move)
        return lambda: function(*given, method=method)

    def run_durations(b, t):
        given = (emissions(b, t).cpu(), torch.full((5,), 0.2), without_stays(5), laws_of(5, 50))
        return lambda: hsmm.log_likelihood(*given)

    mixture = MixtureGaussianHMM(5, 3, 80).to(device)
    x = torch.randn(32, 1000 // (20 if small else 1), 80, device=device)
    runs = {
        "MixtureGaussian": lambda: mixture.viterbi(x, method=method),
        "HSMM": run_durations(32, 1000),
        "streaming": run(16, 500, inference.filter),
        "Neural": run(16, 1000, inference.posteriors),
        "semi-Markov": run_durations(24, 800),
    }
    for k, d, b, t in CONFIGURATIONS:
        model = a_model(k, d).to(device)
        frames = torch.randn(b, t // (20 if small else 1), d, device=device)
        runs[f"K {k}, D {d}, B {b}, T {t}"] = lambda m=model, f=frames: m.viterbi(f, method=method)
    if device != "cpu":
        runs = {name: (lambda r=r: (r(), torch.cuda.synchronize())) for name, r in runs.items()}
    times = in_turns(runs, rounds)
    if device != "cpu":
        for name, one in runs.items():
            torch.cuda.reset_peak_memory_stats()
            one()
            times[name]["peak_bytes"] = torch.cuda.max_memory_allocated()
    return {
        name: {**value, "claim_ms": CLAIMS.get(name, [None])[-1]} for name, value in times.items()
    }


def first_call(rounds: int) -> dict:
    """Seconds of a first score, posterior and path: compiled anew, and read from the cache."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        return {
            name: float(
                subprocess.run(
                    [sys.executable, "-c", FIRST_CALL],
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
            )
            for name in ("compiled", "cached")
        }


MEASUREMENTS = {
    "end to end": end_to_end,
    "durations": durations,
    "one song": one_song,
    "sizes": sizes,
    "guide": guide,
    "first call": first_call,
}


def printed(name: str, result: dict) -> str:
    """A measurement as a table: wall milliseconds, medians."""
    if name == "first call":
        return table(["first call", "s"], [[key, f"{value:.2f}"] for key, value in result.items()])
    if name == "guide":
        rows = [
            [key, f"{value['wall_ms']:.2f}", value.get("claim_ms", "–")]
            for key, value in result.items()
        ]
        return table(["model", "ms", "claim, ms"], rows)
    rows = []
    for key, contenders in result.items():
        times = {n: v["wall_ms"] for n, v in contenders.items() if isinstance(v, dict)}
        rows.append([key, *(f"{contender} {ms:.2f}" for contender, ms in times.items())])
    widest = max(map(len, rows))
    rows = [row + [""] * (widest - len(row)) for row in rows]
    return table([name, *[""] * (widest - 1)], rows)


def main() -> None:
    """Measure, print tables, and keep the result if all was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1 if REHEARSAL else 9)
    parser.add_argument("--only", nargs="*", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    np.random.seed(0)  # noqa: NPY002 - of peers
    if options.device != "cpu":
        result = {"guide": guide(options.rounds, options.device)}
    else:
        result = {name: MEASUREMENTS[name](options.rounds) for name in options.only}
    for name, measured in result.items():
        print(printed(name, measured), end="\n\n", flush=True)
    if options.device != "cpu" or set(options.only) == set(MEASUREMENTS):
        record("hmm", options.device, result)


if __name__ == "__main__":
    main()
