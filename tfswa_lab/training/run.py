"""From a preset to a trainer that is ready to fit: the set-up behind `tfswa-lab train`.

Notebook: 07_training
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tfswa_lab.data.augment import Augmentation, Chain, ChannelSwap, Gain, Polarity, Remix
from tfswa_lab.data.band import ensure_band
from tfswa_lab.data.musdb import MUSDB18Dataset
from tfswa_lab.models.separator import Separator, build_separator
from tfswa_lab.training.checkpoint import find_checkpoint, load_checkpoint
from tfswa_lab.training.launch import best_mixed_precision
from tfswa_lab.training.losses import SourceSeparationLoss
from tfswa_lab.training.presets import PRESETS, Preset
from tfswa_lab.training.trainer import Trainer


def choose_preset(name: str, resume: str | Path | None, options: dict) -> Preset:
    """A preset by name, or that of a checkpoint, with some fields set anew.

    Args:
        name: of a preset; not looked at when resuming.
        resume: a run's folder or one of its checkpoints, None for neither.
        options: fields of `Preset`, and `use_amp`, short for the precision that fits the device.

    Raises:
        FileNotFoundError: there is nothing to resume.
        ValueError: there is no such preset, or an option makes no sense.

    Notebook: 07_training
    """
    if resume is not None:
        checkpoint = load_checkpoint(find_checkpoint(resume))
        preset = Preset(**checkpoint["settings"]["training"])
    elif name in PRESETS:
        preset = PRESETS[name]
    else:
        raise ValueError(f"preset={name!r} is unknown; choose among {', '.join(PRESETS)}")
    options = dict(options)
    if "use_amp" in options:
        device = options.get("device", preset.device)
        mixed = best_mixed_precision(device) if options.pop("use_amp") else "32-true"
        if options.setdefault("precision", mixed) != mixed:
            raise ValueError(f"precision={options['precision']} already says which; drop use_amp")
    return replace(preset, **options)


def build_trainer(preset: Preset, output_dir: str | Path | None, progress: bool = False) -> Trainer:
    """Data, separator, loss and trainer of a preset.

    The first weights come from torch's global generator: seed it before.

    Raises:
        FileNotFoundError: there are no songs in `data_root`.
        ValueError: something about the preset or the songs makes no sense.

    Notebook: 07_training
    """
    trainer = Trainer(
        separator_of(preset),
        loss_of(preset),
        songs_of(preset, "train"),
        songs_of(preset, "valid"),
        preset,
        output_dir,
        progress=progress,
    )
    if preset.augment:
        trainer.augment = augmentation_for(preset.batch_size // trainer.fabric.world_size)
    return trainer


def separator_of(preset: Preset) -> Separator:
    """A fresh separator; its estimates sum to the mixture where `other` makes the stems complete.

    Notebook: 07_training
    """
    stems = preset.target_stems
    return build_separator(
        stems,
        preset.mask,
        2 if preset.mask == "magnitude" else 4,
        preset.n_fft,
        preset.hop_length,
        mixture_consistency="other" in stems and len(stems) > 1,
        sample_rate=preset.sample_rate,
        bins=preset.bins,
        dims=preset.dims,
        depths=preset.depths,
        window_size=preset.window_size,
        num_heads=preset.num_heads,
    )


def loss_of(preset: Preset) -> SourceSeparationLoss:
    """The weighted loss.

    Notebook: 07_training
    """
    return SourceSeparationLoss(
        preset.target_stems,
        preset.l1_weight,
        preset.mrstft_weight,
        preset.waveform_weight,
        preset.sdr_weight,
        n_fft=preset.n_fft,
        hop_length=preset.hop_length,
    )


def songs_of(preset: Preset, split: str) -> MUSDB18Dataset:
    """Random stretches of the songs to train on, or all stretches of those to validate on.

    Notebook: 07_training
    """
    return MUSDB18Dataset(
        preset.data_root or ensure_band(),
        split,
        preset.target_stems,
        preset.segment_seconds,
        samples_per_track=preset.samples_per_track if split == "train" else 1,
        sample_rate=preset.sample_rate,
        seed=preset.seed,
    )


def augmentation_for(items: int) -> Augmentation:
    """What costs next to nothing and helps most; `AudioAugmentation` has the rest.

    Args:
        items: in a process's share of a batch; one alone cannot be remixed.

    Notebook: 07_training
    """
    remix = [Remix()] if items > 1 else []
    return Chain([*remix, Gain(), ChannelSwap(), Polarity()])
