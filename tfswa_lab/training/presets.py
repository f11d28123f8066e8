"""Whole recipes by name: sizes of the network, its songs, its loss, and how it is trained.

`dataclasses.replace(TINY, batch_size=2)` changes a recipe. This file needs no torch.

Notebook: 07_training
"""

from __future__ import annotations

from dataclasses import dataclass

from tfswa_lab.training.config import TrainingConfig


@dataclass(frozen=True)
class Preset(TrainingConfig):
    """Everything that `training.run.build_trainer` builds a run from, beyond how to train.

    Args:
        model: "tfswa_unet", "resunet", "locoformer" or "mask_resunet".
        size: "tiny", "small" or "default", of each network but the TFSWA-UNet.
        dims: channels of the three encoder stages and the bottleneck of the TFSWA-UNet.
        depths: blocks of these.
        window_size: cells per side of its attention windows.
        num_heads: its attention heads.
        mask: a head of `Separator` that suits the network.
        n_fft: window of the transform in samples.
        hop_length: distance of two frames in samples.
        bins: the network sees this many of the lowest bins, None for all.
        sample_rate: in Hz; songs are resampled to it.
        target_stems: what to separate; `other` is all that is not named.
        segment_seconds: length of a segment.
        samples_per_track: segments of each song in an epoch.
        augment: "none", "light" or "full", see `training.run.augmentation_for`.
        l1_weight: of `L1SpectrogramLoss`.
        mrstft_weight: of `MultiResolutionSTFTLoss`.
        waveform_weight: of `L1WaveformLoss`.
        sdr_weight: of `SDRLoss`.
        data_root: a tree of MUSDB18's shape, empty for the embedded band.

    All others are those of `TrainingConfig`. There is no dropout: of these networks only
    `TFLocoformer` has been published with it, and takes it as an argument; the recipes rely on
    augmentation, weight decay and averaged weights instead.
    """

    model: str = "tfswa_unet"
    size: str = "default"
    dims: tuple[int, ...] = (32, 64, 128, 256)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    window_size: int = 8
    num_heads: int = 8
    mask: str = "magnitude"
    n_fft: int = 2048
    hop_length: int = 512
    bins: int | None = None
    sample_rate: int = 44_100
    target_stems: tuple[str, ...] = ("vocals", "drums", "bass", "other")
    segment_seconds: float = 6.0
    samples_per_track: int = 16
    augment: str = "light"
    l1_weight: float = 1.0
    mrstft_weight: float = 1.0
    waveform_weight: float = 0.0
    sdr_weight: float = 0.0
    data_root: str = ""


# Minutes on two CPU cores: the voice of the embedded band.
TINY = Preset(
    size="tiny",
    dims=(8, 16, 24, 32),
    depths=(1, 1, 1, 1),
    num_heads=1,
    n_fft=512,
    hop_length=170,
    sample_rate=11_025,
    target_stems=("vocals", "other"),
    segment_seconds=3.0,
    samples_per_track=6,
    batch_size=1,
    max_epochs=8,
    learning_rate=7e-3,
    ema_decay=0.97,
)

# Real songs at 44.1 kHz, all four stems, one GPU.
SMALL = Preset(
    size="small",
    dims=(16, 32, 64, 128),
    depths=(1, 1, 1, 1),
    num_heads=2,
    batch_size=8,
    max_epochs=200,
    precision="bf16-mixed",
    num_workers=4,
    device="auto",
)

# The published sizes, several GPUs.
DEFAULT = Preset(
    batch_size=8,
    max_epochs=500,
    learning_rate=5e-4,
    precision="bf16-mixed",
    activation_checkpointing=True,
    num_workers=8,
    device="auto",
)

PRESETS = {"tiny": TINY, "small": SMALL, "default": DEFAULT}

# The fields that differ where another network is trained. A step of "small" is predicted to take
# 36 GiB of a GPU for the TFSWA-UNet, 13, 63 and 7 GiB for the others (`memory.predict`).
OF_MODEL = {
    "tfswa_unet": {},
    "resunet": {
        "mask": "magnitude mapping",
        "learning_rate": 1e-3,
        "activation_checkpointing": False,
    },
    "locoformer": {"mask": "mapping", "learning_rate": 1e-3, "activation_checkpointing": True},
    "mask_resunet": {"mask": "complex", "learning_rate": 2e-3, "activation_checkpointing": False},
}
