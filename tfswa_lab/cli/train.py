"""`tfswa-lab train`: a run from a preset, options and the checkpoint that it goes on from.

Its options are fields of `Preset`, and `use_amp`; one that is not given keeps the preset's value.

Notebook: 07_training
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tfswa_lab.cli.errors import one_line_errors, say
from tfswa_lab.cli.options import given, list_of, panel, takes

if TYPE_CHECKING:
    from tfswa_lab.training.presets import Preset

RUN, DATA, NETWORK, LOSS, STEPS, WATCH, MACHINE = map(
    panel, ("Run", "Data", "Network", "Loss", "Steps", "Watching", "Machine")
)
MODELS = "tfswa_unet, resunet, locoformer or mask_resunet; tfswa_unet if absent."
MASK = (
    "magnitude or complex, for networks of masks; mapping for locoformer; magnitude mapping for "
    "resunet."
)
LESS_MEMORY = (
    "lower --batch-size (and raise --accumulate) or --segment-seconds, or use --precision "
    "bf16-mixed, --activation-checkpointing or, on one device, --survive-oom"
)
AUTO = "auto"
CLEARLY_SLOWER = 1.1
MOST_ON_CPU = 16  # segments: more are no faster there, and take minutes to try


def size_or_auto(text: str) -> int | str:
    """A batch size as typed."""
    try:
        return text if text == AUTO else int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a whole number nor {AUTO}") from None


SIZE_OR_AUTO = {"parser": size_or_auto, "metavar": f"INTEGER|{AUTO}"}


@dataclass(frozen=True)
class TrainOptions:
    """What can be typed; None stands for "not given"."""

    preset: Annotated[str | None, RUN(help="tiny, small or default; tiny if absent.")] = None
    output_dir: Annotated[Path | None, RUN(help="Run folder; or runs/[MODEL-]PRESET.")] = None
    resume: Annotated[Path | None, RUN(help="A run's folder or checkpoint to go on from.")] = None
    seed: Annotated[int | None, RUN(help="Seed of weights, order, augmentation.")] = None
    data_root: Annotated[str | None, DATA(help="A tree as MUSDB18's; the band if absent.")] = None
    target_stems: Annotated[tuple | None, DATA(help="As vocals,other.", **list_of(str))] = None
    segment_seconds: Annotated[float | None, DATA(help="Length of a segment.")] = None
    samples_per_track: Annotated[int | None, DATA(help="Segments per song and epoch.")] = None
    sample_rate: Annotated[int | None, DATA(help="Resample songs to this, in Hz.")] = None
    augment: Annotated[
        str | None, DATA(help="none, light or full; remixes batches of 2 or more.")
    ] = None
    model: Annotated[str | None, NETWORK(help=MODELS)] = None
    dims: Annotated[tuple | None, NETWORK(help="Channels per level.", **list_of(int))] = None
    depths: Annotated[tuple | None, NETWORK(help="Blocks per level.", **list_of(int))] = None
    window_size: Annotated[int | None, NETWORK(help="Side of an attention window.")] = None
    num_heads: Annotated[int | None, NETWORK(help="Attention heads.")] = None
    mask: Annotated[str | None, NETWORK(help=MASK)] = None
    n_fft: Annotated[int | None, NETWORK(help="Window of the transform, in samples.")] = None
    hop_length: Annotated[int | None, NETWORK(help="From frame to frame, in samples.")] = None
    bins: Annotated[int | None, NETWORK(help="Lowest bins that the network sees.")] = None
    l1_weight: Annotated[float | None, LOSS(help="Weight of magnitudes, one window.")] = None
    mrstft_weight: Annotated[float | None, LOSS(help="Weight of magnitudes, three windows.")] = None
    waveform_weight: Annotated[float | None, LOSS(help="Weight of the samples.")] = None
    sdr_weight: Annotated[float | None, LOSS(help="Weight of the SDR in dB.")] = None
    batch_size: Annotated[
        int | None, STEPS(help="Segments at once, over all devices; or auto.", **SIZE_OR_AUTO)
    ] = None
    accumulate: Annotated[int | None, STEPS(help="Batches per step.")] = None
    max_epochs: Annotated[int | None, STEPS(help="Passes over the songs.")] = None
    max_steps: Annotated[int | None, STEPS(help="Stop after so many steps.")] = None
    learning_rate: Annotated[float | None, STEPS(help="The highest; it rises, then falls.")] = None
    weight_decay: Annotated[float | None, STEPS(help="AdamW's.")] = None
    warmup_steps: Annotated[int | None, STEPS(help="While the rate rises; 1/20 if absent.")] = None
    gradient_clip_val: Annotated[float | None, STEPS(help="Largest norm; 0 is off.")] = None
    ema_decay: Annotated[float | None, STEPS(help="Of the averaged weights; 0 is off.")] = None
    log_every_n_steps: Annotated[int | None, WATCH(help="Steps between points of a curve.")] = None
    val_every_n_steps: Annotated[int | None, WATCH(help="Once an epoch if absent.")] = None
    patience: Annotated[int | None, WATCH(help="Stop after so many without progress.")] = None
    checkpoint_every_n_steps: Annotated[int | None, WATCH(help="Once an epoch if absent.")] = None
    checkpoint_every_n_minutes: Annotated[float | None, WATCH(help="Also after this many.")] = None
    device: Annotated[str | None, MACHINE(help="cpu, cuda, or auto.")] = None
    devices: Annotated[int | None, MACHINE(help="Number; torchrun sets it itself.")] = None
    num_workers: Annotated[int | None, MACHINE(help="Processes that read, per device.")] = None
    precision: Annotated[str | None, MACHINE(help="32-true, bf16-mixed or 16-mixed.")] = None
    use_amp: Annotated[bool | None, MACHINE(help="The mixed precision that fits, or none.")] = None
    activation_checkpointing: Annotated[bool | None, MACHINE(help="Less memory, slower.")] = None
    survive_oom: Annotated[
        bool | None, MACHINE(help="Go on with parts of a batch where memory runs out.")
    ] = None


@takes(TrainOptions)
def train(options: TrainOptions) -> None:
    """Train a separator; with no option at all, a tiny one on the embedded band.

    Several GPUs: --devices 4, or torchrun --nproc-per-node 4 -m tfswa_lab.cli train …

    After Ctrl-C or SIGTERM, the current step is finished and saved: --resume RUN continues.
    """
    # Imported here: `tfswa-lab --help` should not wait for torch.
    import torch

    from tfswa_lab.performance.oom import part_size, train_step
    from tfswa_lab.training.presets import Preset
    from tfswa_lab.training.run import build_trainer, choose_preset

    changes, resume = given(options, Preset), options.resume
    find_size = changes.get("batch_size") == AUTO
    if find_size:
        del changes["batch_size"]
    folder = options.output_dir or run_folder(options)
    with one_line_errors(lambda: less_memory(folder)):
        preset = choose_preset(options.preset, resume, changes, options.use_amp)
        if options.use_amp:
            say_if_slower(preset)
        if find_size:
            preset = replace(preset, batch_size=choose_batch_size(preset, resume, folder))
        torch.manual_seed(preset.seed)  # first weights: the same in all processes
        survivor = train_step if options.survive_oom else None
        trainer = build_trainer(preset, folder, progress=True, train_step=survivor)
        torch.manual_seed(preset.seed + trainer.fabric.global_rank)  # dropout: different in each
        trainer.fit(resume)
    if trainer.fabric.is_global_zero:
        typer.echo(
            f"{trainer.step} of {trainer.total_steps} steps; best in validation: "
            f"{trainer.best_sdr:.2f} dB SDR after step {trainer.best_step}; "
            f"it is in {trainer.output_dir / 'best'}"
        )
    if size := part_size(trainer.learner.optimizer):
        typer.echo(f"memory ran out: from then on, {size} of {preset.batch_size} segments at once")


def say_if_slower(preset: Preset) -> None:
    """Try mixed precision for a moment, and say so where it is slower than float32."""
    from tfswa_lab.performance.set_up import mixed_precision_ratio

    if preset.precision != "bf16-mixed":
        return
    ratio = mixed_precision_ratio(preset.device)
    if ratio > CLEARLY_SLOWER:
        say(
            f"mixed precision takes {ratio:.1f} times as long as float32 on this device, in a "
            "trial of a small block; try the run without --use-amp"
        )


def choose_batch_size(preset: Preset, resume: Path | None, folder: Path) -> int:
    """The smallest batch size that is nearly as fast as any that fits; prints why.

    It makes real training steps on the run's first segments, with a trainer of its own.

    Raises:
        FileExistsError: there is a run in its folder.
        RuntimeError: not even one segment fits.
        ValueError: the run is resumed, or has several processes.
    """
    from tfswa_lab.performance.batch_size import find_batch_size
    from tfswa_lab.training.checkpoint import refuse_another_run
    from tfswa_lab.training.run import augmentation_for, build_trainer

    if resume is not None:
        raise ValueError("a resumed run keeps its batch size; leave --batch-size auto out")
    if preset.devices > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--batch-size auto is for one process; find it with --devices 1 first")
    refuse_another_run(folder, None)  # now, not after minutes
    trainer = build_trainer(replace(preset, batch_size=1), None)
    learner, train_set = trainer.learner, trainer.train_set

    @lru_cache(maxsize=1)  # reading is no part of a step: workers read ahead
    def batches(size: int) -> list[dict]:
        starts = range(0, size * preset.accumulate, size)
        items = [[train_set[start + k] for k in range(size)] for start in starts]
        return [train_set.collate_fn(batch) for batch in items]

    def step(size: int) -> None:
        learner.augment = augmentation_for(replace(preset, batch_size=size))
        learner.step(batches(size))

    most = len(train_set) // preset.accumulate
    if trainer.fabric.device.type == "cpu":
        most = min(most, MOST_ON_CPU)
    typer.echo(f"looking for a batch size up to {most} by training steps; this takes a while")
    if preset.accumulate > 1:
        typer.echo(f"a step takes {preset.accumulate} batches; items/s counts one of them")
    # Two steps: all segments are equally long. Validation makes its batches smaller by itself.
    found = find_batch_size(step, state=learner, maximum=most, steps=2)
    typer.echo(f"{found}\ntaken: {found.knee}, the smallest that is nearly as fast as the fastest")
    return found.knee


def less_memory(folder: Path) -> str:
    """What to type after an out-of-memory: other options, or how the run goes on."""
    from tfswa_lab.training.checkpoint import list_checkpoints

    if not list_checkpoints(folder):
        return LESS_MEMORY
    return (
        f"{LESS_MEMORY}; the checkpoint in {folder} is kept: --resume {folder} "
        "--activation-checkpointing goes on"
    )


def run_folder(options: TrainOptions) -> Path:
    """The folder of a run for which none is given: for a resumed one, its own.

    >>> run_folder(TrainOptions(model="locoformer")).as_posix()
    'runs/locoformer-tiny'
    >>> run_folder(TrainOptions(resume=Path("runs/mine/checkpoints/step_00000120.ckpt"))).as_posix()
    'runs/mine'
    """
    resume = options.resume
    if resume is None:
        return Path("runs", "-".join(filter(None, (options.model, options.preset or "tiny"))))
    return resume if resume.is_dir() else resume.parent.parent
