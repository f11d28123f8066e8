"""How well the averaged weights separate songs that are not trained on.

Axis letters: `b` batch, `n` stems, `c` channels, `s` samples.

Notebook: 07_training
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tfswa_lab.memory.out_of_memory import retreat
from tfswa_lab.training.launch import gathered
from tfswa_lab.training.learner import NonFiniteError, describe_batch


def validation_loader(
    dataset: Dataset, batch_size: int, workers: int, fabric: Fabric
) -> DataLoader:
    """This process's share of a validation set, in order."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=range(fabric.global_rank, len(dataset), fabric.world_size),
        collate_fn=getattr(dataset, "collate_fn", None),
        num_workers=workers,
        generator=torch.Generator(),  # of its own: validation draws nothing from torch's
    )


@torch.no_grad()
def validate(
    separator: nn.Module, loss: nn.Module, loader: Iterable[dict], fabric: Fabric
) -> dict[str, float]:
    """Loss, SDR of each stem, and the score of the unprocessed mixture.

    Where memory runs out, fewer items of a batch are separated at once.

    Args:
        separator: in evaluation mode, with `stems`.
        loss: maps estimates and targets to a scalar and its terms.
        loader: batches; all processes together see the whole set.
        fabric: device, precision and processes.

    Returns:
        `"loss"`; `"sdr"`, the mean over the stems; `"sdr/vocals"`, …; `"floor"`, `"floor/vocals"`,
        …, the SDR of the mixture taken as the estimate. The same in all processes.

    Raises:
        NonFiniteError: a loss is infinite or NaN; names the songs.
    """
    total, items, powers, broken = 0.0, 0, {}, []
    at_once = math.inf
    for batch in loader:
        batch = fabric.to_device(batch)
        mixture, stems = batch["mixture"], batch["stems"]
        with fabric.autocast():
            in_parts = partial(estimates_of, separator, mixture)
            estimates, size = retreat(in_parts, min(at_once, len(mixture)))
        if size < len(mixture):
            at_once = size
        estimates = estimates.to(stems.dtype)
        value = loss(estimates, stems)[0].item()
        if not math.isfinite(value):
            broken.append(describe_batch(batch))
        total += value * len(mixture)
        items += len(mixture)
        errors = (stems, stems - estimates, stems - mixture[:, None])
        add_powers(powers, batch["track"], torch.stack([energy(x) for x in errors], 1))
    parts = gathered(fabric, (total, items, powers, broken))
    broken = [songs for part in parts for songs in part[3]]
    if broken:
        raise NonFiniteError("a loss in validation is infinite or NaN", broken, [])
    scores = {"loss": sum(part[0] for part in parts) / sum(part[1] for part in parts)}
    return scores | mean_sdr([part[2] for part in parts], separator.stems)


def estimates_of(separator: nn.Module, mixture: Tensor, size: int) -> Tensor:
    """Estimates `(b, n, c, s)` of mixtures `(b, c, s)`, `size` at once."""
    return torch.cat([separator(part) for part in mixture.split(size)])


def energy(waveform: Tensor) -> Tensor:
    """Sum of squares `(b, n)` of `(b, n, c, s)`, in float64."""
    return waveform.double().square().sum((2, 3))


def add_powers(powers: dict[str, Tensor], tracks: Sequence[str], batch: Tensor) -> None:
    """Add `(b, 3, n)`, energies of target, error and mixture's error, to each track's sum."""
    for track, item in zip(tracks, batch.cpu(), strict=True):
        powers[track] = powers.get(track, 0) + item


def mean_sdr(parts: Sequence[Mapping[str, Tensor]], stems: Sequence[str]) -> dict[str, float]:
    """SDR in dB, 10 log₁₀ of the ratio of two sums over a whole track, then its mean over tracks.

    A stem that is silent throughout a track has no SDR there and is left out of the mean; one that
    is silent in all tracks has NaN and is left out of the mean over the stems.

    Source: Mitsufuji et al., "Music demixing challenge 2021", Frontiers in Signal Processing 2022,
    eq. 1.
    """
    tracks = defaultdict(int)
    for part in parts:
        for track, item in part.items():
            tracks[track] = tracks[track] + item
    target, error, floor = torch.stack(list(tracks.values())).unbind(1)  # (tracks, n) each
    silent = target == 0
    scores = {}
    for name, rest in (("sdr", error), ("floor", floor)):
        db = (10 * (target / rest).log10()).masked_fill(silent, torch.nan).nanmean(0)
        scores[name] = db.nanmean().item()
        scores |= {f"{name}/{stem}": x for stem, x in zip(stems, db.tolist(), strict=True)}
    return scores
