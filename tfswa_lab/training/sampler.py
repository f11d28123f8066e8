"""Which segments make up which batch: an order that depends on seed and epoch alone.

Notebook: 07_training
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from tfswa_lab.training.config import TrainingConfig
from tfswa_lab.training.randomness import generator_for


class ShuffledBatches(Sampler[list[int]]):
    """Batches of indices of a shuffled epoch, of which each process takes its share.

    The batches together are the same for any number of processes, so a run can go on with another
    number of devices, and `start_at` continues an epoch where it was left: no index comes twice,
    none is skipped. Indices that do not fill a last step are left out of the epoch.

    Args:
        length: size of the data set.
        config: its `batch_size`, `accumulate` and `seed` count.
        rank: which process this is.
        processes: how many there are.

    Raises:
        ValueError: the data set is smaller than a step, or processes cannot share a batch evenly.

    >>> [len(batch) for batch in ShuffledBatches(10, TrainingConfig(batch_size=4))]
    [4, 4]
    >>> [len(batch) for batch in ShuffledBatches(10, TrainingConfig(batch_size=4), 1, processes=2)]
    [2, 2]
    """

    def __init__(self, length: int, config: TrainingConfig, rank: int = 0, processes: int = 1):
        self.batches = config.steps_per_epoch(length) * config.accumulate
        if config.batch_size % processes:
            raise ValueError(
                f"batch_size={config.batch_size} cannot be shared by {processes} devices"
            )
        self.length, self.config = length, config
        self.rank, self.processes = rank, processes
        self.start_at(0, 0)

    def start_at(self, epoch: int, batch: int) -> None:
        """Choose the epoch and the first batch of the next iteration."""
        self.epoch = epoch
        self.first = batch

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = generator_for(self.config.seed, self.epoch)
        batches = torch.randperm(self.length, generator=generator).split(self.config.batch_size)
        for batch in batches[self.first : self.batches]:
            yield batch[self.rank :: self.processes].tolist()


class TrainingLoader:
    """Batches of a training set from any point of any epoch on.

    If the data set has `set_epoch`, it is called first. A resumed run repeats items only if they
    depend on epoch and index alone, as those of `MUSDB18Dataset` do. The workers live as
    long as the loader: the epoch must lie in shared memory (`tensor.share_memory_()`), or they
    keep the first one.

    Args:
        dataset: maps indices to items.
        batches: which items go together.
        num_workers: processes that read ahead, 0 to read when asked.
        pin_memory: prepare batches for a fast copy to a GPU.
    """

    def __init__(
        self, dataset: Dataset, batches: ShuffledBatches, num_workers: int, pin_memory: bool
    ):
        self.dataset = dataset
        self.batches = batches
        self.loader = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=getattr(dataset, "collate_fn", None),
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            # Its own: each pass draws from it, and draws from torch's would change a resumed run.
            generator=torch.Generator(),
        )

    def epoch(self, epoch: int, first_batch: int) -> Iterator[dict]:
        """The batches of an epoch, from one of them on."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        self.batches.start_at(epoch, first_batch)
        yield from self.loader
