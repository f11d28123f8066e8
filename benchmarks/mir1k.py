"""How well does a small network separate unseen singers? MIR-1K, as papers use it.

    python benchmarks/mir1k.py ROOT                   train on abjones and amy, test on the others
    python benchmarks/mir1k.py ROOT --ablate          the effect of each choice, on held-out songs
    python benchmarks/mir1k.py ROOT --test            score the committed weights again
    python benchmarks/mir1k.py ROOT --out DIR --device cuda    train into a folder, test nothing
    python benchmarks/mir1k.py ROOT --out DIR --test           and score these weights at home

ROOT is the folder of MIR-1K. With `--out`, the average's weights are written every minute, and when
the training is asked to end (SIGTERM), beside a JSON of what it took.

Scores are BSSEval v3 (mir_eval): voice, one channel, weighted by the
length of the clips; GNSDR is the mean gain in SDR over the mixture. All test clips in ROOT are
scored, and their singers are listed: the papers have 825. The recipe was chosen on songs held out
of the training clips (`--ablate`); the test clips are read by the last step only.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from events import REHEARSAL
from joblib import Parallel, delayed
from mir1k_data import HELD_OUT, Duets, is_held_out, read_clips
from record import RESULTS, machine, path_of, record, table
from torch import Tensor

from tfswa_lab.data.mir1k import RATE
from tfswa_lab.device import pick_device
from tfswa_lab.durable import write_whole
from tfswa_lab.models.mask_resunet import MaskResUNet
from tfswa_lab.models.separator import Separator, output_channels
from tfswa_lab.models.storage import load_separator, save_separator
from tfswa_lab.stft import LevelNormalizer, SpectrogramNormalizer, STFTProcessor
from tfswa_lab.training.config import TrainingConfig
from tfswa_lab.training.losses import SourceSeparationLoss
from tfswa_lab.training.trainer import Trainer

BY_HAND = True
WEIGHTS = RESULTS / "mir1k"
KEPT_EVERY = 2 if REHEARSAL else 60  # seconds
FACTS = "training.json"
RECIPE = {
    "n_fft": 2048,
    "hop_length": 512,
    "bins": 512,
    "normalizer": LevelNormalizer,
    "mask": "complex",
    "sizes": {"channels": (24, 32, 48, 64), "bottleneck": 80},
    "loss": {"sdr_weight": 1.0},
    "speeds": (0.8, 0.87, 0.93, 1.0, 1.07, 1.15, 1.25),
    "remix": 0.5,
    "gain_db": 4.0,
    "batch_size": 8,
    "learning_rate": 2e-3,
    "seed": 0,
}
if REHEARSAL:
    RECIPE |= {"batch_size": 1}
# Changes of the recipe, one at a time, which show the effect of each choice.
ABLATIONS = {
    "the recipe": {},
    "the recipe, seed 1": {"seed": 1},
    "the recipe, seed 2": {"seed": 2},
    "wider network": {"sizes": {"channels": (32, 48, 64, 80), "bottleneck": 96}},
    "learning rate 5e-3": {"learning_rate": 5e-3},
    "each bin normalised": {"normalizer": SpectrogramNormalizer},
    "one speed": {"speeds": (1.0,)},
    "waveform L1": {"loss": {"waveform_weight": 25.0}},
    "magnitude mask": {"mask": "magnitude"},
    "no attention": {"sizes": {**RECIPE["sizes"], "num_tfswa": 0}},
    "window 1024, hop 256": {"n_fft": 1024, "hop_length": 256, "bins": 256},
    "no remix": {"remix": 0.0},
    "always remixed": {"remix": 1.0},
    "spectral L1 and multi-resolution": {"loss": {"l1_weight": 1.0, "mrstft_weight": 1.0}},
    "all bins": {"bins": None},
    "window 4096, hop 1024": {"n_fft": 4096, "hop_length": 1024, "bins": 1024},
}
TEST_CLIPS = 825  # of MIR-1K's thousand: those of these singers
TEST_SINGERS = ("Ani", "Kenshin", "annar", "ariel", "bobon", "bug", "davidson", "fdps")
TEST_SINGERS += ("geniusturtle", "heycat", "jmzen", "khair", "leon", "stool", "tammy", "titon")
TEST_SINGERS += ("yifen",)
PUBLISHED = {  # arXiv 1805.08559, Table 1: GNSDR, GSIR, GSAR in dB
    "DRNN (2014)": (7.45, 13.08, 9.68),
    "U-Net (2017)": (7.43, 11.79, 10.42),
    "stacked hourglass, 4 stacks (2018)": (10.51, 16.01, 12.53),
}


def build(recipe: dict) -> Separator:
    """One voice out of a mono mixture, with random weights."""
    stems = ("voice",)
    network = MaskResUNet(2, output_channels(stems, recipe["mask"], 1), **recipe["sizes"])
    return Separator(
        network,
        STFTProcessor(recipe["n_fft"], recipe["hop_length"]),
        stems,
        recipe["mask"],
        sample_rate=RATE,
        audio_channels=1,
        bins=recipe["bins"],
        normalizer=recipe["normalizer"](),
    )


def keep_from_time_to_time(trainer: Trainer, keep: Callable[[], None]) -> list[float]:
    """Have a trainer call `keep` between steps; returns when each step began, as it goes on."""
    step, begun, kept_at = trainer.learner.step, [], time.monotonic()

    def watched(batches: list[dict]) -> dict[str, float]:
        nonlocal kept_at
        begun.append(time.monotonic())
        if begun[-1] - kept_at >= KEPT_EVERY:
            keep()
            kept_at = begun[-1]
        return step(batches)

    trainer.learner.step = watched
    return begun


def train(
    clips: dict[str, Tensor], recipe: dict, steps: int, device: str, out: Path | None = None
) -> tuple[Separator, dict]:
    """The averaged separator after some steps, and what they took; kept in `out` meanwhile."""
    torch.manual_seed(recipe["seed"])
    separator = build(recipe)
    # The layout in which convolutions are fastest, on a CPU and on a GPU.
    separator = separator.to(memory_format=torch.channels_last)
    data = Duets(
        clips,
        recipe["speeds"],
        recipe["remix"],
        recipe["gain_db"],
        seconds=3.0,
        length=100 * recipe["batch_size"],
        seed=recipe["seed"],
    )
    config = TrainingConfig(
        max_epochs=None,
        max_steps=steps,
        batch_size=recipe["batch_size"],
        learning_rate=recipe["learning_rate"],
        warmup_steps=steps // 20,
        ema_decay=0.995,
        precision="bf16-mixed",
        device=device,
        seed=recipe["seed"],
    )
    weights = {"l1_weight": 0.0, "mrstft_weight": 0.0, **recipe["loss"]}
    loss = SourceSeparationLoss(separator.stems, **weights)

    trainer = Trainer(separator, loss, data, config=config, progress=True)

    def facts() -> dict:
        # The median step: pauses in which other programs run do not count.
        step_seconds = float(np.median(np.diff([*begun, time.monotonic()])))
        return {
            "steps": trainer.step,
            "minutes": round(trainer.step * step_seconds / 60, 2),
            "threads": torch.get_num_threads(),
            "seconds_of_audio_per_second": round(recipe["batch_size"] * 3 / step_seconds, 1),
            "parameters": sum(p.numel() for p in separator.parameters()),
        }

    def keep() -> None:
        if out:
            save_separator(trainer.ema.module, out)
            about = {"recipe": described(recipe), "machine": machine(), **facts()}
            write_whole({out / FACTS: [json.dumps(about, indent=2).encode()]})

    begun = keep_from_time_to_time(trainer, keep)
    trainer.fit()
    keep()
    return trainer.ema.module, facts()


@torch.inference_mode()
def score(separator: Separator, clips: dict[str, Tensor]) -> list[dict]:
    """Seconds, SDR of the mixture, and SDR, SIR and SAR of the estimated voice, for each clip."""
    jobs = []
    for name, clip in clips.items():
        accompaniment, voice = clip
        mixture = clip.sum(0)
        estimate = separator(mixture[None, None])[0, 0, 0]
        jobs.append((name, voice, accompaniment, mixture, estimate))
    arrays = [(name, *(x.double().numpy() for x in tensors)) for name, *tensors in jobs]
    return Parallel(n_jobs=-1)(delayed(score_clip)(*each) for each in arrays)


def score_clip(name: str, voice, accompaniment, mixture, estimate) -> dict:
    """BSSEval v3 of one clip; everything but the voice counts as accompaniment."""
    references = np.stack([voice, accompaniment])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # mir_eval will drop this module
        floor, _, _ = _bss_eval(references, np.stack([mixture, mixture]))
        sdr, sir, sar = _bss_eval(references, np.stack([estimate, mixture - estimate]))
    seconds = len(voice) / RATE
    return {"clip": name, "seconds": seconds, "floor": floor, "sdr": sdr, "sir": sir, "sar": sar}


def _bss_eval(references: np.ndarray, estimates: np.ndarray) -> list[float]:
    """SDR, SIR and SAR of the first source."""
    import mir_eval  # the training needs none of it

    measures = mir_eval.separation.bss_eval_sources(
        references, estimates, compute_permutation=False
    )
    return [float(measure[0]) for measure in measures[:3]]


def summary(rows: list[dict]) -> dict:
    """GNSDR, GSIR and GSAR in dB, weighted by length."""
    weights = [row["seconds"] for row in rows]

    def mean(values: list[float]) -> float:
        return round(float(np.average(values, weights=weights)), 3)

    return {
        "clips": len(rows),
        "gnsdr": mean([row["sdr"] - row["floor"] for row in rows]),
        "gsir": mean([row["sir"] for row in rows]),
        "gsar": mean([row["sar"] for row in rows]),
        "floor_sdr": mean([row["floor"] for row in rows]),
    }


def by_singer(rows: list[dict]) -> dict[str, float]:
    """GNSDR of each singer."""
    singers = sorted({row["clip"].split("_")[0] for row in rows})
    return {
        singer: summary([row for row in rows if row["clip"].split("_")[0] == singer])["gnsdr"]
        for singer in singers
    }


def clips_by_singer(rows: list[dict]) -> dict[str, int]:
    """How many clips of each test singer were scored; 0 for those that are not there.

    >>> clips_by_singer([{"clip": "titon_1_01"}, {"clip": "titon_2_04"}])["titon"]
    2
    """
    found = Counter(row["clip"].split("_")[0] for row in rows)
    return dict.fromkeys(TEST_SINGERS, 0) | found


def report(separator: Separator, root: str) -> dict:
    """Scores on the test clips that are there, beside the published rows."""
    rows = score(separator, read_clips(root, "test"))
    scores, singers = summary(rows) | {"clips_of_papers": TEST_CLIPS}, clips_by_singer(rows)
    print(f"{len(rows)} of the {TEST_CLIPS} test clips are in {root}:")
    print(", ".join(f"{singer} {count}" for singer, count in singers.items()))
    ours = ("ours", *(f"{scores[name]:.2f}" for name in ("gnsdr", "gsir", "gsar")))
    systems = [*((name, *row) for name, row in PUBLISHED.items()), ours]
    print(table(["system", "GNSDR", "GSIR", "GSAR"], systems))
    return {
        "test": scores,
        "test_clips_by_singer": singers,
        "test_gnsdr_by_singer": by_singer(rows),
        "published": PUBLISHED,
    }


def ablate(root: str, names: list[str], steps: int, device: str) -> None:
    """Train with one choice changed at a time, and score on songs held out of the training."""
    clips = read_clips(root, "train")
    kept = {name: clip for name, clip in clips.items() if not is_held_out(name)}
    held_out = {name: clip for name, clip in clips.items() if is_held_out(name)}
    same = {"recipe": described(RECIPE), "held_out": HELD_OUT, "steps": steps, "device": device}
    rows = rows_so_far(same)
    for name in names or ABLATIONS:
        separator, facts = train(kept, RECIPE | ABLATIONS[name], steps, device)
        rows[name] = {**summary(score(separator.cpu(), held_out)), **facts}
        rows[name]["changed"] = described(ABLATIONS[name])
        print(f"{name}: {rows[name]['gnsdr']:.2f} dB, {facts['minutes']:.1f} min", flush=True)
        record("mir1k-ablation", device, {**same, "rows": rows})  # even if cut short


def rows_so_far(same: dict) -> dict:
    """Earlier rows with the same conditions; other conditions start a new table."""
    path = path_of("mir1k-ablation", same["device"])
    before = json.loads(path.read_text()) if path.exists() else {}
    same = json.loads(json.dumps(same))  # tuples become lists
    return before["rows"] if before.items() >= same.items() else {}


def main() -> None:
    """Train and test, or follow the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root")
    parser.add_argument("--steps", type=int, default=4400)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ablate", nargs="*", metavar="NAME", help="all, or those named")
    parser.add_argument("--test", action="store_true", help="score weights again")
    parser.add_argument("--out", type=Path, help="folder of the weights, in place of the committed")
    asked = parser.parse_args()
    device = str(pick_device(asked.device))
    if asked.ablate is not None:
        return ablate(asked.root, asked.ablate, asked.steps, device)
    if asked.test:
        return test(asked.out or WEIGHTS, asked.root)
    clips = read_clips(asked.root, "train")
    separator, facts = train(clips, RECIPE, asked.steps, device, asked.out)
    if asked.out is None:
        save_separator(separator.cpu(), WEIGHTS)
        result = facts | report(load_separator(WEIGHTS), asked.root)
        record("mir1k", device, {"recipe": described(RECIPE), **result})


def test(weights: Path, root: str) -> None:
    """Score weights; those trained on a GPU are recorded with the facts of their training."""
    result = report(load_separator(weights), root)
    print(result["test"])
    if (weights / FACTS).exists():
        facts = json.loads((weights / FACTS).read_text())
        record("mir1k", "cuda", {"trained_on": facts.pop("machine"), **facts, **result})


def described(recipe: dict) -> dict:
    """The recipe, or a part of it, in JSON's types."""
    return {name: getattr(value, "__name__", value) for name, value in recipe.items()}


if __name__ == "__main__":
    main()
