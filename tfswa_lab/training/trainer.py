"""The loop from a batch to a trained separator; `Trainer.train_step` is the heart of it.

Axis letters: `b` batch, `n` stems, `c` channels, `s` samples.

Notebook: 07_training
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Generator, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset

from tfswa_lab.data.augment import SpectrogramMasking
from tfswa_lab.models.separator import Separator
from tfswa_lab.models.storage import check_savable, save_separator
from tfswa_lab.training.checkpoint import (
    checkpoint_path,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from tfswa_lab.training.config import TrainingConfig
from tfswa_lab.training.ema import averaged
from tfswa_lab.training.interrupt import Termination
from tfswa_lab.training.launch import (
    any_process,
    checkpoint_activations,
    gathered,
    launch,
    share_buffers,
    synchronised,
)
from tfswa_lab.training.logbook import Logbook, means
from tfswa_lab.training.non_finite import NonFiniteError, describe_batch, write_batches
from tfswa_lab.training.progress import Pace, advance, memory_mib, progress_bar
from tfswa_lab.training.randomness import generator_for
from tfswa_lab.training.run_folder import (
    BEST,
    make_run_folder,
    only_writer,
    refuse_another_run,
)
from tfswa_lab.training.sampler import ShuffledBatches, TrainingLoader
from tfswa_lab.training.schedule import make_schedule
from tfswa_lab.training.state import restore, run_state
from tfswa_lab.training.validation import validate, validation_loader

Augment = Callable[[dict, Generator], dict]


class Trainer:
    """Trains a separator; stops, resumes and scales out without becoming another run.

    Args:
        separator: is trained in place; `ema.module` is its average, the one to use.
        loss: maps estimates and targets `(b, n, c, s)` to a scalar and a dict of scalars.
        train_set: items `mixture` `(c, s)`, `stems` `(n, c, s)`, `track`, `start_seconds`; if it
            has `set_epoch`, it is told the epoch.
        valid_set: the same; None trains without validation.
        config: all numbers.
        output_dir: folder of the run: `checkpoints`, `tensorboard`, and the best average in
            `best`, for `load_separator`. None writes nothing.
        augment: maps a batch and a generator to another batch, on the batch's device.
        masking: hides a part of what the network sees.
        progress: show a bar.

    Raises:
        OSError: nothing can be written to `output_dir`.
        ValueError: the training set is smaller than a step, or device or precision do not exist.
    """

    def __init__(
        self,
        separator: Separator,
        loss: nn.Module,
        train_set: Dataset,
        valid_set: Dataset | None = None,
        config: TrainingConfig | None = None,
        output_dir: str | Path | None = None,
        augment: Augment | None = None,
        masking: SpectrogramMasking | None = None,
        progress: bool = False,
    ):
        self.config = config or TrainingConfig()
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.train_set, self.valid_set = train_set, valid_set
        self.augment, self.masking = augment, masking
        self.progress = progress
        self.logbook = Logbook()
        self.step = 0  # updates done
        self.best_sdr, self.best_step = -math.inf, 0
        self.stale = 0  # validations since the best one
        self._last_checkpoint = None  # read or written
        if self.output_dir:
            check_savable(separator)  # better refused now than after hours
            make_run_folder(self.output_dir)
        self._set_up(separator, loss)

    def _set_up(self, separator: Separator, loss: nn.Module) -> None:
        config = self.config
        self.fabric = fabric = launch(config.device, config.devices, config.precision)
        if config.activation_checkpointing:
            checkpoint_activations(separator.model)
        self.separator = synchronised(separator, fabric).train()
        optimizer = AdamW(
            separator.parameters(), config.learning_rate, weight_decay=config.weight_decay
        )
        self.model, self.optimizer = fabric.setup(self.separator, optimizer)
        self.ema = averaged(self.separator, config.ema_decay)
        self.loss = fabric.to_device(loss)
        batches = ShuffledBatches(
            len(self.train_set),
            config.batch_size,
            config.accumulate,
            config.seed,
            fabric.global_rank,
            fabric.world_size,
        )
        on_card = fabric.device.type == "cuda"
        self.loader = TrainingLoader(self.train_set, batches, config.num_workers, on_card)
        self.steps_per_epoch = len(batches) // config.accumulate
        epochs = config.max_epochs and config.max_epochs * self.steps_per_epoch
        self.total_steps = min(end for end in (config.max_steps, epochs) if end)
        self.scheduler = make_schedule(optimizer, config.warmup_steps, self.total_steps)

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or patience is at its end."""
        patience = self.config.patience or math.inf
        return self.step >= self.total_steps or self.stale >= patience

    @property
    def history(self) -> dict[str, tuple[list[int], list[float]]]:
        """Steps and values of each curve: `plt.plot(*trainer.history["train/loss"])`."""
        return self.logbook.history

    # One step -------------------------------------------------------------------------------

    def train_step(self, *batches: dict) -> dict[str, float]:
        """One update of the weights.

        Args:
            batches: this process's share of a batch, or of several to accumulate; `mixture`
                `(b, c, s)`, `stems` `(b, n, c, s)`, `track`, `start_seconds`.

        Returns:
            `loss`, its terms, `grad_norm` before clipping, and `lr`.

        Raises:
            NonFiniteError: loss or gradient is infinite or NaN.
        """
        terms = []
        self.optimizer.zero_grad()
        for part in range(len(batches)):
            batch, generator = self._prepared(batches, part)
            incomplete = part + 1 < len(batches)
            with self.fabric.no_backward_sync(self.model, enabled=incomplete):
                with self._masked(generator):
                    estimates = self.model(batch["mixture"])  # autocast inside
                loss, parts = self.loss(estimates, batch["stems"])
                self.fabric.backward(loss / len(batches))
            terms.append({"loss": loss.detach(), **parts})

        largest = self.config.gradient_clip_val or math.inf
        norm = self.fabric.clip_gradients(
            self.model, self.optimizer, max_norm=largest, error_if_nonfinite=False
        )
        scalars = means(terms) | {"grad_norm": norm.item()}  # a step's one wait for a card
        self._refuse_non_finite(scalars, terms, batches)
        scalars["lr"] = self.optimizer.param_groups[0]["lr"]

        self.optimizer.step()  # but not where 16-mixed overflowed: its scaler adapts instead
        if math.isfinite(scalars["grad_norm"]):
            self.scheduler.step()
            self.ema.update_parameters(self.separator)
        self.step += 1
        return scalars

    def _prepared(self, batches: Sequence[dict], part: int) -> tuple[dict, Generator]:
        """One of a step's batches, augmented on the device; the same whenever it is asked for."""
        generator = generator_for(self.config.seed, self.fabric.global_rank, self.step, part)
        batch = self.fabric.to_device(batches[part])
        return (self.augment(batch, generator) if self.augment else batch), generator

    def _masked(self, generator: Generator) -> AbstractContextManager:
        if self.masking is None:
            return nullcontext()
        return self.masking.applied(self.separator.model, generator)

    def _refuse_non_finite(
        self, scalars: dict[str, float], terms: list[dict], batches: Sequence[dict]
    ) -> None:
        """Stop all processes, with the same words, where one has a loss that is no number."""
        loss, norm = scalars["loss"], scalars["grad_norm"]
        (broken,) = any_process(self.fabric, not (math.isfinite(loss) and math.isfinite(norm)))
        if not broken:
            return
        culprits = [part for part, term in enumerate(terms) if not term["loss"].isfinite()]
        losses = [loss for loss in gathered(self.fabric, loss) if not math.isfinite(loss)]
        if losses:
            what = f"the loss is {losses[0]}"
        elif self._scaler_can_adapt():
            return
        else:
            what, culprits = f"the norm of the gradients is {norm}", range(len(batches))
        shown = [self._prepared(batches, part)[0] for part in culprits]
        files = write_batches(self.output_dir, self.step, self.fabric.global_rank, shown)
        songs = [describe_batch(batch) for batch in shown]
        songs, files = (chain.from_iterable(gathered(self.fabric, own)) for own in (songs, files))
        raise NonFiniteError(f"{what} in step {self.step + 1}", list(songs), list(files))

    def _scaler_can_adapt(self) -> bool:
        """Overflow is how 16-mixed finds its scale; at a scale of 1, scale is not the cause."""
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        return scaler is not None and scaler.get_scale() > 1

    # The loop -------------------------------------------------------------------------------

    def fit(self, resume: str | Path | None = None) -> dict[str, tuple[list[int], list[float]]]:
        """Train to the end; returns `history`.

        SIGTERM and Ctrl-C take effect after the step in hand, once there is a checkpoint.

        Args:
            resume: a run's folder or one of its checkpoints; None starts a run.

        Raises:
            FileExistsError: there is another run in `output_dir`, now or from before.
            FileNotFoundError: there is nothing to resume.
            ValueError: the checkpoint is broken, or of another run.
            NonFiniteError: loss or gradient is infinite or NaN, and then the batch is on disk; or
                the loss in validation is.
        """
        with only_writer(self.output_dir, self.fabric):
            self._begin(resume)
            self._loop()
        return self.history

    def _loop(self) -> None:
        show = self.progress and self.fabric.is_global_zero
        bar = progress_bar(self.step, self.total_steps, show)
        with Termination() as termination, closing(self.logbook), bar:
            for batches in self._remaining_steps():
                scalars = self.train_step(*batches)
                advance(bar, scalars, self.fabric.device)
                self._after_step(scalars, termination)
                if termination.requested:
                    break

    def _begin(self, resume: str | Path | None) -> None:
        if resume is not None:
            self._last_checkpoint = find_checkpoint(resume)
            restore(self, load_checkpoint(self._last_checkpoint))
        if self.output_dir:
            refuse_another_run(self.output_dir, self._last_checkpoint)
            if not (self.output_dir / BEST).exists():  # resumed into another folder
                self.best_sdr, self.stale = -math.inf, 0
        if self.output_dir and self.fabric.is_global_zero:
            folder = self.output_dir / "tensorboard"
            self.logbook = Logbook(folder, self.history, self.step)
        self._pace = Pace()
        self._saved_at = time.monotonic()

    def _remaining_steps(self) -> Iterator[list[dict]]:
        """Batches for each step that is left, from the middle of an epoch on if need be."""
        accumulate = self.config.accumulate
        while not self.finished:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            batches = self.loader.epoch(epoch, first * accumulate)
            for _ in range(first, self.steps_per_epoch):
                if self.finished:
                    return
                with self._pace.waiting():
                    step = list(islice(batches, accumulate))
                yield step

    def _after_step(self, scalars: dict[str, float], termination: Termination) -> None:
        """Log, validate and save where it is time to."""
        config = self.config
        if self.step % config.log_every_n_steps == 0:
            self._log(scalars)
        if self._due(config.val_every_n_steps):
            self._validate()
        minutes = (time.monotonic() - self._saved_at) / 60
        too_old = minutes >= config.checkpoint_every_n_minutes
        stop, old = any_process(self.fabric, termination.requested, too_old)
        termination.requested |= stop  # not "=": a signal may come during the vote
        if old or stop or self._due(config.checkpoint_every_n_steps):
            self.save()

    def _due(self, every_n_steps: int | None) -> bool:
        return self.finished or self.step % (every_n_steps or self.steps_per_epoch) == 0

    def _log(self, scalars: dict[str, float]) -> None:
        curves = {
            "train": means(gathered(self.fabric, scalars)),
            "speed": self._pace.read(),
            "memory_mib": memory_mib(self.fabric.device),
        }
        for group, values in curves.items():
            named = {f"{group}/{name}": value for name, value in values.items()}
            self.logbook.scalars(self.step, named)

    def _validate(self) -> None:
        """Score the average and keep it if it is the best; without songs to score it, the last."""
        if self.valid_set is None:
            if self.finished:
                self._keep()
            return
        share_buffers(self.fabric, self.ema.module)
        scores = validate(self.ema.module, self.loss, self._valid_loader(), self.fabric)
        self.logbook.scalars(self.step, {f"valid/{name}": x for name, x in scores.items()})
        self.stale += 1
        if not scores["sdr"] <= self.best_sdr:  # NaN, where all stems are silent: the last is kept
            self.best_sdr, self.best_step, self.stale = scores["sdr"], self.step, 0
            self._keep()

    def _valid_loader(self) -> DataLoader:
        share = max(1, self.config.batch_size // self.fabric.world_size)
        return validation_loader(self.valid_set, share, self.config.num_workers, self.fabric)

    def _keep(self) -> None:
        if self.output_dir and self.fabric.is_global_zero:
            save_separator(self.ema.module, self.output_dir / BEST)
            if self.valid_set is not None:
                self._log_excerpt(self.valid_set[len(self.valid_set) // 2])

    @torch.no_grad()
    def _log_excerpt(self, item: dict) -> None:
        """What the average makes of always the same stretch, to be heard beside the truth."""
        with self.fabric.autocast():
            estimates = self.ema.module(item["mixture"][None].to(self.fabric.device))[0].float()
        self.logbook.separation(self.step, self.separator, item, estimates)

    def save(self) -> None:
        """Write a checkpoint now; with several processes, all must call it."""
        if self.output_dir is None:
            return
        state = run_state(self)
        if self.fabric.is_global_zero:
            self.logbook.flush()
            save_checkpoint(self.output_dir, self.step, state, self._last_checkpoint)
        self._last_checkpoint = checkpoint_path(self.output_dir, self.step)
        self._saved_at = time.monotonic()
