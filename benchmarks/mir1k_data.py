"""Endless mixtures out of MIR-1K's training clips, held in memory at several speeds."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from tfswa_lab.data.augment.stretch import change_speed
from tfswa_lab.data.mir1k import MIR1K, RATE
from tfswa_lab.data.musdb import MUSDB18Dataset

# Songs of the two training singers that no network is trained on while the recipe is chosen.
HELD_OUT = ("abjones_5", "amy_1", "amy_9", "amy_14")


def read_clips(root: str, split: str) -> dict[str, Tensor]:
    """Clips `(2, s)`, accompaniment and voice, by name."""
    clips = MIR1K(root, split)
    return {item["clip"]: torch.cat([item["accompaniment"], item["voice"]]) for item in clips}


def is_held_out(clip: str) -> bool:
    """Whether a clip, `singer_song_number`, is of a held-out song."""
    return clip.rsplit("_", 1)[0] in HELD_OUT


class Duets(Dataset):
    """Segments of a voice and an accompaniment, a pure function of (seed, epoch, index).

    Args:
        clips: `(2, s)` each, at 16 kHz.
        speeds: factors; a voice at another speed is a voice of another size.
        remix: probability that the accompaniment is another clip's, at its own speed.
        gain_db: voice and accompaniment each vary by up to this.
        seconds: length of a segment.
        length: segments in an epoch.
        seed: of all choices.
    """

    collate_fn = staticmethod(MUSDB18Dataset.collate_fn)

    def __init__(
        self,
        clips: dict[str, Tensor],
        speeds: tuple[float, ...],
        remix: float,
        gain_db: float,
        seconds: float,
        length: int,
        seed: int,
    ):
        self.names = list(clips)
        self.clips = {
            speed: [change_speed(clip, speed) for clip in clips.values()] for speed in speeds
        }
        self.speeds = speeds
        self.remix = remix
        self.gain_db = gain_db
        self.segment = round(seconds * RATE)
        self.length = length
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw new segments."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        chance = np.random.default_rng((self.seed, self._epoch.item(), index))
        name, (accompaniment, voice) = self._draw(chance)
        if chance.random() < self.remix:
            other, (accompaniment, _) = self._draw(chance)
            name = f"{name} + {other}"
        gains = chance.choice([-1, 1], 2) * 10 ** (chance.uniform(-1, 1, 2) * self.gain_db / 20)
        voice, accompaniment = float(gains[0]) * voice, float(gains[1]) * accompaniment
        return {
            "mixture": (voice + accompaniment)[None],
            "stems": voice[None, None],
            "track": name,
            "start_seconds": 0.0,
        }

    def _draw(self, chance: np.random.Generator) -> tuple[str, Tensor]:
        """A segment `(2, s)` of any clip at any speed, with silence after a short one."""
        which = int(chance.integers(len(self.names)))
        clip = self.clips[self.speeds[int(chance.integers(len(self.speeds)))]][which]
        start = int(chance.integers(max(1, clip.shape[-1] - self.segment + 1)))
        segment = clip[:, start : start + self.segment]
        return self.names[which], F.pad(segment, (0, self.segment - segment.shape[-1]))
