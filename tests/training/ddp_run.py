"""Trainings of several kinds, and two that fail, in as many processes as torchrun starts.

torchrun --nproc-per-node 2 ddp_run.py OUTPUT
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from toy_run import ToySongs, toy_trainer, weights

from tfswa_lab.data.augment import Chain, Gain, Remix, SpectrogramMasking
from tfswa_lab.stft import RunningSpectrogramNormalizer
from tfswa_lab.training.learner import NonFiniteError


def kinds():
    """Arguments of `toy_trainer` for each training."""
    return {
        "group": {"norm": "group"},
        "batch": {"norm": "batch"},
        "whole batch": {
            "augment": Chain([Remix(), Gain((0.5, 2))]),
            "masking": SpectrogramMasking(max_bins=8, max_frames=20),
            "normalizer": RunningSpectrogramNormalizer(1, 17),
        },
    }


def train(kind, folder=None):
    """Two batches a step, so that gradients are exchanged only with the second."""
    settings = {"valid_set": ToySongs(5), "accumulate": 2, "max_epochs": 4, **kinds()[kind]}
    trainer = toy_trainer(folder, **settings)
    trainer.fit()
    return trainer


class Poisoned(ToySongs):
    """Song 3 holds a NaN."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        if index == 3:
            item["mixture"][:, 0] = torch.nan
        return item


def refusal(folder, augment=None):
    """What a process says when one of them meets the poison."""
    try:
        toy_trainer(folder, train_set=Poisoned(), max_epochs=1, augment=augment).fit()
    except NonFiniteError as error:
        return str(error)
    return "nothing"


def main(folder):
    """All of it; trainers are gone when this returns."""
    torch.set_num_threads(1)
    for kind in kinds():
        trainer = train(kind, folder / kind)
        name = f"rank_{trainer.fabric.global_rank}.safetensors"
        save_file(weights(trainer), folder / kind / name, {"sdr": str(trainer.best_sdr)})
    for name, augment in (("poisoned", None), ("remixed", Remix())):
        said = refusal(folder / name, augment)
        (folder / f"{name}_{trainer.fabric.global_rank}.txt").write_text(said)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
