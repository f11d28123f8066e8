"""Two trainings, one per kind of norm, in as many processes as torchrun starts.

torchrun --nproc-per-node 2 ddp_run.py OUTPUT
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from toy_run import NORMS, ToySongs, toy_trainer, weights


def train(norm, folder=None):
    """Two batches a step, so that gradients are exchanged only with the second."""
    trainer = toy_trainer(folder, norm, valid_set=ToySongs(5), accumulate=2, max_epochs=4)
    trainer.fit()
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    for norm in NORMS:
        folder = Path(sys.argv[1]) / norm
        trainer = train(norm, folder)
        name = f"rank_{trainer.fabric.global_rank}.safetensors"
        save_file(weights(trainer), folder / name, {"sdr": str(trainer.best_sdr)})
