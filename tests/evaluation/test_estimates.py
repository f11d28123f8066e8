"""Estimates as other programs write them: FLAC and MP3, with or without the level of the split."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from tfswa_lab.audio import STEMS
from tfswa_lab.evaluation import evaluate
from tfswa_lab.evaluation.estimates import FolderEstimates, ModelEstimates
from tfswa_lab.evaluation.scoring import Evaluation, Scoring
from tfswa_lab.models.separator import build_separator

RATE = 8000
MINI = {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": 1, "window_size": 4}
QUICK = Evaluation(window=0.5, hop=0.5, bounds=())


def write(folder, waves, suffix=".wav", **options):
    folder.mkdir(parents=True)
    for name, wave in waves.items():
        soundfile.write(folder / f"{name}{suffix}", wave, RATE, **options)


@pytest.fixture
def stems():
    random = np.random.default_rng(0).standard_normal((4, 2 * RATE, 2))
    return dict(zip(STEMS, np.round(0.05 * random * 32_768) / 32_768, strict=True))


@pytest.fixture
def guesses(stems):
    random = np.random.default_rng(1)
    noisy = {x: wave + 0.01 * random.standard_normal(wave.shape) for x, wave in stems.items()}
    return {name: np.round(wave * 32_768) / 32_768 for name, wave in noisy.items()}


@pytest.fixture
def data(tmp_path, stems):
    write(tmp_path / "data/test/A - B", stems | {"mixture": sum(stems.values())})
    return tmp_path / "data"


def scores_of(folder, data, out, stems=STEMS):
    return evaluate(FolderEstimates(folder, stems), data, out, QUICK).scores["estimates"][0]


@pytest.mark.parametrize("suffix", [".flac", ".FLAC", ".aiff"])
@pytest.mark.parametrize("place", ["test/A - B", "A - B"])
def test_other_lossless_estimates_score_as_wav(data, guesses, tmp_path, suffix, place):
    write(tmp_path / "wav/A - B", guesses)
    write(tmp_path / "other" / place, guesses, suffix)
    wav = scores_of(tmp_path / "wav", data, tmp_path / "out")
    other = scores_of(tmp_path / "other", data, tmp_path / "other_out")
    assert other.frames == wav.frames
    assert other.whole == wav.whole
    assert other.notes == wav.notes == ()
    assert f"estimates/vocals{suffix}" in other.files


@pytest.mark.parametrize("suffix", [".ogg", ".mp3"])
def test_lossy_estimates_are_read(data, guesses, tmp_path, suffix):
    write(tmp_path / "lossy/A - B", {"vocals": guesses["vocals"]}, suffix)
    write(tmp_path / "wav/A - B", {"vocals": guesses["vocals"]})
    lossy = scores_of(tmp_path / "lossy", data, tmp_path / "out", ("vocals",))
    wav = scores_of(tmp_path / "wav", data, tmp_path / "wav_out", ("vocals",))
    assert 0 < lossy.whole["vocals"]["uSDR"] < wav.whole["vocals"]["uSDR"]
    assert not any("late" in note or "early;" in note for note in lossy.notes)


def test_a_tree_of_flac_scores_as_one_of_wav_and_is_known_by_its_files(
    data, stems, guesses, tmp_path
):
    write(tmp_path / "flac/test/A - B", stems | {"mixture": sum(stems.values())}, ".flac")
    write(tmp_path / "guesses/A - B", guesses)
    wav = scores_of(tmp_path / "guesses", data, tmp_path / "out")
    flac = scores_of(tmp_path / "guesses", tmp_path / "flac", tmp_path / "flac_out")
    assert flac.frames == wav.frames
    assert flac.notes == wav.notes
    assert sorted(flac.files) == sorted(name.replace(".wav", ".flac") if "/" not in name else name
                                        for name in wav.files)  # fmt: skip
    scores_of(tmp_path / "guesses", tmp_path / "flac", tmp_path / "flac_out")  # resumes
    soundfile.write(tmp_path / "flac/test/A - B/bass.flac", 0.5 * stems["bass"], RATE)
    with pytest.raises(ValueError, match=r"bass\.flac was \w{8}… and is \w{8}… now"):
        scores_of(tmp_path / "guesses", tmp_path / "flac", tmp_path / "flac_out")


def test_two_files_of_a_stem_are_refused(data, guesses, tmp_path):
    write(tmp_path / "two/A - B", guesses)
    soundfile.write(tmp_path / "two/A - B/bass.flac", guesses["bass"], RATE)
    with pytest.raises(ValueError, match=r"A - B holds bass\.flac and bass\.wav; keep one"):
        scores_of(tmp_path / "two", data, tmp_path / "out")
    scores_of(tmp_path / "two", data, tmp_path / "vocals", ("vocals",))


def test_missing_stems_are_named_with_what_is_there_and_what_to_type(data, guesses, tmp_path):
    some = {name: guesses[name] for name in ("vocals", "other")}
    write(tmp_path / "some/A - B", some, ".flac")
    with pytest.raises(FileNotFoundError) as error:
        scores_of(tmp_path / "some", data, tmp_path / "out")
    message = str(error.value)
    assert "drums.flac is missing (the folder lacks drums, bass and holds other.flac, v" in message
    assert "--stems vocals,other, where other is the sum of all that are not named" in message
    write(tmp_path / "karaoke/A - B", {"vocals": some["vocals"], "no_vocals": some["other"]})
    with pytest.raises(FileNotFoundError, match=r"holds no_vocals\.wav, .*: --stems vocals$"):
        scores_of(tmp_path / "karaoke", data, tmp_path / "out")
    assert scores_of(tmp_path / "karaoke", data, tmp_path / "out", ("vocals",)).track == "A - B"
    (tmp_path / "empty/A - B").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"holds no sound file\); add the estimates$"):
        scores_of(tmp_path / "empty", data, tmp_path / "out")
    shutil.move(tmp_path / "karaoke/A - B/vocals.wav", tmp_path / "empty/vocals.wav")
    shutil.rmtree(tmp_path / "empty/A - B")
    with pytest.raises(FileNotFoundError, match=r"no estimates of this song .*holds vocals\.wav"):
        scores_of(tmp_path / "empty", data, tmp_path / "out")


def test_a_late_estimate_is_told_in_the_notes_of_its_song(data, guesses, tmp_path):
    late = {name: np.pad(wave, ((400, 0), (0, 0))) for name, wave in guesses.items()}
    write(tmp_path / "late/A - B", late | {"drums": -guesses["drums"]})
    notes = scores_of(tmp_path / "late", data, tmp_path / "out").notes
    told = [note.split(";")[0] for note in notes if note.startswith("the estimate of")]
    assert told == [
        "the estimate of vocals is 400 samples (50.0 ms) late",
        "the estimate of drums is inverted (of opposite polarity)",
        "the estimate of bass is 400 samples (50.0 ms) late",
        "the estimate of other is 400 samples (50.0 ms) late",
    ]


def test_samples_beyond_float32_are_refused_with_the_files_name(data, guesses, tmp_path):
    write(tmp_path / "loud/A - B", guesses)
    loud = guesses["bass"].copy()
    loud[123, 1] = 1e39
    soundfile.write(tmp_path / "loud/A - B/bass.wav", loud, RATE, subtype="DOUBLE")
    with pytest.raises(ValueError, match=r"A - B/bass\.wav contains .*infinite"):
        scores_of(tmp_path / "loud", data, tmp_path / "out")


def test_what_makes_no_estimates_is_refused_by_what_to_pass(data, tmp_path):
    separator = build_separator(("vocals", "other"), n_fft=512, hop_length=128, **MINI).eval()
    for wrong in ("guesses", tmp_path, separator, None, FolderEstimates, ModelEstimates):
        with pytest.raises(ValueError, match=r"pass ModelEstimates\(model\), or FolderEstimates"):
            evaluate(wrong, data, tmp_path / "out")
    with pytest.raises(ValueError, match=r"how=1\.0: pass an Evaluation"):
        Scoring(FolderEstimates(tmp_path), 1.0)
    with pytest.raises(ValueError, match=r"segmentation=6\.0: pass a Segmentation"):
        ModelEstimates(separator, 6.0)
    for wrong in (torch.nn.Identity(), 3, None):
        with pytest.raises(ValueError, match="expected a Separator, its folder or a name"):
            ModelEstimates(wrong)
    own = SimpleNamespace(stems=STEMS, settings=dict, files=dict, estimate=print)
    assert Scoring(own).sources == ("mixture", *STEMS)


def test_models_in_training_mode_are_refused_only_where_it_matters():
    separator = build_separator(("vocals", "other"), n_fft=512, hop_length=128, **MINI)
    separator.eval().training = True  # of its layers, none
    assert ModelEstimates(separator).stems == ("vocals", "other")
    separator.model.add_module("more", torch.nn.Dropout(0.5))
    with pytest.raises(ValueError, match="Dropout in training mode"):
        ModelEstimates(separator)
