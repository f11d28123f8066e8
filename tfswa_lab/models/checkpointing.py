"""Activation checkpointing that leaves batch statistics alone.

Notebook: 03_tfswa_unet
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms inside `module` normalise as usual but do not move their running statistics.

    A momentum of zero rather than no statistics at all: checkpointing demands that the second run
    saves the same tensors as the first.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


def checkpointed(module: nn.Module, *inputs: Tensor | None) -> Tensor:
    """Run `module` keeping only its inputs; the backward pass computes the rest again.

    Plain checkpointing runs the forward pass twice and so counts every batch twice in the running
    statistics of batch norms; here the second run leaves them alone. Gradients are the same.

    Source: Chen et al., "Training deep nets with sublinear memory cost", 2016.
    """
    return checkpoint(
        module,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), frozen_statistics(module)),
    )
