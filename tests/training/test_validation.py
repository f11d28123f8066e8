"""Scores against whole songs, the schedule against torch's, images against tones."""

import math

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchmetrics.functional.audio import signal_noise_ratio
from toy_run import STEMS, ToyLoss

from tfswa_lab.stft import STFTProcessor
from tfswa_lab.training.launch import launch
from tfswa_lab.training.learner import NonFiniteError, make_schedule, warmup_cosine
from tfswa_lab.training.logbook import spectrogram_image
from tfswa_lab.training.validation import validate, validation_loader


class Songs(torch.utils.data.Dataset):
    """Segments of 100 samples out of songs of 300; in the second song nobody sings."""

    def __init__(self):
        self.songs = 0.1 * torch.randn(3, 2, 2, 300, generator=torch.Generator().manual_seed(0))
        self.songs[1, 0] = 0

    def __len__(self):
        return 9

    def __getitem__(self, index):
        song, part = divmod(index, 3)
        stems = self.songs[song, ..., 100 * part : 100 * (part + 1)]
        return {
            "mixture": stems.sum(0),
            "stems": stems,
            "track": f"song {song}",
            "start_seconds": float(part),
        }


class Thirds(torch.nn.Module):
    """Gives a third of the mixture to the first stem and the rest to the other."""

    stems = STEMS

    def forward(self, mixture):
        return torch.stack([mixture / 3, 2 * mixture / 3], 1)


class ForTwo(Thirds):
    """Has memory for two items."""

    tried = []

    def forward(self, mixture):
        self.tried.append(len(mixture))
        if len(mixture) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(mixture)


def test_validation_survives_an_out_of_memory():
    loader, fabric = validation_loader(Songs(), 5, 0, launch()), launch()
    scores = [validate(separator, ToyLoss(), loader, fabric) for separator in (Thirds(), ForTwo())]
    assert scores[0] == scores[1]
    assert ForTwo.tried == [5, 2, 2, 1, 2, 2], "it remembers"


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_scores_are_those_of_whole_songs(batch_size):
    data, fabric = Songs(), launch()
    loader = validation_loader(data, batch_size, 0, fabric)
    scores = validate(Thirds(), ToyLoss(), loader, fabric)
    songs = data.songs.double()
    estimates = Thirds()(songs.sum(1))

    def expected(estimate, stem, tracks):
        pairs = [(estimate[k].flatten(), songs[k, stem].flatten()) for k in tracks]
        return np.mean([signal_noise_ratio(e, target).item() for e, target in pairs])

    sung = [0, 2]
    vocals = expected(estimates[:, 0], 0, sung)
    other = expected(estimates[:, 1], 1, range(3))
    assert scores["sdr/vocals"] == pytest.approx(vocals, abs=1e-4)
    assert scores["sdr/other"] == pytest.approx(other, abs=1e-4)
    assert scores["sdr"] == pytest.approx((vocals + other) / 2, abs=1e-4)
    assert scores["floor/vocals"] == pytest.approx(expected(songs.sum(1), 0, sung), abs=1e-4)
    l1 = (estimates - songs).abs().mean().item()
    assert scores["loss"] == pytest.approx(l1, rel=1e-5)


def test_a_stem_that_never_sounds_has_no_score_and_spoils_no_mean():
    data, fabric = Songs(), launch()
    data.songs[:, 0] = 0
    scores = validate(Thirds(), ToyLoss(), validation_loader(data, 3, 0, fabric), fabric)
    assert math.isnan(scores["sdr/vocals"])
    assert scores["sdr"] == scores["sdr/other"]


def test_after_the_warm_up_the_schedule_is_torchs_cosine():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizers = [torch.optim.SGD([weight], 0.3) for _ in range(2)]
    ours = make_schedule(optimizers[0], 10, 110)
    torchs = CosineAnnealingLR(optimizers[1], 100)
    weight.grad = torch.zeros(1)
    rates = []
    for _ in range(110):
        rates.append(ours.get_last_lr()[0])
        optimizers[0].step()
        ours.step()
    for rate in rates[10:]:
        assert rate == pytest.approx(torchs.get_last_lr()[0], abs=1e-12)
        optimizers[1].step()
        torchs.step()
    assert rates[:10] == pytest.approx([0.03 * (k + 1) for k in range(10)])


def test_the_schedule_knows_no_division_by_zero():
    assert warmup_cosine(0, 0, 1) == 1
    assert warmup_cosine(0, 5, 3) == 0.2
    assert warmup_cosine(9, 0, 9) == 0


@pytest.mark.parametrize(("amplitude", "grey"), [(1.0, 1.0), (0.01, 0.5), (0.0, 0.0)])
def test_the_grey_of_a_tone_is_its_level(amplitude, grey):
    stft = STFTProcessor(256, 64)
    tone = amplitude * torch.sin(2 * math.pi * 32 / 256 * torch.arange(4096))
    image = spectrogram_image(tone, stft)
    assert image.shape == (129, 65)
    row = 128 - 32  # low bins at the bottom
    assert image[row, 32].item() == pytest.approx(grey, abs=0.002)
    assert image[0, 32] < 0.01


def test_a_loss_that_is_no_number_names_its_song():
    class Poisoned(Songs):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            if index == 4:
                item["stems"][0, 0, 0] = math.inf
            return item

    fabric = launch()
    loader = validation_loader(Poisoned(), 2, 0, fabric)
    with pytest.raises(NonFiniteError, match=r"validation .* song 1 at 1\.00 s"):
        validate(Thirds(), ToyLoss(), loader, fabric)
