"""Five published "leaks" of a TF-Locoformer: what their fixes save, and what really saves.

    python benchmarks/claims.py [--device cuda]

The patient of lesson 06, one step of 10 s of stereo, predicted for a GPU; on a GPU, started by
gpu.py, the same steps are measured where they fit. "On its own" is without the network: the most
that a line can ever save. Savings are counted in bytes of tensors, because what the
allocator adds to them varies by a MiB.
"""

from __future__ import annotations

import argparse
import json
from functools import partial

import torch
from events import REHEARSAL, attempt
from record import path_of, record, table
from torchaudio.transforms import Resample

from tfswa_lab.device import pick_device
from tfswa_lab.memory import gauges
from tfswa_lab.memory.predict import predict
from tfswa_lab.memory.predict.allocator import replay
from tfswa_lab.memory.sizes import GIB, MIB
from tfswa_lab.teaching import claims

MODES = {"training": True, "inference": False}
CURES = {
    "fused attention": {},
    "and checkpoint each path": {"activation_checkpointing": "path"},
    "and crop to 5 s": {"seconds": 5.0},
    "and bfloat16": {"half": True},
}
ROOM = 0.95  # of the free memory of a GPU; a step that is predicted to take more is not tried
TINY = {"seconds": 0.2, "n_fft": 256, "dim": 16, "hidden_dim": 16, "num_heads": 2}
TINY |= {"attention_dim": 16}


def peak(attention="auto", **choices) -> int:
    """Predicted bytes, as the allocator counts."""
    return predict(partial(claims.make_step, **choices), attention, steps=1).peak


def of_tensors(make=claims.make_step, **choices) -> int:
    """Predicted bytes of all tensors at the peak."""
    return predict(partial(make, **choices), steps=1).timeline.peak().allocated


def on_gpu() -> None:
    """A line for each claim, in both modes, and for each cure; predictions are the committed ones.

    A claim changes almost nothing, so the prediction for the published step stands for all.
    """
    known = json.loads(path_of("claims", "cpu").read_text())["cures"]
    predicted = {row["cure"]: row["predicted"] for row in known}
    whole = {True: predicted["fused attention"], False: peak(training=False)}
    claims.make_step(device="cuda", **TINY)()  # else cuBLAS's workspaces would count for the first
    for claim, change in ({"as published": {}} | claims.FIXED).items():
        for mode, training in MODES.items():
            step = partial(measured, whole[training], training=training, **change)
            attempt("claim", step, claim=claim, mode=mode)
    choices = {}
    for cure, change in CURES.items():
        choices |= change
        attempt("claim", partial(measured, predicted[cure], **choices), claim=cure, mode="cure")


def measured(predicted: int, **choices) -> dict:
    """Predicted and measured bytes; a step that does not fit is not measured."""
    free = gauges.device_memory().free
    if predicted > ROOM * free:
        return {"predicted": predicted, "does_not_fit": f"{free} bytes are free"}
    torch.cuda.empty_cache()
    choices |= TINY if REHEARSAL else {}
    make = partial(claims.make_step, device="cuda", **choices)
    return {"predicted": predicted, "measured": claims.measured(make)}


def trial() -> list[dict]:
    """Claims 1 to 3, in a whole step and on their own."""
    rows = []
    for claim, change in claims.FIXED.items():
        alone = claims.make_attention if "attend" in change else claims.make_alone
        for mode, training in MODES.items():
            both = {}, change
            whole = [of_tensors(training=training, **each) for each in both]
            most = [of_tensors(alone, training=training, **each) for each in both]
            row = {"claim": claim, "mode": mode, "claimed_gb": claims.CLAIMED_GB[claim]}
            row |= {"saved": whole[0] - whole[1], "on_its_own": most[0] - most[1]}
            rows.append(row)
    return rows


def emptied() -> list[dict]:
    """Claim 5, on the simulated allocator."""
    rows = []
    for mode, training in MODES.items():
        make = partial(claims.make_step, training=training, num_blocks=4)
        history = predict(make, steps=1).timeline
        starts = [event - 1 for event in claims.block_starts(history)]
        never, often = replay(history), replay(history, empty_cache_after=starts[2::2])
        row = {"claim": "5 empty_cache", "mode": mode, "claimed_gb": 10}
        row["saved"] = never.peak_allocated[0] - often.peak_allocated[0]
        row["saved_reserved"] = never.peak_reserved[0] - often.peak_reserved[0]
        rows.append(row)
    return rows


def cures() -> list[dict]:
    """The peak of a training step, one cure on top of the other."""
    rows, choices = [{"cure": "none: the math kernel", "predicted": peak(attention="math")}], {}
    for cure, change in CURES.items():
        choices |= change
        rows.append({"cure": cure, "predicted": peak(**choices)})
    return rows


def main() -> None:
    """Try, record, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    if pick_device(parser.parse_args().device).type == "cuda":
        return on_gpu()
    found = {"trial": trial() + emptied(), "cures": cures()}
    found["resample_filter"] = Resample(48_000, 44_100).kernel.nbytes
    record("claims", "cpu", found)
    lines = []
    for row in found["trial"]:
        own = f"{row['on_its_own'] / MIB:.2f}" if "on_its_own" in row else ""
        saved = f"{row['saved'] / MIB:.2f}"
        lines.append((row["claim"], row["mode"], f"{row['claimed_gb']} GB", saved, own))
    print(table(["claim", "mode", "claimed", "saved, MiB", "on its own, MiB"], lines))
    peaks = [(row["cure"], f"{row['predicted'] / GIB:.2f} GiB") for row in found["cures"]]
    print("\n" + table(["cure", "peak"], peaks))


if __name__ == "__main__":
    main()
