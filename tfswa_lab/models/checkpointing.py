"""Activation checkpointing that does not count batch statistics twice.

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

    The momentum becomes 0; switching the statistics off would save other tensors than the first
    run, which checkpointing forbids.
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

    Plain checkpointing runs the forward pass twice, so every batch counts twice in the running
    statistics of batch norms; here the second run does not change them. Gradients are the same.

    Source: Chen et al., "Training deep nets with sublinear memory cost", 2016.
    """
    return checkpoint(
        module,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), frozen_statistics(module)),
    )
