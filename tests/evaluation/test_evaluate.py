"""Scores of whole data sets: museval reads them, agrees with them, and errors name the file."""

import json
import math
import shutil

import numpy as np
import pytest
import soundfile
import torch

from tfswa_lab import audio
from tfswa_lab.audio import STEMS
from tfswa_lab.data.tracks import find_tracks
from tfswa_lab.evaluation.estimates import FolderEstimates, ModelEstimates
from tfswa_lab.evaluation.evaluate import evaluate
from tfswa_lab.evaluation.report import load_report
from tfswa_lab.evaluation.scores import read_scores
from tfswa_lab.evaluation.scoring import Evaluation
from tfswa_lab.inference.separate import Segmentation
from tfswa_lab.models.separator import build_separator
from tfswa_lab.weights import BAND

MINI = {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": 1, "window_size": 4}
LENGTH = 114_660  # samples, 2.6 s
NAMES = ("Ada - One", "Bo - Two.5")


def write_song(folder, stems, rate=44_100):
    folder.mkdir(parents=True)
    for stem, samples in stems.items():
        soundfile.write(folder / f"{stem}.wav", samples, rate, subtype="PCM_16")


@pytest.fixture(scope="module")
def short_songs(band_root):
    """Two songs of the band, 2.6 s each, and estimates with leakage and noise."""
    songs, random = {}, np.random.default_rng(0)
    for name, folder in zip(NAMES, sorted((band_root / "test").iterdir()), strict=False):
        names = (*STEMS, "mixture")
        cut = {x: soundfile.read(folder / f"{x}.wav", LENGTH, 200_000)[0] for x in names}
        noise = 0.003 * random.standard_normal((LENGTH, 2))
        guess = {stem: 0.8 * cut[stem] + 0.1 * cut["mixture"] + noise for stem in STEMS}
        songs[name] = cut, guess
    return songs


@pytest.fixture
def data(tmp_path, short_songs):
    for name, (stems, _) in short_songs.items():
        write_song(tmp_path / "data" / "test" / name, stems)
    return tmp_path / "data"


@pytest.fixture
def guesses(tmp_path, short_songs):
    for name, (_, guess) in short_songs.items():
        write_song(tmp_path / "guesses" / "test" / name, guess)
    return tmp_path / "guesses"


def museval_of(data, guesses, names):
    """museval's own scores of the first song."""
    audio.ensure_ffmpeg()
    import musdb
    import museval

    track = musdb.DB(root=str(data), is_wav=True, subsets="test")[0]
    folder = guesses / "test" / track.name
    estimates = {name: soundfile.read(folder / f"{name}.wav")[0] for name in names}
    return museval.eval_mus_track(track, estimates)


def test_scores_and_files_are_those_of_museval(data, guesses, tmp_path):
    stems = ("vocals", "drums")  # two of them: museval takes its time
    report = evaluate(
        FolderEstimates(guesses, stems), data, tmp_path / "out", Evaluation(bounds=())
    )
    track = museval_of(data, guesses, stems)
    ours = report.scores["estimates"][0]
    assert ours.track == track.track_name == NAMES[0]
    content = json.loads((tmp_path / "out" / "test" / f"{NAMES[0]}.json").read_text())
    targets = {target["name"]: target["frames"] for target in content["targets"]}
    for target in json.loads(track.json)["targets"]:
        assert len(target["frames"]) == len(targets[target["name"]]) == 2
        for theirs, own in zip(target["frames"], targets[target["name"]], strict=True):
            assert (theirs["time"], theirs["duration"]) == (own["time"], own["duration"])
            for metric, value in theirs["metrics"].items():
                assert own["metrics"][metric] == pytest.approx(value, abs=1.1e-5)
                assert round(own["metrics"][metric], 5) == own["metrics"][metric]


def test_evalstore_reads_the_files_and_aggregates_to_the_same_numbers(data, guesses, tmp_path):
    audio.ensure_ffmpeg()
    import museval
    from jsonschema import validate

    silent = np.zeros((50_000, 2))  # a frame that no stem has a value for
    path = guesses / "test" / NAMES[1] / "bass.wav"
    samples, rate = soundfile.read(path)
    soundfile.write(path, np.concatenate([silent, samples[50_000:]]), rate)
    out = tmp_path / "out"
    how = Evaluation(window=0.5, hop=0.25, bounds=["mixture"])
    report = evaluate(FolderEstimates(guesses), data, out, how)
    store = museval.EvalStore()
    store.add_eval_dir(out)
    songs = store.agg_frames_scores()
    for song in report.scores["estimates"]:
        for stem, ratios in song.medians.items():
            for name, value in ratios.items():
                assert songs[song.track, stem, name] == pytest.approx(value, abs=1e-12)
    assert np.isnan(store.df.score).sum() > 0
    total = store.agg_frames_tracks_scores()
    for stem, ratios in report.medians().items():
        for name, value in ratios.items():
            assert total[stem, name] == pytest.approx(value, abs=1e-12)
    schema = museval.TrackStore("").schema
    for path in out.rglob("*.json"):
        validate(json.loads(path.read_text()), schema)
    floor = museval.EvalStore()
    floor.add_eval_dir(out / "bounds" / "mixture")
    assert floor.agg_frames_tracks_scores()["bass", "SDR"] == pytest.approx(
        report.medians("mixture")["bass"]["SDR"], abs=1e-12
    )


def test_means_are_those_of_whole_songs(data, guesses, short_songs, tmp_path):
    report = evaluate(FolderEstimates(guesses), data, tmp_path / "out", Evaluation(bounds=()))
    expected = []
    for name, (stems, _) in short_songs.items():
        guess, _ = soundfile.read(guesses / "test" / name / "drums.wav")
        truth = (stems["drums"] * 32768).round() / 32768
        expected.append(10 * np.log10((truth**2).sum() / ((guess - truth) ** 2).sum()))
    assert report.means()["drums"] == pytest.approx(np.mean(expected), abs=0.01)
    assert report.medians()["drums"]["SDR"] != pytest.approx(np.mean(expected), abs=0.01)


def test_a_stem_that_is_silent_throughout_is_noted_and_left_out(data, guesses, tmp_path):
    whole = evaluate(FolderEstimates(guesses), data, tmp_path / "whole", Evaluation(bounds=()))
    folder = data / "test" / NAMES[1]
    voice, rate = soundfile.read(folder / "vocals.wav")
    mixture, _ = soundfile.read(folder / "mixture.wav")
    soundfile.write(folder / "vocals.wav", np.zeros_like(voice), rate)
    soundfile.write(folder / "mixture.wav", mixture - voice, rate)
    report = evaluate(
        FolderEstimates(guesses), data, tmp_path / "out", Evaluation(bounds=("mixture", "irm"))
    )
    song = report.scores["estimates"][1]
    assert all(
        math.isnan(x) for x in [*song.medians["vocals"].values(), song.whole["vocals"]["uSDR"]]
    )
    before = whole.scores["estimates"][1]
    assert song.medians["drums"]["SDR"] == before.medians["drums"]["SDR"]
    assert song.whole["drums"] == before.whole["drums"]
    assert song.notes == ("vocals is silent throughout, so it has no ratios",)
    assert report.notes() == [f"{NAMES[1]}: {song.notes[0]}"]
    first = report.scores["estimates"][0]
    assert report.means()["vocals"] == first.whole["vocals"]["uSDR"]
    assert report.medians()["vocals"] == first.medians["vocals"]
    assert "| – (– … –) |" in report.to_markdown()


def test_a_single_stem_is_scored_with_its_accompaniment_as_museval_does(data, guesses, tmp_path):
    folder = guesses / "test" / NAMES[0]
    mixture, rate = soundfile.read(data / "test" / NAMES[0] / "mixture.wav")
    voice, _ = soundfile.read(folder / "vocals.wav")
    soundfile.write(folder / "accompaniment.wav", mixture - voice, rate, "FLOAT")
    estimates = FolderEstimates(guesses, ["vocals"])
    report = evaluate(estimates, data, tmp_path / "out", Evaluation(bounds=("mixture", "mwf")))
    store = museval_of(data, guesses, ("vocals", "accompaniment"))
    assert report.stems == ("vocals", "accompaniment")
    medians = report.scores["estimates"][0].medians
    for target in json.loads(store.json)["targets"]:
        for metric in ("SDR", "ISR", "SIR", "SAR"):
            values = [frame["metrics"][metric] for frame in target["frames"]]
            expected = np.nanmedian(values)
            assert medians[target["name"]][metric] == pytest.approx(expected, abs=2e-4)
    assert report.means("mixture")["vocals"] < report.means("mwf")["vocals"]
    # The floor of the accompaniment is the mixture too: its error is the voice.
    truth, _ = soundfile.read(data / "test" / NAMES[0] / "vocals.wav")
    floor = 10 * np.log10(((mixture - truth) ** 2).sum() / (truth**2).sum())
    first = report.scores["mixture"][0].whole
    assert first["accompaniment"]["uSDR"] == pytest.approx(floor, abs=1e-3)


def test_other_is_what_the_stems_leave_out(data, guesses, tmp_path):
    for name in NAMES:
        folder = guesses / "test" / name
        rest = [soundfile.read(folder / f"{stem}.wav")[0] for stem in ("drums", "bass", "other")]
        soundfile.write(folder / "other.wav", sum(rest), 44_100)
    estimates = FolderEstimates(guesses, ("vocals", "other"))
    report = evaluate(estimates, data, tmp_path / "out", Evaluation(bounds=("irm",)))
    assert report.means()["other"] > 5
    parts = report.scores["irm"][0].settings["stems"]
    assert parts == {"vocals": ["vocals"], "other": ["drums", "bass", "other"]}


def test_the_shipped_separator_lies_between_floor_and_ceiling(band_root, tmp_path):
    song = min((band_root / "test").iterdir())
    shutil.copytree(song, tmp_path / "band" / "test" / song.name)
    report = evaluate(
        ModelEstimates(BAND), tmp_path / "band", tmp_path / "out", Evaluation(seconds=4)
    )
    for stem in STEMS:
        floor, score, ceiling = (report.means(x)[stem] for x in ("mixture", "estimates", "mwf"))
        assert floor + 3 < score < ceiling
        assert report.means("irm")[stem] < ceiling
    assert report.scores["estimates"][0].seconds == 4
    assert report.tracks == [song.name]


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (48_000, 2)])
def test_models_of_other_rates_and_channels_get_what_they_hear(data, tmp_path, rate, channels):
    torch.manual_seed(0)
    separator = build_separator(
        ("vocals", "other"), n_fft=512, hop_length=128, sample_rate=rate,
        audio_channels=channels, mixture_consistency=True, **MINI
    ).eval()  # fmt: skip
    separator.forward = lambda mixture: torch.stack([mixture, 0.5 * mixture], 1)
    mixture, _ = audio.read(data / "test" / NAMES[0] / "mixture.wav")
    (track, *_) = find_tracks(data, "test", ("mixture",))
    estimates, _ = ModelEstimates(separator, Segmentation(1.0)).estimate(track, mixture)
    assert estimates.shape == (2, *mixture.shape)
    heard = mixture.mean(0, keepdim=True).expand(2, -1) if channels == 1 else mixture
    low = audio.resample(audio.resample(heard, 44_100, rate), rate, 44_100)[:, : mixture.shape[1]]
    torch.testing.assert_close(estimates[0], low, atol=1e-5, rtol=0)
    torch.testing.assert_close(estimates[1], 0.5 * low, atol=1e-5, rtol=0)


def test_estimates_a_little_short_or_long_are_fixed_with_a_note(data, guesses, tmp_path):
    folder = guesses / "test" / NAMES[0]
    drums, rate = soundfile.read(folder / "drums.wav")
    soundfile.write(folder / "drums.wav", drums[:-1000], rate)
    samples, _ = soundfile.read(folder / "bass.wav")
    late = np.pad(samples, ((0, 44_100), (0, 0)))
    soundfile.write(folder / "bass.wav", late, rate)
    report = evaluate(FolderEstimates(guesses), data, tmp_path / "out", Evaluation(bounds=()))
    assert report.scores["estimates"][0].notes == (
        "the estimate drums.wav ends 1000 samples early: padded",
        "the estimate bass.wav is 44100 samples too long: cut",
    )
    soundfile.write(folder / "drums.wav", np.pad(drums[:-1000], ((0, 1000), (0, 0))), rate)
    soundfile.write(folder / "bass.wav", samples, rate)
    fixed = evaluate(FolderEstimates(guesses), data, tmp_path / "fixed", Evaluation(bounds=()))
    assert fixed.scores["estimates"][0].frames == report.scores["estimates"][0].frames


def test_without_the_level_of_the_split(data, guesses, tmp_path):
    evaluate(
        FolderEstimates(guesses / "test"), data, tmp_path / "out", Evaluation(bounds=(), seconds=1)
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "bass.wav is missing"),
        (lambda path: soundfile.write(path, np.ones((9000, 2)), 44_100), "has 9000 samples"),
        (lambda path: soundfile.write(path, np.ones((LENGTH, 2)), 48_000), "has 48000 Hz"),
        (lambda path: soundfile.write(path, np.ones((LENGTH, 3)), 44_100), "has 3 channels"),
        (lambda path: path.write_bytes(b"RIFF"), "bass.wav"),
    ],
)
def test_bad_estimates_are_named_before_the_work(data, guesses, tmp_path, damage, words):
    damage(guesses / "test" / NAMES[1] / "bass.wav")
    with pytest.raises((ValueError, FileNotFoundError), match=r"Bo - Two.*bass") as error:
        evaluate(FolderEstimates(guesses), data, tmp_path / "out")
    assert words in str(error.value)
    assert not list((tmp_path / "out").rglob("*.json"))


def test_nan_in_an_estimate_stops_with_its_name(data, guesses, tmp_path):
    soundfile.write(
        guesses / "test" / NAMES[0] / "bass.wav", np.full((LENGTH, 2), np.nan), 44_100, "FLOAT"
    )
    with pytest.raises(ValueError, match=r"Ada - One/bass\.wav contains NaN"):
        evaluate(FolderEstimates(guesses), data, tmp_path / "out", Evaluation(bounds=(), seconds=1))


def test_what_makes_no_sense_is_refused(data, guesses, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'vocals'"):
        FolderEstimates(guesses, ("vocal",))
    with pytest.raises(FileNotFoundError, match="no such folder of estimates"):
        FolderEstimates(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="there are no estimates of this song"):
        evaluate(FolderEstimates(tmp_path), data, tmp_path / "out")
    with pytest.raises(ValueError, match="unknown bound 'imr'; did you mean 'irm'"):
        evaluate(FolderEstimates(guesses), data, tmp_path / "out", Evaluation(bounds=("imr",)))
    with pytest.raises(ValueError, match="training mode"):
        ModelEstimates(build_separator(("vocals", "other"), **MINI))
    with pytest.raises(ValueError, match="unknown stem 'voice'"):
        ModelEstimates(build_separator(("voice", "other"), **MINI).eval())
    with pytest.raises(FileNotFoundError, match="holds no scores"):
        load_report(tmp_path / "out")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json is not a file of scores"):
        read_scores(tmp_path / "x.json")
