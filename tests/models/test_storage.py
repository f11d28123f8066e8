"""What is saved comes back the same, and what is broken is refused by name."""

import json
import os

import pytest
import torch

from tfswa_lab.models.separator import build_separator
from tfswa_lab.models.storage import DESCRIPTION, MODELS, WEIGHTS, load_separator, save_separator
from tfswa_lab.stft import (
    LevelNormalizer,
    RMSNormalizer,
    RunningSpectrogramNormalizer,
    SpectrogramNormalizer,
)

LOCO = {"dim": 8, "num_blocks": 1, "hidden_dim": 8, "num_heads": 2, "attention_dim": 8}
MINI = {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": 1, "window_size": 4}


@pytest.fixture
def separator():
    torch.manual_seed(0)
    return build_separator(
        ("vocals", "other"), "complex", 4, 128, 32, True, sample_rate=16_000, **MINI
    )


def test_a_saved_separator_gives_the_same_samples(separator, tmp_path):
    separator(torch.randn(2, 2, 2000))  # moves the batch statistics, which must be saved too
    mixture = torch.randn(1, 2, 3000)
    loaded = load_separator(save_separator(separator, tmp_path / "model"))
    assert torch.equal(loaded(mixture), separator.eval()(mixture))
    assert loaded.stems == ("vocals", "other")
    assert loaded.sample_rate == 16_000
    assert loaded.mixture_consistency
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [DESCRIPTION, WEIGHTS]


def test_the_normalizer_comes_back_and_a_foreign_one_is_refused(tmp_path):
    separator = build_separator(
        ("vocals",), n_fft=128, hop_length=32, normalizer=LevelNormalizer(), **MINI
    )
    again = load_separator(save_separator(separator, tmp_path))
    assert type(again.normalizer) is LevelNormalizer
    separator.normalizer = torch.nn.Identity()
    with pytest.raises(ValueError, match="cannot save a Identity, only SpectrogramNormalizer"):
        save_separator(separator, tmp_path)


@pytest.mark.parametrize(
    "normalizer",
    [
        SpectrogramNormalizer(eps=1e-2),
        LevelNormalizer(eps=1e-2),
        RMSNormalizer(eps=1e-2),
        RunningSpectrogramNormalizer(2, 65, momentum=0.3, eps=1e-2),
    ],
)
def test_a_normalizer_comes_back_with_its_settings_and_statistics(tmp_path, normalizer):
    separator = build_separator(
        ("vocals",), n_fft=128, hop_length=32, normalizer=normalizer, **MINI
    )
    mixture = torch.randn(2, 2, 1000)
    separator(mixture)  # in training mode: moves running statistics
    loaded = load_separator(save_separator(separator, tmp_path))
    assert loaded.normalizer.settings == normalizer.settings
    assert torch.equal(loaded(mixture), separator.eval()(mixture))
    separator.normalizer.eps = 1e-5  # as it came back before
    assert not torch.equal(loaded(mixture), separator(mixture))


@pytest.mark.parametrize(
    "settings", [{"channels": 2}, {"channels": 0, "bins": 65}, {"bins": "65", "channels": 2}, []]
)
def test_foreign_settings_of_a_normalizer_are_refused(tmp_path, settings):
    normalizer = RunningSpectrogramNormalizer(2, 65)
    separator = build_separator(
        ("vocals",), n_fft=128, hop_length=32, normalizer=normalizer, **MINI
    )
    path = save_separator(separator, tmp_path) / DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer_settings": settings}))
    with pytest.raises(ValueError, match=DESCRIPTION):
        load_separator(tmp_path)


@pytest.mark.parametrize(
    ("mask", "model", "sizes", "normalizer"),
    [
        ("magnitude", "TFSWAUNet", MINI | {"in_channels": 2, "out_channels": 4}, "Spectrogram"),
        ("mapping", "TFLocoformer", LOCO | {"in_channels": 4, "out_channels": 8}, "Level"),
    ],
)
def test_descriptions_of_earlier_versions_still_load(tmp_path, mask, model, sizes, normalizer):
    description = {
        "model": model,
        "sizes": sizes,
        "n_fft": 128,
        "hop_length": 32,
        "stems": ["vocals", "other"],
        "mask": mask,
        "mixture_consistency": False,
        "sample_rate": 16_000,
        "audio_channels": 2,
        "bins": None,
        "normalizer": f"{normalizer}Normalizer",
    }
    torch.manual_seed(0)
    shape = {"n_fft": 128, "hop_length": 32, "sample_rate": 16_000}
    separator = build_separator(
        ("vocals", "other"), mask, architecture=MODELS[model], **shape, **sizes_alone(sizes)
    )
    save_separator(separator, tmp_path)
    (tmp_path / DESCRIPTION).write_text(json.dumps(description))
    mixture = torch.randn(1, 2, 1000)
    assert torch.equal(load_separator(tmp_path)(mixture), separator.eval()(mixture))


def sizes_alone(sizes):
    return {name: size for name, size in sizes.items() if not name.endswith("_channels")}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=DESCRIPTION):
        load_separator(tmp_path)


def test_a_truncated_file_is_refused(separator, tmp_path):
    weights = save_separator(separator, tmp_path) / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=WEIGHTS):
        load_separator(tmp_path)


def test_a_pickle_is_never_executed(separator, tmp_path):
    save_separator(separator, tmp_path)
    torch.save({"anything": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=WEIGHTS):
        load_separator(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "Unknown"},
        {"sizes": {"depth": 3}},
        {"sizes": {"dims": [-8, 8, 8, 8]}},
        {"sample_rate": -1},
        {"sample_rate": "44100"},
        {"stems": ["../../evil", "other"]},
        {"stems": "ab"},
    ],
)
def test_foreign_sizes_are_refused(separator, tmp_path, change):
    path = save_separator(separator, tmp_path) / DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=DESCRIPTION):
        load_separator(tmp_path)


def test_sizes_that_are_not_text_are_refused(separator, tmp_path):
    (save_separator(separator, tmp_path) / DESCRIPTION).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=DESCRIPTION):
        load_separator(tmp_path)


def test_a_model_that_could_not_be_loaded_is_not_saved(separator, tmp_path):
    separator.model = torch.nn.Identity()
    with pytest.raises(ValueError, match="cannot save a Identity"):
        save_separator(separator, tmp_path)
    assert not any(tmp_path.iterdir())


def test_weights_of_another_model_are_refused(separator, tmp_path):
    save_separator(separator, tmp_path / "a")
    other = build_separator(("vocals",), n_fft=128, hop_length=32, **MINI)
    save_separator(other, tmp_path / "b")
    (tmp_path / "b" / WEIGHTS).rename(tmp_path / "a" / WEIGHTS)
    with pytest.raises(ValueError, match="copy both files"):
        load_separator(tmp_path / "a")


def test_an_interrupted_save_keeps_the_good_model(separator, tmp_path, monkeypatch):
    save_separator(separator, tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()

    def dies(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", dies)
    with pytest.raises(KeyboardInterrupt):
        save_separator(separator, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == before
    load_separator(tmp_path)
