"""Devices, processes and precision: everything that a run asks of Lightning Fabric.

Notebook: 07_training
"""

from __future__ import annotations

import atexit
import gc
import math
import os
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision, Precision
from torch import Tensor, nn

from tfswa_lab.device import pick_device
from tfswa_lab.stft import RunningSpectrogramNormalizer


class Autocast(MixedPrecision):
    """Mixed precision inside the network; the waveforms that enter it stay float32.

    Fabric would round them as well, which is right for images and wrong here: with its 8 bits,
    bfloat16 adds noise only 56 dB below the music before the first layer has seen it.
    """

    def convert_input(self, data: Any) -> Any:
        """The batch, unchanged."""
        return data


def launch(device: str = "cpu", devices: int = 1, precision: str = "32-true") -> Fabric:
    """This process's part in a run: its device, its rank, and its link to the other processes.

    One process per device. More than one are started here, by running the same command again,
    unless torchrun or `fabric run` has done that; then their number counts, not `devices`.

    Raises:
        ValueError: the device is unknown, absent or Apple's, there are not so many, or a GPU lacks
            the precision.
    """
    chosen = pick_device(device)
    if chosen.type == "mps":
        raise ValueError(
            f"device={device!r}: training was not measured on Apple's GPUs, which lack the float64 "
            "of its scores; use cpu or cuda"
        )
    present = torch.cuda.device_count() if chosen.type == "cuda" else math.inf
    if devices > (present if chosen.index is None else 1):
        raise ValueError(f"devices={devices}, but device={device!r} offers fewer; lower it")
    if precision == "bf16-mixed" and best_mixed_precision(device) != precision:
        raise ValueError(
            f"{torch.cuda.get_device_name(chosen)} has no bfloat16; use precision 16-mixed"
        )
    here, nodes = devices, 1
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun's
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // here
    fabric = Fabric(
        accelerator=chosen.type,
        devices=here if chosen.index is None else [chosen.index],
        num_nodes=nodes,
        strategy="ddp" if here * nodes > 1 else "auto",
        plugins=[Precision() if precision == "32-true" else Autocast(precision, chosen.type)],
    )
    if "LT_CLI_USED" not in os.environ:  # `fabric run` has launched already
        fabric.launch()
    atexit.register(leave_the_others)
    return fabric


def leave_the_others() -> None:
    """Close the process group, if there is one, before the interpreter ends.

    Threads of gloo free the last exchanged tensors a moment later, and one that does so while the
    interpreter ends aborts the process (PyTorch issue 190489): 4 of 72 runs on a busy machine.
    They are joined when the last object that refers to the group is deleted, so delete trainers
    before the end.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()


def best_mixed_precision(device: str) -> str:
    """bfloat16 where the device has it: with the range of float32, it needs no scaler.

    >>> best_mixed_precision("cpu")
    'bf16-mixed'
    """
    old_gpu = pick_device(device).type == "cuda" and not torch.cuda.is_bf16_supported(
        including_emulation=False
    )
    return "16-mixed" if old_gpu else "bf16-mixed"


def synchronised(separator: nn.Module, fabric: Fabric) -> nn.Module:
    """Normalisation by the whole batch where several devices share it.

    Otherwise each normalises by its own part, and a run changes with the number of devices. torch
    has no such batch norm for CPUs.
    """
    if fabric.world_size > 1 and isinstance(separator.normalizer, RunningSpectrogramNormalizer):
        # Not the bound method: the average of the weights is a deep copy, which would copy Fabric.
        separator.normalizer.over_processes = lambda mean: fabric.all_reduce(mean, reduce_op="mean")
    if fabric.world_size > 1 and fabric.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(separator)
    return separator


def checkpoint_activations(model: nn.Module) -> None:
    """Have a network recompute its activations in the backward pass.

    Raises:
        ValueError: it cannot.
    """
    if not hasattr(model, "activation_checkpointing"):
        raise ValueError(f"a {type(model).__name__} has no activation_checkpointing; leave it out")
    model.activation_checkpointing = True


def gathered(fabric: Fabric, item: Any) -> list:
    """The same kind of item from every process, in the order of their ranks, for every process."""
    if fabric.world_size == 1:
        return [item]
    items = [None] * fabric.world_size
    torch.distributed.all_gather_object(items, item)
    return items


def whole_batch(fabric: Fabric, batch: dict) -> dict:
    """For every process, the batch of which each holds the share `[rank::processes]`.

    Raises:
        ValueError: the shares differ in shape.
    """
    if fabric.world_size == 1:
        return batch
    shares = gathered(fabric, {name: getattr(x, "shape", x) for name, x in batch.items()})
    return {
        name: _joined(fabric, value, [share[name] for share in shares])
        for name, value in batch.items()
    }


def _joined(fabric: Fabric, value: Tensor | list, shares: list) -> Tensor | list:
    """An entry of a whole batch, from one process's share, and the lists or shapes of all."""
    if not isinstance(value, Tensor):
        return [item for items in zip(*shares, strict=True) for item in items]
    if len(set(shares)) > 1:  # the exchange would never end
        raise ValueError(f"segments of one batch must be equally long, they are {shares}")
    return fabric.all_gather(value).transpose(0, 1).flatten(0, 1)  # (processes, b, …) before


def share_of(fabric: Fabric, batch: dict) -> dict:
    """This process's share of a whole batch."""
    if fabric.world_size == 1:
        return batch
    mine = slice(fabric.global_rank, None, fabric.world_size)
    shares = {name: value[mine] for name, value in batch.items()}
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in shares.items()}


def share_buffers(fabric: Fabric, module: nn.Module) -> None:
    """The first process's running statistics for all, so that all score the same network."""
    if fabric.world_size > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)


def any_process(fabric: Fabric, *flags: bool) -> list[bool]:
    """For each flag, whether it is set in some process: all must go on alike."""
    if fabric.world_size == 1:
        return list(flags)
    votes = fabric.all_reduce(torch.tensor(flags, dtype=torch.float32), reduce_op="max")
    return [vote > 0 for vote in votes.tolist()]
