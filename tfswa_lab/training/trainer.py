"""The loop around `Learner.step`: batches, validation, curves, checkpoints, and when to stop.

Notebook: 07_training
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tfswa_lab.data.augment import SpectrogramMasking
from tfswa_lab.models.separator import Separator
from tfswa_lab.models.storage import check_savable, describe, save_separator
from tfswa_lab.training import checkpoint
from tfswa_lab.training.checkpoint import BEST, check_same_run, exclusive, spelled
from tfswa_lab.training.config import TrainingConfig
from tfswa_lab.training.launch import any_process, gathered, share_buffers
from tfswa_lab.training.learner import Augment, Learner, means
from tfswa_lab.training.logbook import Logbook, Pace, advance, memory_mib, progress_bar
from tfswa_lab.training.randomness import random_state
from tfswa_lab.training.sampler import ShuffledBatches, TrainingLoader
from tfswa_lab.training.songs import (
    audio_of,
    names_of,
    refuse_silence,
    refuse_silent_validation,
)
from tfswa_lab.training.validation import validate, validation_loader

PROGRESS = ("best_sdr", "best_step", "stale")


class Trainer:
    """Trains a separator. A run can be stopped, resumed and moved to other devices.

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
        callbacks: context managers that are open while the run goes on; `after_step(trainer,
            batches)` is called after each step. `performance.Monitor` is one.
        train_step: `performance.oom.train_step` goes on with parts of a batch where memory runs
            out in training. It is no part of the run: it may be there or not when one is resumed.

    Raises:
        OSError: nothing can be written to `output_dir`.
        ValueError: the training set is smaller than a step, the warm-up is longer than the run,
            device or precision do not exist, or there is a `train_step` and more than one process.
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
        callbacks: Sequence[Any] = (),
        train_step: Callable[..., Any] | None = None,
    ):
        self.config = config = config or TrainingConfig()
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.train_set, self.valid_set = train_set, valid_set
        self.progress, self.callbacks = progress, callbacks
        self.logbook = Logbook()
        self.best_sdr, self.best_step = -math.inf, 0
        self.stale = 0  # validations since the best one
        self._last_checkpoint = None  # read or written
        if self.output_dir:
            check_savable(separator)  # better refused now than after hours
            checkpoint.make_run_folder(self.output_dir)
        self.steps_per_epoch = config.steps_per_epoch(len(train_set))
        self.total_steps = config.total_steps(len(train_set))
        steps, folder = self.total_steps, self.output_dir
        self.learner = Learner(separator, loss, config, steps, augment, masking, folder, train_step)
        self.fabric = fabric = self.learner.fabric
        self.separator, self.ema = self.learner.separator, self.learner.ema
        batches = ShuffledBatches(len(train_set), config, fabric.global_rank, fabric.world_size)
        on_gpu = fabric.device.type == "cuda"
        self.loader = TrainingLoader(train_set, batches, config.num_workers, on_gpu)

    @property
    def step(self) -> int:
        """Updates done."""
        return self.learner.steps

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or patience is at its end."""
        patience = self.config.patience or math.inf
        return self.step >= self.total_steps or self.stale >= patience

    @property
    def history(self) -> dict[str, tuple[list[int], list[float]]]:
        """Steps and values of each curve: `plt.plot(*trainer.history["train/loss"])`."""
        return self.logbook.history

    def fit(self, resume: str | Path | None = None) -> dict[str, tuple[list[int], list[float]]]:
        """Train to the end; returns `history`.

        SIGTERM and Ctrl-C take effect after the step in hand, once there is a checkpoint.

        Args:
            resume: a run's folder or one of its checkpoints; None starts a run.

        Raises:
            FileExistsError: there is another run in `output_dir`, now or from before.
            FileNotFoundError: there is nothing to resume.
            ValueError: the checkpoint is broken, of another run, or beyond the end of this one; or
                a stem is silent in all songs.
            NonFiniteError: loss or gradient is infinite or NaN, and then the batch is on disk; or
                the loss in validation is.
        """
        with exclusive(self.output_dir, self.fabric):
            self._begin(resume)
            self._loop()
        return self.history

    def _loop(self) -> None:
        show = self.progress and self.fabric.is_global_zero
        bar = progress_bar(self.step, self.total_steps, show)
        with Termination() as termination, closing(self.logbook), bar, ExitStack() as stack:
            for callback in self.callbacks:
                stack.enter_context(callback)
            for batches in self._remaining_steps():
                scalars = self.learner.step(batches)
                for callback in self.callbacks:
                    callback.after_step(self, batches)
                advance(bar, scalars, self.fabric.device)
                self._after_step(scalars, termination)
                if termination.requested:
                    break

    def _begin(self, resume: str | Path | None) -> None:
        refuse_silence(self.train_set, self.separator.stems)
        if self.valid_set is not None:
            refuse_silent_validation(self.valid_set, self.separator.stems)
        if resume is not None:
            self._last_checkpoint = checkpoint.find_checkpoint(resume)
            self._restore(checkpoint.load_checkpoint(self._last_checkpoint))
        if self.output_dir:
            checkpoint.refuse_another_run(self.output_dir, self._last_checkpoint)
            if not (self.output_dir / BEST).exists():  # resumed into another folder
                self.best_sdr, self.stale = -math.inf, 0
        if self.output_dir and self.fabric.is_global_zero:
            folder = self.output_dir / "tensorboard"
            self.logbook = Logbook(folder, self.history, self.step)
        self._pace = Pace()
        self._saved_at = time.monotonic()

    def _remaining_steps(self) -> Iterator[list[dict]]:
        """Batches for each remaining step; the first epoch may begin in its middle."""
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
        """Log, validate and save at the steps at which each is due."""
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
        """Score the average and keep the best; without a validation set, keep the last."""
        if self.valid_set is None:
            if self.finished:
                self._keep()
            return
        share_buffers(self.fabric, self.ema.module)
        scores = validate(self.ema.module, self.learner.loss, self._valid_loader(), self.fabric)
        self.logbook.scalars(self.step, {f"valid/{name}": x for name, x in scores.items()})
        self.stale += 1
        if scores["sdr"] > self.best_sdr:
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
        """The average's estimates of always the same segment, to hear beside the targets."""
        with self.fabric.autocast():
            estimates = self.ema.module(item["mixture"][None].to(self.fabric.device))[0].float()
        self.logbook.separation(self.step, self.separator, item, estimates)

    # Save and restore -----------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint now; with several processes, all must call it."""
        if self.output_dir is None:
            return
        random = gathered(self.fabric, random_state(self.fabric.device))
        if self.fabric.is_global_zero:
            self.logbook.flush()
            state = self._state() | {"random": random}
            checkpoint.save_checkpoint(self.output_dir, self.step, state, self._last_checkpoint)
        self._last_checkpoint = checkpoint.checkpoint_path(self.output_dir, self.step)
        self._saved_at = time.monotonic()

    def _state(self) -> dict:
        """The run in plain containers.

        The position in the training set is not stored: it follows from the step.
        """
        return {
            **self.learner.state_dict(),
            **{name: getattr(self, name) for name in PROGRESS},
            "history": self.history,
            "settings": self._settings(),
            "versions": checkpoint.versions(),
        }

    def _restore(self, state: dict) -> None:
        """Return to the moment of a checkpoint.

        Processes that the saved run did not have keep their own random state. Other versions of
        the packages only cause a warning: the run goes on, but perhaps not bit for bit.

        Raises:
            ValueError: the state is of a run with other settings, or of a step after the end.
        """
        check_same_run(state["settings"], self._settings())
        if state["step"] > self.total_steps:
            raise ValueError(
                f"the checkpoint is of step {state['step']}, but the run ends after step "
                f"{self.total_steps}; raise max_steps or max_epochs, or resume an earlier one"
            )
        if state["versions"] != (present := checkpoint.versions()):
            warnings.warn(f"saved with {state['versions']}, this is {present}", stacklevel=2)
        random = dict(enumerate(state["random"])).get(self.fabric.global_rank)
        self.learner.load_state_dict(state | {"random": random})
        for name in PROGRESS:
            setattr(self, name, state[name])
        self.logbook.history = state["history"]

    def _settings(self) -> dict:
        """Everything that identifies the run: numbers, network, loss, songs, augmentation."""
        parts = ("loss", "augment", "masking")
        return {
            "training": asdict(self.config),
            "separator": describe(self.separator),
            **{part: spelled(getattr(self.learner, part)) for part in parts},
            "segments": len(self.train_set),
            "songs": names_of(self.train_set),
            "audio": self._audio,
        }

    @cached_property
    def _audio(self) -> str | None:
        """The digest of the songs at its first use; it reads a little of every file."""
        return audio_of(self.train_set)


class Termination:
    """Delays a SIGTERM or Ctrl-C until its block ends, so that a step and its checkpoint are whole.

    A second one is not delayed, because a step may take minutes. Only the main thread may set
    handlers; in any other thread, signals act as usual.
    """

    def __init__(self):
        self.requested = False
        self._signal = signal.SIGTERM
        self._before = {}

    def __enter__(self) -> Termination:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, _frame: object) -> None:
        self.requested = True
        self._signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def __exit__(self, *_) -> None:
        self._restore()
        if self.requested and self._before:
            os.kill(os.getpid(), self._signal)
