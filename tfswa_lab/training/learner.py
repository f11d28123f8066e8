"""A network and everything that changes as it learns: optimiser, average, rate, scale, randomness.

`Learner.step` is one step of training; `trainer.Trainer` is the loop around it.

Axis letters: `b` batch, `n` stems, `c` channels, `s` samples.

Notebook: 07_training
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.amp import GradScaler
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tfswa_lab.data.augment import SpectrogramMasking
from tfswa_lab.data.augment.augmentation import masked
from tfswa_lab.models.separator import Separator
from tfswa_lab.training.config import TrainingConfig
from tfswa_lab.training.launch import (
    any_process,
    checkpoint_activations,
    gathered,
    launch,
    share_of,
    synchronised,
    whole_batch,
)
from tfswa_lab.training.randomness import generator_for, random_state, set_random_state

Augment = Callable[[dict, Generator], dict]
AUDIO = ("mixture", "stems")


class Learner:
    """A separator that learns step by step and can return to any earlier step, bit for bit.

    Args:
        separator: is trained in place; `ema.module` is its average, the one to use.
        loss: maps estimates and targets `(b, n, c, s)` to a scalar and a dict of scalars.
        config: optimiser, precision, devices, seed.
        total_steps: where the learning rate reaches zero.
        augment: maps a batch and a generator to another batch, on the batch's device. It sees the
            batch of all processes together.
        masking: hides a part of what the network sees.
        folder: where batches are written whose loss or gradient is not finite; None for nowhere.
        train_step: `performance.oom.train_step`, which goes on with parts of a batch where memory
            runs out; then the loss must be a mean over items. None lets the error out.

    Raises:
        ValueError: device or precision do not exist, the warm-up is longer than the run, the
            network cannot be checkpointed, or there is a `train_step` and more than one process.

    To return, e.g. after an error in the middle of a step:

        state = learner.state_dict()
        …
        learner.load_state_dict(state)
    """

    def __init__(
        self,
        separator: Separator,
        loss: nn.Module,
        config: TrainingConfig,
        total_steps: int,
        augment: Augment | None = None,
        masking: SpectrogramMasking | None = None,
        folder: Path | None = None,
        train_step: Callable[..., Any] | None = None,
    ):
        self.config, self.folder = config, folder
        self.augment, self.masking, self.train_step = augment, masking, train_step
        self.steps = 0  # updates done
        self.fabric = launch(config.device, config.devices, config.precision)
        if train_step is not None and self.fabric.world_size > 1:
            raise ValueError(
                f"surviving an out-of-memory is for one process, here are {self.fabric.world_size}:"
                " while one repeats its backward pass, the others wait for ever; leave "
                "train_step (--survive-oom) out"
            )
        if config.activation_checkpointing:
            checkpoint_activations(separator.model)
        self.separator = synchronised(separator, self.fabric).train()
        optimizer = AdamW(
            separator.parameters(), config.learning_rate, weight_decay=config.weight_decay
        )
        self.model, self.optimizer = self.fabric.setup(self.separator, optimizer)
        self.ema = averaged(self.separator, config.ema_decay)
        self.scheduler = make_schedule(optimizer, config.warmup(total_steps), total_steps)
        self.loss = self.fabric.to_device(loss)

    # One step -------------------------------------------------------------------------------

    def step(self, batches: Sequence[dict]) -> dict[str, float]:
        """One update of the weights.

        Args:
            batches: this process's share of a batch, or of several to accumulate; `mixture`
                `(b, c, s)`, `stems` `(b, n, c, s)`, `track`, `start_seconds`.

        Returns:
            `loss`, its terms, `grad_norm` before clipping, and `lr`.

        Raises:
            NonFiniteError: loss or gradient is infinite or NaN.
        """
        gradients = self._gradients if self.train_step is None else self._gradients_by_items
        terms = gradients(batches)
        largest = self.config.gradient_clip_val or math.inf
        norm = self.fabric.clip_gradients(
            self.model, self.optimizer, max_norm=largest, error_if_nonfinite=False
        )
        scalars = means(terms) | {"grad_norm": norm.item()}  # a step's one wait for a GPU
        self._refuse_non_finite(scalars, terms, batches)
        scalars["lr"] = self.optimizer.param_groups[0]["lr"]

        self.optimizer.step()  # but not where 16-mixed overflowed: its scaler adapts instead
        if math.isfinite(scalars["grad_norm"]):
            self.scheduler.step()
            self.ema.update_parameters(self.separator)
        self.steps += 1
        return scalars

    def _gradients(self, batches: Sequence[dict]) -> list[dict]:
        """Add up the gradients of all batches; returns the loss of each, and its terms."""
        terms = []
        self.optimizer.zero_grad()
        for part in range(len(batches)):
            batch, generator = self._prepared(batches, part)
            incomplete = part + 1 < len(batches)
            with self.fabric.no_backward_sync(self.model, enabled=incomplete):
                loss, of_part = self._loss(batch, self._masked(generator))
                self.fabric.backward(loss / len(batches))
            terms.append(of_part)
        return terms

    def _gradients_by_items(self, batches: Sequence[dict]) -> list[dict]:
        """The same by `train_step`, with fewer items at once where memory runs out.

        An item is augmented and masked as in its whole batch. Returns the loss and the terms once
        for each item.
        """
        prepared = [self._prepared(batches, part) for part in range(len(batches))]
        whole = {name: torch.cat([batch[name] for batch, _ in prepared]) for name in AUDIO}
        generators = [generator for _, generator in prepared]
        del prepared  # these are copies
        count = len(whole["mixture"])
        size = count // len(batches)
        terms = []

        def loss_of(items: range) -> Tensor:
            part = {name: audio[items.start : items.stop] for name, audio in whole.items()}
            loss, of_part = self._loss(part, self._masked_items(generators, size, items))
            terms.extend([of_part] * len(items))
            return loss

        self.train_step(
            loss_of,
            range(count),
            self.optimizer,
            on_retreat=lambda *_: terms.clear(),
            size=size,
            backward=self.fabric.backward,
            step=lambda: None,  # after clipping
        )
        return terms

    def _loss(self, batch: dict, masking: AbstractContextManager) -> tuple[Tensor, dict]:
        """The loss; and itself and its terms, without a graph."""
        with masking:
            estimates = self.model(batch["mixture"])  # autocast inside
        loss, terms = self.loss(estimates, batch["stems"])
        return loss, {"loss": loss.detach(), **terms}

    def _prepared(self, batches: Sequence[dict], part: int) -> tuple[dict, Generator]:
        """One of a step's batches, augmented on the device; the same whenever it is asked for.

        Each process augments the whole batch, with the same numbers, and keeps its share. So Remix
        has all items to choose from, and the result is the same for any number of processes.
        """
        generator = generator_for(self.config.seed, 0, self.steps, part)
        batch = self.fabric.to_device(batches[part])
        if self.augment:
            whole = whole_batch(self.fabric, batch)
            batch = share_of(self.fabric, self.augment(whole, generator))
        return batch, generator

    def _masked(self, generator: Generator) -> AbstractContextManager:
        if self.masking is None:
            return nullcontext()
        rank, processes = self.fabric.global_rank, self.fabric.world_size
        return self.masking.applied(self.separator.model, generator, rank, processes)

    def _masked_items(
        self, generators: Sequence[Generator], size: int, items: range
    ) -> AbstractContextManager:
        """For some items of several batches of one size: their masks in these batches."""
        if self.masking is None:
            return nullcontext()

        def hide(features: Tensor) -> Tensor:
            whole = torch.ones(size, 1, *features.shape[2:])
            shown = torch.cat([self.masking(whole, each.clone_state()) for each in generators])
            hidden = shown[items.start : items.stop] == 0
            return features.masked_fill(hidden.to(features.device), 0.0)

        return masked(self.separator.model, hide)

    def _refuse_non_finite(
        self, scalars: dict[str, float], terms: list[dict], batches: Sequence[dict]
    ) -> None:
        """Stop all processes, with the same message, where one has a loss that is not a number."""
        loss, norm = scalars["loss"], scalars["grad_norm"]
        (broken,) = any_process(self.fabric, not (math.isfinite(loss) and math.isfinite(norm)))
        if not broken:
            return
        of_batch = len(terms) // len(batches)  # one for each batch, or one for each item
        broken_parts = {
            i // of_batch for i, term in enumerate(terms) if not term["loss"].isfinite()
        }
        if self.augment:  # it mixes the items of all processes
            broken_parts = set().union(*gathered(self.fabric, broken_parts))
        losses = [loss for loss in gathered(self.fabric, loss) if not math.isfinite(loss)]
        if losses:
            what = f"the loss is {losses[0]}"
        elif self._scaler_can_adapt():
            return
        else:
            what, broken_parts = f"the norm of the gradients is {norm}", range(len(batches))
        shown = [self._prepared(batches, part)[0] for part in sorted(broken_parts)]
        files = write_batches(self.folder, self.steps, self.fabric.global_rank, shown)
        songs = [describe_batch(batch) for batch in shown]
        songs, files = (chain.from_iterable(gathered(self.fabric, own)) for own in (songs, files))
        raise NonFiniteError(f"{what} in step {self.steps + 1}", list(songs), list(files))

    def _scaler_can_adapt(self) -> bool:
        """Whether a lower scale of 16-mixed may prevent the overflow; not if the scale is 1."""
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        return scaler is not None and scaler.get_scale() > 1

    # Save and restore -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, in copies that later steps do not change.

        The copies are in the host's memory: a full GPU has no room for them. `random` is the state
        of this process's generators.
        """
        return {
            "step": self.steps,
            "separator": copied(self.separator.state_dict()),
            "ema": copied(self.ema.state_dict()),
            "optimizer": copied(self.optimizer.state_dict()),
            "scheduler": copied(self.scheduler.state_dict()),
            "scaler": self.fabric.strategy.precision.state_dict(),
            "random": random_state(self.fabric.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to the moment of `state_dict`, also after an error in the middle of a step.

        Args:
            state: is not changed and can be loaded again. Where `random` is None, the generators
                keep their states.
        """
        self.optimizer.zero_grad()
        self.separator.load_state_dict(state["separator"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it keeps the tensors
        resume_schedule(self.scheduler, state["scheduler"])  # after the optimizer: it sets the rate
        self._load_scaler(state["scaler"])
        self.steps = state["step"]
        if state["random"] is not None:
            set_random_state(state["random"], self.fabric.device)

    def _load_scaler(self, state: dict) -> None:
        """Load into a new scaler: after a failed step the old one refuses to begin another."""
        precision = self.fabric.strategy.precision
        if getattr(precision, "scaler", None) is not None:
            precision.scaler = GradScaler(self.fabric.device.type)
        precision.load_state_dict(state)


def copied(state: Any) -> Any:
    """Nested dicts, lists and tuples with copies of their tensors on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: copied(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(copied, state))
    return state


def means(terms: list[dict]) -> dict[str, float]:
    """The mean of each of some scalars over several dicts that have the same.

    >>> means([{"loss": 1.0}, {"loss": torch.tensor(2.0)}])
    {'loss': 1.5}
    """
    values = torch.stack([torch.stack([torch.as_tensor(x) for x in t.values()]) for t in terms])
    return dict(zip(terms[0], values.double().mean(0).tolist(), strict=True))


# The average of the weights -----------------------------------------------------------------


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of a model that `update_parameters(model)` pulls towards it by `1 - decay`.

    It averages over about `1 / (1 - decay)` steps, but never more than a ninth of the steps so far,
    because the first weights are random. A decay of 0 copies the model.

    The running statistics of batch norms are averaged like the weights, so that they describe the
    activations of the averaged weights, not of the newest. The copy stays in evaluation mode.

    Source: Polyak & Juditsky, SIAM J. Control Optim. 30(4), 1992; here exponentially weighted.
    """

    def pull(averages: list[Tensor], values: list[Tensor], _: Tensor) -> None:
        steps = average.n_averaged.item()  # on the CPU: no wait for a GPU
        get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(averages, values, steps)

    average = AveragedModel(model, multi_avg_fn=pull, use_buffers=True)
    return average.requires_grad_(False).eval()


# The learning rate --------------------------------------------------------------------------


def warmup_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """Factor of the learning rate for a step, counted from 0: a linear rise, then half a cosine.

    It is above 0 at the first and at the last step.

    Source: Loshchilov & Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017,
    eq. 5, without restarts.

    >>> [round(warmup_cosine(step, 2, 6), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.85, 0.5, 0.15]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_schedule(optimizer: Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """A scheduler that is stepped once after each update."""
    return LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup_steps, total_steps))


def resume_schedule(schedule: LambdaLR, state: dict) -> None:
    """Go on from a saved schedule, along this one's curve.

    A run that was given more steps has a longer cosine: its rate rises to the new curve at once,
    where the saved one would be 0 at the old end.
    """
    schedule.load_state_dict(state)
    factor = schedule.lr_lambdas[0](schedule.last_epoch)
    for group, highest in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
        group["lr"] = factor * highest


# A loss that is not a number ----------------------------------------------------------------


class NonFiniteError(FloatingPointError):
    """Loss or gradient became infinite or NaN: names the songs, and where their samples are.

    Args:
        what: e.g. "the loss is nan in step 12".
        songs: descriptions of the batches that may have caused it, of all processes.
        files: where these batches are.
    """

    def __init__(self, what: str, songs: list[str], files: list[str]):
        message = f"{what}. The batch: {'; '.join(songs)}."
        if files:
            message += f" Its samples are in {', '.join(files)}."
        super().__init__(f"{message} Lower the learning rate, or look for an error in the batch.")


def describe_batch(batch: dict) -> str:
    """The songs of a batch and where its segments start.

    >>> describe_batch({"track": ["A", "B"], "start_seconds": [1.5, 0]})
    'A at 1.50 s, B at 0.00 s'
    """
    places = zip(batch["track"], batch["start_seconds"], strict=True)
    return ", ".join(f"{track} at {float(start):.2f} s" for track, start in places)


def write_batches(folder: Path | None, step: int, rank: int, batches: list[dict]) -> list[str]:
    """Write the tensors of batches as safetensors, their songs as `metadata["track"]` (JSON).

    Mixture and stems are those that the network and the loss got, augmented.

    Args:
        folder: of the run, None to write nothing.
        step: updates done before.
        rank: of the process.
        batches: one file each.

    Returns:
        Paths of the files; where a file could not be written, why.
    """
    written = []
    for part, batch in enumerate(batches if folder else []):
        path = folder / f"non_finite_batch_step_{step + 1}_rank_{rank}_part_{part}.safetensors"
        tensors = {name: batch[name].contiguous() for name in ("mixture", "stems", "start_seconds")}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path, metadata={"track": json.dumps(batch["track"])})
        except OSError as error:  # must not hide why the run stops
            written.append(f"no file ({error})")
        else:
            written.append(str(path))
    return written
