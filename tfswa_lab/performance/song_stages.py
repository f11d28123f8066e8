"""A song through four models, one after the other: separate, refine, find the voice and its pitch.

Notebook: 10_staged_pipelines
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tfswa_lab.inference.separate import Segmentation, separate_track
from tfswa_lab.models.separator import Separator, output_channels
from tfswa_lab.models.storage import load_separator
from tfswa_lab.models.tf_locoformer import TFLocoformer
from tfswa_lab.performance.stage import Stage
from tfswa_lab.stft import STFTProcessor
from tfswa_lab.weights import BAND

HOP = 1024  # samples between frames
BINS = 256  # of 2049 that the refiner sees: up to 2.7 kHz
QUIET_DB = -40.0  # below the loudest frame, nobody sings
VOICE = ("vocals",)


class Voice(NamedTuple):
    """What is known of the voice so far.

    Args:
        audio: `(c, s)`.
        sung: for each frame, whether there is a voice.
        pitch_hz: for each frame, NaN where there is none.
    """

    audio: Tensor
    sung: Tensor | None = None
    pitch_hz: Tensor | None = None


def song_stages(separator: str | Path = BAND, segment_seconds: float = 6.0) -> list[Stage]:
    """Stages that take a song `(2, s)` at 44.1 kHz, and end with a `Voice`.

    The refiner is a small TF-Locoformer with random weights, and adds a hundredth of its output: it
    takes memory and time as a trained one does, and changes the voice little. Voice activity and
    pitch are stand-ins from librosa.

    Args:
        separator: as for `load_separator`; one of its stems is "vocals".
        segment_seconds: that the networks see at once.
    """
    segmentation = Segmentation(segment_seconds)
    return [
        Stage("separator", partial(load_separator, separator), partial(_separate, segmentation)),
        Stage("refiner", _refiner, partial(_refine, segmentation)),
        Stage("voice activity", _loudness, _find_voice),
        Stage("pitch", _yin, _find_pitch),
    ]


def _separate(segmentation: Segmentation, separator: Separator, song: Tensor) -> Voice:
    estimates = separate_track(separator, song, segmentation)
    # Without the copy, the voice would keep all stems alive.
    return Voice(estimates[separator.stems.index("vocals")].clone())


def _refiner() -> Separator:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        network = TFLocoformer(
            4,
            output_channels(VOICE, "mapping"),
            dim=16,
            num_blocks=1,
            hidden_dim=32,
            attention_dim=16,
        )
    return Separator(network, STFTProcessor(4 * HOP, HOP), VOICE, "mapping", bins=BINS).eval()


def _refine(segmentation: Segmentation, refiner: Separator, voice: Voice) -> Voice:
    return Voice(voice.audio + 0.01 * separate_track(refiner, voice.audio, segmentation)[0])


def _loudness():
    import librosa

    return partial(librosa.feature.rms, frame_length=2 * HOP, hop_length=HOP)


def _find_voice(loudness, voice: Voice) -> Voice:
    level = torch.from_numpy(loudness(y=voice.audio.mean(0).cpu().numpy())[0])
    return voice._replace(sung=level > level.max() * 10 ** (QUIET_DB / 20))


def _yin():
    import librosa

    return partial(
        librosa.yin, fmin=65.0, fmax=1000.0, sr=44_100, frame_length=4 * HOP, hop_length=HOP
    )


def _find_pitch(yin, voice: Voice) -> Voice:
    pitch = torch.from_numpy(yin(y=voice.audio.mean(0).cpu().numpy()))
    return voice._replace(pitch_hz=torch.where(voice.sung, pitch, torch.nan))
