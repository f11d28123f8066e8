"""The first cells: which folder, which seconds, which versions."""

import pytest
import torch
from torch import nn

from tfswa_lab.audio import SAMPLE_RATE
from tfswa_lab.data.musdb import MUSDB18Dataset
from tfswa_lab.teaching.lesson import (
    check_parameters,
    fits,
    lesson_root,
    loudest_excerpt,
    versions,
)

RIGHT = [
    {"quick": True, "seed": 0, "device": "auto", "data_root": ""},
    {"quick": False, "seed": 7, "device": "cuda:1", "data_root": "/songs", "gpu_gib": 8.0},
    {"device": torch.device("cpu"), "gpu_gib": 8},  # the set-up cell has run before
]
# As papermill's -p reads `false`, `no`, `0`, `None`, `1.5`, `True`, `nan` and `80 GB`.
WRONG = [
    *(("quick", value) for value in ("false", "no", "", 0, 1.0, None)),
    *(("seed", value) for value in ("0", 1.5, True, None)),
    *(("device", value) for value in (0, None, True)),
    *(("data_root", value) for value in (5, None, False)),
    *(("gpu_gib", value) for value in ("80 GB", True, None, float("nan"), float("inf"))),
]


@pytest.mark.parametrize("parameters", RIGHT)
def test_parameters_of_the_right_type_pass(parameters):
    check_parameters(**parameters)


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_parameter_of_the_wrong_type_is_refused_with_the_fix(name, value):
    with pytest.raises(ValueError, match=rf"^{name}={value!r} .*must be .*: -p {name} \S"):
        check_parameters(**RIGHT[0] | {name: value})


def song(vocals: torch.Tensor) -> dict:
    stems = torch.stack([vocals, *(0.01 * torch.randn(3, *vocals.shape))])
    return {"track": f"song {len(vocals)}", "mixture": stems.sum(0), "stems": stems}


class Songs(list):
    """What `loudest_excerpt` needs of a data set."""

    sample_rate = SAMPLE_RATE


def test_the_excerpt_is_where_the_voice_is_loudest():
    vocals = 1e-3 * torch.randn(2, 10 * SAMPLE_RATE)
    vocals[:, 6 * SAMPLE_RATE : 8 * SAMPLE_RATE] += 0.3
    excerpt = loudest_excerpt(Songs([song(vocals)]), "vocals", seconds=2.0)
    assert excerpt.start_seconds == pytest.approx(6.0, abs=0.1)
    assert excerpt.mixture.shape == (2, 2 * SAMPLE_RATE)
    assert excerpt.stems.shape == (4, 2, 2 * SAMPLE_RATE)
    torch.testing.assert_close(excerpt.stems.sum(0), excerpt.mixture)


def test_instrumentals_are_passed_over():
    silent = song(torch.zeros(2, SAMPLE_RATE))
    sung = song(0.1 * torch.randn(2, SAMPLE_RATE)) | {"track": "sung"}
    assert loudest_excerpt(Songs([silent, silent, sung]), "vocals", 0.5).track == "sung"
    assert loudest_excerpt(Songs([silent, sung]), "drums", 0.5).track == "sung"
    with pytest.raises(ValueError, match="in none of 2 tracks"):
        loudest_excerpt(Songs([silent, silent]), "vocals", 0.5)


def test_a_short_track_is_taken_whole():
    excerpt = loudest_excerpt(Songs([song(torch.randn(2, 1000))]), "vocals", seconds=6.0)
    assert (excerpt.start_seconds, excerpt.mixture.shape) == (0.0, (2, 1000))


def test_songs_of_another_rate_are_refused():
    songs = Songs([song(torch.randn(2, 1000))])
    songs.sample_rate = 48_000
    with pytest.raises(ValueError, match="48000 Hz; pass sample_rate=44_100"):
        loudest_excerpt(songs)


def test_a_misspelt_stem_is_named():
    with pytest.raises(ValueError, match="stem='voice'"):
        loudest_excerpt(Songs([]), "voice")


def test_the_band_has_something_to_show_in_every_stem(band_root):
    songs = MUSDB18Dataset(lesson_root(""), "test", segment_seconds=None)
    for stem in ("vocals", "drums", "bass", "other"):
        assert loudest_excerpt(songs, stem, 4.0).mixture.shape == (2, 4 * SAMPLE_RATE)


@pytest.mark.audio
def test_real_songs_with_silent_vocals_are_passed_over(music_delta):
    root = lesson_root(str(music_delta))
    for split in ("train", "test"):
        songs = MUSDB18Dataset(root, split, segment_seconds=None)
        excerpt = loudest_excerpt(songs, "vocals", 4.0)
        assert excerpt.stems[0].abs().max() > 0.05


def test_a_folder_that_is_no_data_set_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="must contain the folders train/ and test/"):
        lesson_root(str(tmp_path))
    (tmp_path / "test").mkdir()
    assert lesson_root(str(tmp_path)) == tmp_path.resolve()


def test_versions_name_what_a_bug_report_needs():
    line = versions(torch.device("cpu"))
    assert "Python 3" in line
    assert f"torch {torch.__version__.partition('+')[0]}" in line
    assert "cpu" in line


def layer_of_12_mib():
    """4 MiB of weights, 4 of their gradient and 4 of input."""
    layer, x = nn.Linear(1024, 1024, bias=False), torch.zeros(1024, 1024)
    return lambda: layer(x).sum().backward()


@pytest.mark.parametrize(("free_mib", "fit"), [(16, True), (14, True), (13, False), (8, False)])
def test_a_step_fits_with_a_tenth_to_spare(free_mib, fit, monkeypatch, capsys):
    asked = []

    def mem_get_info(device):
        asked.append(device)
        return free_mib * 2**20, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    device = torch.device("cuda:1")
    assert fits(layer_of_12_mib, device, steps=1) is fit
    assert asked == [device]
    said = f"does not fit this GPU: would take 12.00 MiB, {free_mib}.00 MiB is free"
    assert capsys.readouterr().out.strip() == ("" if fit else said)


def test_everything_fits_the_cpu(capsys):
    def make_step():
        raise AssertionError("nothing has to be predicted")

    assert fits(make_step, torch.device("cpu"))
    assert not capsys.readouterr().out
