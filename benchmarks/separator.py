"""How fast does the small separator run, and which block takes the time?

    python benchmarks/separator.py

One process, evaluation mode, float32, a segment of three seconds. The peer is the
same network with the attention scores written out (`ScaledDotProductAttention`) in place of
torch's fused kernel, in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from contextlib import contextmanager
from unittest import mock

import torch
from record import record

from tfswa_lab.models.attention import (
    FrequencySequenceAttention,
    ScaledDotProductAttention,
    ShiftedWindowAttention,
    TemporalSequenceAttention,
)
from tfswa_lab.models.separator import Separator, build_separator
from tfswa_lab.models.tfswa_unet import SMALL

STEMS = ("vocals", "drums", "bass", "other")
SECONDS = 3.0
REPEATS = 5
KINDS = {
    TemporalSequenceAttention: "TSA",
    FrequencySequenceAttention: "FSA",
    ShiftedWindowAttention: "SWA",
}


def timed(separator: Separator, mixture: torch.Tensor) -> float:
    """Median seconds of a separation, after one warm-up."""
    separator(mixture)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        separator(mixture)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@contextmanager
def written_out_attention():
    """Replace the fused kernel by the formula."""

    def formula(query, key, value, attn_mask=None):
        return ScaledDotProductAttention()(query, key, value, attn_mask)[0]

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", formula):
        yield


def seconds_inside(separator: Separator, modules: dict, mixture: torch.Tensor) -> dict[str, float]:
    """Seconds spent inside each named module during one separation."""
    spent, handles = defaultdict(float), []

    def before(module, inputs):
        module.started = time.perf_counter()

    for module, name in modules.items():

        def after(module, inputs, output, name=name):
            spent[name] += time.perf_counter() - module.started

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    start = time.perf_counter()
    separator(mixture)
    spent["all"] = time.perf_counter() - start
    for handle in handles:
        handle.remove()
    return spent


def shares(separator: Separator, modules: dict, mixture: torch.Tensor) -> dict[str, float]:
    """Share of the whole that each name takes, and the rest; median over the repeats."""
    runs = [seconds_inside(separator, modules, mixture) for _ in range(REPEATS)]
    names = dict.fromkeys(modules.values())
    found = {name: statistics.median(run[name] / run["all"] for run in runs) for name in names}
    return {name: round(share, 3) for name, share in found.items()} | {
        "rest": round(1 - sum(found.values()), 3)
    }


def by_stage(separator: Separator) -> dict:
    """The network's stages, in the order of the signal."""
    model = separator.model
    named = {model.stem: "stem"}
    named |= {block: f"encoder {i}" for i in range(3) for block in model.encoder[i]}
    named |= dict.fromkeys(model.bottleneck, "bottleneck")
    named |= {block: f"decoder {2 - i}" for i in range(3) for block in model.decoder[i]}
    return named | {model.head: "head"}


def by_kind(separator: Separator) -> dict:
    """The three attentions, wherever they stand."""
    return {m: KINDS[type(m)] for m in separator.modules() if type(m) in KINDS}


@torch.inference_mode()
def main() -> None:
    """Measure, record, print."""
    torch.manual_seed(0)
    separator = build_separator(STEMS, **SMALL).eval()
    mixture = 0.1 * torch.randn(1, 2, round(SECONDS * separator.sample_rate))
    fused = timed(separator, mixture)
    with written_out_attention():
        written_out = timed(separator, mixture)
    result = {
        "parameters": separator.model.get_num_parameters(),
        "sizes": separator.model.sizes,
        "segment_seconds": SECONDS,
        "real_time_factor": round(fused / SECONDS, 3),
        "real_time_factor_written_out_attention": round(written_out / SECONDS, 3),
        "share_by_stage": shares(separator, by_stage(separator), mixture),
        "share_by_kind": shares(separator, by_kind(separator), mixture),
    }
    record("separator", result)
    print(f"| attention | real-time factor |\n|---|---|\n| fused | {fused / SECONDS:.2f} |")
    print(f"| written out | {written_out / SECONDS:.2f} |\n\n| part | share |\n|---|---|")
    for name, share in (result["share_by_stage"] | result["share_by_kind"]).items():
        print(f"| {name} | {share:.1%} |")


if __name__ == "__main__":
    main()
