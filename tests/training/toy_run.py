"""A run of a moment: a separator of a few weights on songs made of noise, for tests of the loop.

    python toy_run.py OUTPUT [--norm batch] [--resume] [--workers 2]

trains it and writes the final weights to OUTPUT/final.safetensors.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset

from tfswa_lab.models import storage
from tfswa_lab.models.separator import Separator
from tfswa_lab.stft import STFTProcessor
from tfswa_lab.training.config import TrainingConfig
from tfswa_lab.training.losses import L1WaveformLoss
from tfswa_lab.training.trainer import Trainer

STEMS = ("vocals", "other")
NORMS = {"batch": nn.BatchNorm2d, "group": lambda channels: nn.GroupNorm(2, channels)}


class ToyNet(nn.Module):
    """Two convolutions with a norm between them, and dropout."""

    def __init__(self, norm="group", dropout=0.0, in_channels=1, out_channels=2):
        super().__init__()
        self.sizes = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "norm": norm,
            "dropout": dropout,
        }
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, 4, 3, padding=1),
            NORMS[norm](4),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Conv2d(4, out_channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return self.layers(x)


storage.MODELS["ToyNet"] = ToyNet


class ToySongs(Dataset):
    """Low-passed noise and noise; what an index holds depends on the epoch."""

    def __init__(self, length=20, samples=400):
        self.length, self.samples = length, samples
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch):
        self.epoch.fill_(epoch)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(1000 * self.epoch.item() + index)
        noise = 0.1 * torch.randn(2, 1, self.samples, generator=generator)
        stems = torch.stack([noise[0].cumsum(-1) / 5, noise[1]])
        return {
            "mixture": stems.sum(0),
            "stems": stems,
            "track": f"song {index % 5}",
            "start_seconds": index / 10,
        }


class ToyLoss(nn.Module):
    """L1 on the waveform, with terms as `SourceSeparationLoss` names them."""

    def __init__(self):
        super().__init__()
        self.l1 = L1WaveformLoss()

    def forward(self, estimates, targets):
        values = self.l1(estimates, targets).mean(0)
        terms = dict(zip((f"{stem}/waveform" for stem in STEMS), values.detach(), strict=True))
        return values.mean(), terms


def toy_separator(normalizer=None, **sizes):
    torch.manual_seed(0)
    net, stft = ToyNet(**sizes), STFTProcessor(32, 8)
    return Separator(net, stft, STEMS, audio_channels=1, normalizer=normalizer)


def toy_trainer(output_dir=None, norm="group", dropout=0.0, train_set=None, loss=None, **config):
    """A trainer of the toy; its own keyword arguments aside, those of `TrainingConfig`."""
    augment = config.pop("augment", None)
    masking = config.pop("masking", None)
    valid_set = config.pop("valid_set", None)
    normalizer = config.pop("normalizer", None)
    usual = {"batch_size": 4, "warmup_steps": 2, "ema_decay": 0.9, "learning_rate": 1e-2}
    return Trainer(
        toy_separator(normalizer, norm=norm, dropout=dropout),
        loss or ToyLoss(),
        train_set or ToySongs(),
        valid_set,
        TrainingConfig(**{"max_epochs": 2, **usual, **config}),
        output_dir,
        augment,
        masking,
    )


def weights(trainer):
    """Everything that was learnt, by name, in copies."""
    parts = {"model": trainer.separator, "ema": trainer.ema}
    return {
        f"{part}.{name}": tensor.clone()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--norm", default="group")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--checkpoint-every", type=int)
    options = parser.parse_args()
    trainer = toy_trainer(
        options.output,
        options.norm,
        options.dropout,
        ToySongs(60),
        valid_set=ToySongs(4),
        accumulate=options.accumulate,
        max_epochs=options.epochs,
        num_workers=options.workers,
        checkpoint_every_n_steps=options.checkpoint_every,
    )
    trainer.fit(options.output if options.resume else None)
    if trainer.fabric.is_global_zero:
        save_file(weights(trainer), options.output / "final.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
