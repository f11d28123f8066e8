"""Train the separator that ships with the package, on the embedded band and nothing else.

    python data_scripts/make_weights.py [--songs 48] [--steps 1500] [--device cuda]

The training songs are a larger band than the embedded one, made for the occasion; the test songs
are the embedded ones. Writes `tfswa_lab/weights/band`: weights, sizes, and the scores that its
card quotes.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer

from tfswa_lab.audio import STEMS
from tfswa_lab.data.augment import Chain, ChannelSwap, Gain, Polarity, Remix
from tfswa_lab.data.band import ensure_band, make_band
from tfswa_lab.data.musdb import MUSDB18Dataset
from tfswa_lab.models.mask_resunet import MaskResUNet
from tfswa_lab.models.separator import Separator, output_channels
from tfswa_lab.models.storage import load_separator, save_separator
from tfswa_lab.stft import LevelNormalizer, STFTProcessor
from tfswa_lab.training.config import TrainingConfig
from tfswa_lab.training.launch import launch
from tfswa_lab.training.losses import SourceSeparationLoss
from tfswa_lab.training.trainer import Trainer
from tfswa_lab.training.validation import validate, validation_loader
from tfswa_lab.weights import BAND

LOSS = SourceSeparationLoss(STEMS, l1_weight=0, mrstft_weight=0, sdr_weight=1)


def build() -> Separator:
    """Four stereo stems at 44.1 kHz, by complex masks; small enough for a CPU."""
    network = MaskResUNet(4, output_channels(STEMS, "complex"), sub_bands=8)
    return Separator(
        network,
        STFTProcessor(n_fft=4096, hop_length=1024),
        STEMS,
        "complex",
        mixture_consistency=True,
        normalizer=LevelNormalizer(),
    )


def train(root: Path, steps: int, device: str) -> Separator:
    """The averaged separator after some steps on the songs in `root`."""
    torch.manual_seed(0)
    songs = MUSDB18Dataset(
        root, "train", segment_seconds=3.0, samples_per_track=8, valid_fraction=0
    )
    config = TrainingConfig(
        max_epochs=None,
        max_steps=steps,
        batch_size=4,
        learning_rate=2e-3,
        warmup_steps=steps // 20,
        ema_decay=0.995,
        precision="bf16-mixed",
        device=device,
    )
    augment = Chain([Remix(), Gain(), ChannelSwap(), Polarity()])
    separator = build().to(memory_format=torch.channels_last)
    trainer = Trainer(separator, LOSS, songs, config=config, augment=augment, progress=True)
    trainer.fit()
    return trainer.ema.module.cpu()


def score() -> dict[str, float]:
    """SDR in dB of the weights as shipped, on the embedded band's test songs."""
    here = launch()
    songs = MUSDB18Dataset(ensure_band(), "test", segment_seconds=None)
    scores = validate(load_separator(BAND), LOSS, validation_loader(songs, 1, 0, here), here)
    return {name: round(score, 2) for name, score in scores.items()}


def main(
    songs: Annotated[int, typer.Option(min=1, max=100, help="Songs to train on.")] = 48,
    steps: Annotated[int, typer.Option(min=1, help="Updates of the weights.")] = 1500,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "cpu",
) -> None:
    """Train, save, and score what was saved."""
    with TemporaryDirectory() as folder:
        # Seeds below 100, as all training songs; one test song, because a band needs both.
        root = make_band(Path(folder) / "band", 20.0, range(songs), range(100, 101))
        started = time.perf_counter()
        save_separator(train(root, steps, device), BAND)
        minutes = (time.perf_counter() - started) / 60
    facts = {"songs": songs, "steps": steps, "minutes": round(minutes, 1), "device": device}
    content = json.dumps(facts | score(), indent=2)
    (BAND / "scores.json").write_text(content + "\n")
    typer.echo(content)


if __name__ == "__main__":
    try:
        typer.run(main)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
