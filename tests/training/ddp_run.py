"""Two trainings, one per kind of norm, and one that fails, in as many processes as torchrun starts.

torchrun --nproc-per-node 2 ddp_run.py OUTPUT
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from toy_run import NORMS, ToySongs, toy_trainer, weights

from tfswa_lab.training.learner import NonFiniteError


def train(norm, folder=None):
    """Two batches a step, so that gradients are exchanged only with the second."""
    trainer = toy_trainer(folder, norm, valid_set=ToySongs(5), accumulate=2, max_epochs=4)
    trainer.fit()
    return trainer


class Poisoned(ToySongs):
    """Song 3 holds a NaN."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        if index == 3:
            item["mixture"][:, 0] = torch.nan
        return item


def refusal(folder):
    """What a process says when one of them meets the poison."""
    try:
        toy_trainer(folder, train_set=Poisoned(), max_epochs=1).fit()
    except NonFiniteError as error:
        return str(error)
    return "nothing"


def main(folder):
    """All of it; trainers are gone when this returns."""
    torch.set_num_threads(1)
    for norm in NORMS:
        trainer = train(norm, folder / norm)
        name = f"rank_{trainer.fabric.global_rank}.safetensors"
        save_file(weights(trainer), folder / norm / name, {"sdr": str(trainer.best_sdr)})
    said = refusal(folder / "poisoned")
    (folder / f"rank_{trainer.fabric.global_rank}.txt").write_text(said)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
