"""From a preset to a trainer that is ready to fit: the set-up behind `tfswa-lab train`.

Notebook: 07_training
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tfswa_lab.data.augment import (
    AudioAugmentation,
    Augmentation,
    Chain,
    ChannelSwap,
    Gain,
    Polarity,
    Remix,
    SpectrogramMasking,
)
from tfswa_lab.data.band import ensure_band
from tfswa_lab.data.musdb import MUSDB18Dataset, check_choice
from tfswa_lab.models.mask_resunet import MaskResUNet
from tfswa_lab.models.separator import HEADS, MASKS, Separator, build_separator, output_channels
from tfswa_lab.models.tf_locoformer import SIZES, TFLocoformer
from tfswa_lab.models.tfswa_resunet import TFSWAResUNet
from tfswa_lab.models.tfswa_unet import TFSWAUNet
from tfswa_lab.training.checkpoint import find_checkpoint, load_checkpoint
from tfswa_lab.training.launch import best_mixed_precision
from tfswa_lab.training.losses import SourceSeparationLoss
from tfswa_lab.training.presets import OF_MODEL, PRESETS, Preset
from tfswa_lab.training.trainer import Trainer

# The networks that can be trained, and their sizes by name; the class has the missing sizes.
NETWORKS = {
    "tfswa_unet": (TFSWAUNet, {}),
    "resunet": (TFSWAResUNet, {"tiny": {"channels": (8, 16, 24, 32), "num_tfswa": 1}}),
    "locoformer": (TFLocoformer, {"tiny": SIZES["tiny"], "small": SIZES["S"]}),
    "mask_resunet": (MaskResUNet, {"tiny": {"channels": (12, 16, 24), "bottleneck": 32}}),
}
UNET_SIZES = ("dims", "depths", "window_size", "num_heads")


def choose_preset(
    name: str | None, resume: str | Path | None, changes: dict, use_amp: bool | None = None
) -> Preset:
    """A preset by name, or that of a checkpoint, with some fields changed.

    Args:
        name: of a preset, None for "tiny", or for the checkpoint's own.
        resume: a run's folder or one of its checkpoints, None for neither.
        changes: fields of `Preset`.
        use_amp: True for the mixed precision that fits the device, False for none.

    Raises:
        FileNotFoundError: there is nothing to resume.
        ValueError: there is no such preset or no choice of it, or a change makes no sense.
    """
    if resume is None:
        preset = named_preset(name or "tiny", changes.get("model", "tfswa_unet"))
    elif name is None:
        preset = preset_of(find_checkpoint(resume))
        if changes.get("model", preset.model) != preset.model:
            raise ValueError(f"a resumed run keeps its model={preset.model!r}; leave model out")
    else:
        raise ValueError(f"a resumed run keeps its preset; leave preset={name!r} out")
    if use_amp is not None:
        device = changes.get("device", preset.device)
        precision = best_mixed_precision(device) if use_amp else "32-true"
        if changes.get("precision", precision) != precision:
            raise ValueError(f"precision={changes['precision']} already says which; drop use_amp")
        changes = changes | {"precision": precision}
    preset = replace(preset, **changes)
    foreign = ", ".join(name for name in UNET_SIZES if name in changes)
    if foreign and preset.model != "tfswa_unet":
        raise ValueError(f"model={preset.model!r} has no {foreign}: these are of tfswa_unet")
    return preset


def named_preset(name: str, model: str) -> Preset:
    """A preset for one of the networks.

    Raises:
        ValueError: there is no such preset or network.
    """
    check_choice("preset", name, tuple(PRESETS))
    check_choice("model", model, tuple(NETWORKS))
    return replace(PRESETS[name], model=model, **OF_MODEL[model])


def preset_of(checkpoint: Path) -> Preset:
    """The preset that a run was started with.

    Raises:
        ValueError: the checkpoint is broken, or was not written by `tfswa-lab train`.
    """
    saved = load_checkpoint(checkpoint)["settings"]["training"]
    odd = saved.keys() ^ {field.name for field in fields(Preset)}
    if not odd <= {"model", "size"}:  # earlier versions had one network
        raise ValueError(
            f"{checkpoint} is not of a run of tfswa-lab train, or of another version "
            f"({', '.join(sorted(odd))}); resume it with the script that started it"
        )
    return Preset(**saved)


def build_trainer(
    preset: Preset,
    output_dir: str | Path | None,
    progress: bool = False,
    train_step: Callable[..., Any] | None = None,
) -> Trainer:
    """Data, separator, loss and trainer of a preset; the arguments are those of `Trainer`.

    The first weights come from torch's global generator: seed it before.

    Raises:
        FileNotFoundError: there are no songs in `data_root`.
        ValueError: something about the preset or the songs makes no sense.
    """
    trainer = Trainer(
        separator_of(preset),
        loss_of(preset),
        songs_of(preset, "train"),
        songs_of(preset, "valid"),
        preset,
        output_dir,
        progress=progress,
        train_step=train_step,
    )
    check_segment(preset, trainer.train_set)
    learner = trainer.learner
    learner.augment = augmentation_for(preset)
    learner.masking = SpectrogramMasking() if preset.augment == "full" else None
    return trainer


def separator_of(preset: Preset) -> Separator:
    """A fresh separator; its estimates sum to the mixture if `other` is among the stems.

    Raises:
        ValueError: the mask does not suit the network, or a size makes no sense.
    """
    stems = preset.target_stems
    architecture, sizes = NETWORKS[preset.model]
    if preset.mask not in HEADS:  # offer only those that suit the network
        check_choice("mask", preset.mask, getattr(architecture, "separator_heads", MASKS))
    if preset.model == "tfswa_unet":
        sizes = {preset.size: {name: getattr(preset, name) for name in UNET_SIZES}}
    return build_separator(
        stems,
        preset.mask,
        output_channels(("one",), preset.mask),  # magnitudes for magnitudes, parts for parts
        preset.n_fft,
        preset.hop_length,
        mixture_consistency="other" in stems and len(stems) > 1,
        sample_rate=preset.sample_rate,
        bins=preset.bins,
        architecture=architecture,
        **sizes.get(preset.size, {}),
    )


def loss_of(preset: Preset) -> SourceSeparationLoss:
    """The weighted loss."""
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
    """Random segments of the songs to train on, or all segments of those to validate on."""
    return MUSDB18Dataset(
        preset.data_root or ensure_band(),
        split,
        preset.target_stems,
        preset.segment_seconds,
        samples_per_track=preset.samples_per_track if split == "train" else 1,
        sample_rate=preset.sample_rate,
        seed=preset.seed,
    )


def check_segment(preset: Preset, songs: MUSDB18Dataset) -> None:
    """Refuse segments that are shorter than a window, or longer than every song.

    Raises:
        ValueError: names both lengths.
    """
    seconds, rate = preset.segment_seconds, preset.sample_rate
    longest = max(track.length(rate) for track in songs.tracks) / rate
    if not preset.n_fft / rate <= seconds <= longest:
        raise ValueError(
            f"segment_seconds={seconds}: a segment must hold a window of n_fft={preset.n_fft} "
            f"({preset.n_fft / rate:.2f} s), and the longest song has {longest:.2f} s"
        )


def augmentation_for(preset: Preset, share: int | None = None) -> Augmentation | None:
    """The augmentation that `preset.augment` names: none, the cheap effects, or all of them.

    "light" is gain, channel swap and polarity after stems of different songs were put together;
    "full" adds time stretch and pitch shift here, and `SpectrogramMasking` in the learner.

    The recipe is the same for any number of devices, because the learner augments the batch of all
    of them together. A batch of one segment has no other to be remixed with, as in "tiny".

    Args:
        preset: its `augment`, `batch_size` and `sample_rate` count.
        share: of a batch on one device. It has no effect; earlier versions dropped Remix for one.

    Raises:
        ValueError: there is no such choice.
    """
    check_choice("augment", preset.augment, ("none", "light", "full"))
    if preset.augment == "none":
        return None
    effects = [Gain(), ChannelSwap(), Polarity()]
    if preset.augment == "full":
        effects = AudioAugmentation(n_fft=vocoder_window(preset.sample_rate)).augmentations
    return Chain([Remix(), *effects] if preset.batch_size > 1 else effects)


def vocoder_window(sample_rate: int) -> int:
    """The power of two nearest to the 46 ms that 2048 samples are at 44.1 kHz.

    >>> [vocoder_window(rate) for rate in (44_100, 16_000, 11_025)]
    [2048, 1024, 512]
    """
    return 2 ** round(math.log2(2048 * sample_rate / 44_100))
