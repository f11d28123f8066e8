"""A mixture that is another song is refused, a mastered one is told, rounding is neither."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from tfswa_lab.audio import STEMS
from tfswa_lab.evaluation.estimates import FolderEstimates
from tfswa_lab.evaluation.evaluate import evaluate
from tfswa_lab.evaluation.residual import residual_db, residual_notes
from tfswa_lab.evaluation.scoring import Evaluation

RATE = 8000
WAV = [Path("mixture.wav")]
QUICK = Evaluation(window=0.5, hop=0.5, bounds=())


def four_stems(seed, seconds=1):
    """On the grid of 16 bits, so that their sum is exact."""
    random = np.random.default_rng(seed).standard_normal((4, seconds * RATE, 2))
    return dict(zip(STEMS, np.round(0.05 * random * 32_768) / 32_768, strict=True))


def write(folder, waves, suffix=".wav"):
    folder.mkdir(parents=True, exist_ok=True)
    for name, wave in waves.items():
        soundfile.write(folder / f"{name}{suffix}", wave, RATE, subtype="PCM_16")


@pytest.fixture
def folders(tmp_path):
    """Data with one song, estimates of it, and the output."""
    stems = four_stems(0)
    write(tmp_path / "data/test/A - B", stems | {"mixture": sum(stems.values())})
    write(tmp_path / "guesses/A - B", {name: 0.9 * wave for name, wave in stems.items()})
    return tmp_path / "data", tmp_path / "guesses", tmp_path / "out"


def notes_of(folders, stems=STEMS, how=QUICK):
    data, guesses, out = folders
    shutil.rmtree(out, ignore_errors=True)
    scores = evaluate(FolderEstimates(guesses, stems), data, out, how).scores["estimates"]
    return [note for note in scores[0].notes if "mixture" in note]


def remix(folders, change):
    """Change the mixture of the song."""
    path = folders[0] / "test/A - B/mixture.wav"
    soundfile.write(path, change(soundfile.read(path)[0]), RATE, subtype="PCM_16")


def test_the_residual_is_a_ratio_of_energies():
    mixture = torch.tensor([[0.3, -0.4]])
    assert residual_db(mixture, 0.9 * mixture) == pytest.approx(-20, abs=1e-5)
    assert residual_db(mixture, -mixture) == pytest.approx(6.0206, abs=1e-4)
    assert residual_db(mixture, mixture) == -math.inf
    assert residual_db(0 * mixture, 0 * mixture) == -math.inf
    assert residual_db(0 * mixture, mixture) == math.inf


@pytest.mark.parametrize("dither", [0.0, 1.0])
def test_rounding_of_five_files_is_no_residual(dither):
    random = np.random.default_rng(0)
    stems = 0.1 * random.standard_normal((5, 2, 50_000))
    stems[4] = stems[:4].sum(0)
    stems += dither * (random.random(stems.shape) - random.random(stems.shape)) / 32_768
    rounded = torch.from_numpy(np.round(stems * 32_768) / 32_768)
    assert residual_db(rounded[4], rounded[:4].sum(0)) == -math.inf
    truncated = torch.from_numpy(np.floor(stems * 32_768) / 32_768)  # up to four steps off
    assert residual_db(truncated[4], truncated[:4].sum(0)) == -math.inf


def test_lossy_coding_is_no_alarm_and_neither_is_mastering_a_refusal():
    mixture = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 5000, generator=torch.Generator().manual_seed(1))
    for db in (-41.5, -32, -17.9, -15, -5.2, -4.1):  # what real songs leave
        total = mixture - noise * 10 ** (db / 20) * mixture.norm() / noise.norm()
        (note,) = residual_notes(mixture, total, WAV, RATE)
        assert f"{db:+.1f} dB of it are left" in note
        coded = residual_notes(mixture, total, [Path("A.stem.mp4")], RATE)
        assert coded == ((note,) if db > -10 else ())


def test_an_exact_sum_gets_no_note(folders):
    assert notes_of(folders) == notes_of(folders, ("vocals",)) == []


@pytest.mark.parametrize("stems", [STEMS, ("vocals", "other"), ("vocals",), ("bass", "drums")])
def test_a_mastered_mixture_is_told_whatever_stems_are_scored(folders, stems):
    remix(folders, lambda mixture: 0.9 * mixture)
    (note,) = notes_of(folders, stems)
    assert note == (
        "the mixture is not the sum of its stems: without them, -19.1 dB of it are left"
    )


@pytest.mark.parametrize("stems", [STEMS, ("vocals",)])
@pytest.mark.parametrize("level", [0.5, 1.0, 2.0])
def test_the_mixture_of_another_song_is_refused_unless_allowed(folders, stems, level):
    other, total = level * sum(four_stems(1).values()), sum(four_stems(0).values())
    remix(folders, lambda mixture: other)
    with pytest.raises(ValueError, match=r"A - B/mixture\.wav is not the sum .*--allow-mismatch"):
        notes_of(folders, stems)
    assert not list(folders[2].rglob("*.json"))
    (note,) = notes_of(folders, stems, Evaluation(window=0.5, bounds=(), allow_mismatch=True))
    expected = 10 * math.log10(((other - total) ** 2).sum() / (other**2).sum())
    assert expected == pytest.approx(10 * math.log10(1 + 1 / level**2), abs=0.2)  # unrelated
    assert f"without them, {expected:+.1f} dB" in note


def test_only_the_part_that_is_scored_counts(folders):
    remix(folders, lambda mixture: np.concatenate([mixture[:4000], 0.5 * mixture[4000:]]))
    assert len(notes_of(folders)) == 1
    assert notes_of(folders, how=Evaluation(window=0.5, seconds=0.5, bounds=())) == []


def test_without_all_four_stems_nothing_is_compared(folders):
    remix(folders, lambda mixture: 0.9 * mixture)
    song = folders[0] / "test/A - B"
    soundfile.write(song / "drums.wav", np.zeros((99, 2)), RATE)
    (note,) = notes_of(folders, ("vocals",))
    assert note.startswith("the mixture was not compared with the sum of its stems: ")
    assert "drums.wav has 99 samples" in note
    (song / "drums.wav").unlink()
    assert notes_of(folders, ("vocals",)) == []


def test_the_other_stems_are_among_the_files_that_a_song_is_known_by(folders):
    assert notes_of(folders, ("vocals",)) == []
    data, guesses, out = folders
    (scores,) = (out / "test").glob("*.json")
    files = json.loads(scores.read_text())["tfswa_lab"]["files"]
    assert sorted(files) == sorted(
        [*(f"{name}.wav" for name in (*STEMS, "mixture")), "estimates/vocals.wav"]
    )
    write(data / "test/A - B", {"drums": four_stems(3)["drums"]})
    with pytest.raises(ValueError, match=r"drums\.wav was \w{8}… and is"):
        evaluate(FolderEstimates(guesses, ("vocals",)), data, out, QUICK)


@pytest.mark.parametrize(("gain", "lag"), [(0.5, 0), (0.25, 300), (-1.0, 0), (2.5, -40)])
def test_a_mixture_at_another_level_or_time_is_told_and_not_refused(gain, lag):
    total = torch.from_numpy(sum(four_stems(0, seconds=8).values())).T
    (note,) = residual_notes(gain * total.roll(lag, -1), total, WAV, RATE)
    assert ("early" in note) == (lag > 0)  # the stems, where the mixture is late
    assert ("late" in note) == (lag < 0)
    assert ("inverted" in note) == (gain < 0)
    told = re.search(r"a gain of ([-+.\d]+) dB", note)
    assert (told is None) == (abs(gain) == 1)
    assert told is None or float(told[1]) == pytest.approx(20 * math.log10(abs(gain)), abs=0.2)


def test_another_song_is_refused_at_every_level():
    other = torch.from_numpy(sum(four_stems(1).values())).T
    total = torch.from_numpy(sum(four_stems(0).values())).T
    for level in (0.1, 1.0, 10.0):
        with pytest.raises(ValueError, match="is not the sum of its stems"):
            residual_notes(level * other, total, WAV, RATE)
